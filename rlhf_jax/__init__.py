"""Learning from human preferences in JAX: SFT, reward models, PPO, DPO and Best-of-N, in experiments that can be rerun.

The functions of this module are those of the command line. Each name is imported when it is first used.

    import rlhf_jax

    run = rlhf_jax.run("quickstart:smoke", "runs/smoke")
    policy = run.load_policy("ppo")
    rlhf_jax.sample(policy, ["the film"], n=4)

Experiments: `load_config`, `run`, `Run`, `draw` (figures), `fetch`, `RlhfError`.
Models: `load_policy`, `load_reward_model`, `Policy`, `RewardModel`, `export`.
Use: `sample`, `logprobs`, `score`, `best_of_n`, `evaluate`.
For your own training loops: `load_rows`, `encode_preferences`, `sequence_logprobs`, and the modules `advantages`, `kl`,
`policy_losses`, `preference_losses`, `reward_losses` and `unpaired_losses` of pure functions.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from rlhf_jax.api import fetch as fetch
    from rlhf_jax.api import load_config as load_config
    from rlhf_jax.api import run as run
    from rlhf_jax.core import advantages as advantages
    from rlhf_jax.core import kl as kl
    from rlhf_jax.core import policy_losses as policy_losses
    from rlhf_jax.core import preference_losses as preference_losses
    from rlhf_jax.core import reward_losses as reward_losses
    from rlhf_jax.core import unpaired_losses as unpaired_losses
    from rlhf_jax.core.logprobs import sequence_logprobs as sequence_logprobs
    from rlhf_jax.data.rows import encode_preferences as encode_preferences
    from rlhf_jax.data.rows import load_rows as load_rows
    from rlhf_jax.inference.best_of_n import best_of_n as best_of_n
    from rlhf_jax.inference.compare import evaluate as evaluate
    from rlhf_jax.inference.logprobs import logprobs as logprobs
    from rlhf_jax.inference.sample import sample as sample
    from rlhf_jax.inference.score import score as score
    from rlhf_jax.loading.export import export as export
    from rlhf_jax.loading.models import Policy as Policy
    from rlhf_jax.loading.models import RewardModel as RewardModel
    from rlhf_jax.loading.pretrained import load_policy as load_policy
    from rlhf_jax.loading.pretrained import load_reward_model as load_reward_model
    from rlhf_jax.reports.report import draw as draw
    from rlhf_jax.reports.run import Run as Run
    from rlhf_jax.types import RlhfError as RlhfError

HOMES = {
    "rlhf_jax.api": ("fetch", "load_config", "run"),
    "rlhf_jax.core": ("advantages", "kl", "policy_losses", "preference_losses", "reward_losses", "unpaired_losses"),
    "rlhf_jax.core.logprobs": ("sequence_logprobs",),
    "rlhf_jax.inference.best_of_n": ("best_of_n",),
    "rlhf_jax.inference.compare": ("evaluate",),
    "rlhf_jax.data.rows": ("encode_preferences", "load_rows"),
    "rlhf_jax.inference.logprobs": ("logprobs",),
    "rlhf_jax.inference.sample": ("sample",),
    "rlhf_jax.inference.score": ("score",),
    "rlhf_jax.loading.export": ("export",),
    "rlhf_jax.loading.models": ("Policy", "RewardModel"),
    "rlhf_jax.loading.pretrained": ("load_policy", "load_reward_model"),
    "rlhf_jax.reports.report": ("draw",),
    "rlhf_jax.reports.run": ("Run",),
    "rlhf_jax.types": ("RlhfError",),
}
"""Public names by the module that each is defined in."""

_MODULE_OF = {name: module for module, names in HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_MODULE_OF)]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'rlhf_jax' has no attribute {name!r}")
    home = _MODULE_OF[name]
    if home == "rlhf_jax.core":
        return importlib.import_module(f"{home}.{name}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return __all__
