"""Reward against divergence on IMDb with GPT-2 large: the setting of Rafailov et al. 2023 (arXiv:2305.18290), figure 2.

    rlhf-jax --config=imdb_gpt2 --workdir=runs/imdb_gpt2

From the paper: GPT-2 large fine-tuned on IMDb; prompts of 2 to 8 tokens; 4 samples of each of 25,000 prompts and their
6 pairs, labelled without noise; DPO at beta 0.05, 0.1, 1 and 5 with RMSprop at 1e-6, 150 warm-up steps and batches of
64; PPO with target divergences of 3, 6, 9 and 12. Not from the paper, which does not state them: 48 response tokens,
and PPO's other settings, which are Ziegler et al.'s controller and TRL's defaults. The gold judge is fitted to the
labels of the training split (experiments/imdb/sentiment.py), instead of a released sentiment classifier.

Data: as in experiments/imdb/sentiment.py.

Not run. `--config=imdb_gpt2:smoke` tests that everything works, in seconds, on synthetic sentences with a tiny model.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

SENTIMENT = runpy.run_path(str(Path(__file__).parents[1] / "imdb" / "sentiment.py"))
BETAS = {"dpo_005": 0.05, "dpo_01": 0.1, "dpo_1": 1.0, "dpo_5": 5.0}
TARGETS = {"ppo_3": 3.0, "ppo_6": 6.0, "ppo_9": 9.0, "ppo_12": 12.0}


def get_config(arg: str = "") -> ConfigDict:
    """Build the experiment, or its `smoke` variant."""
    if arg not in ("", "smoke"):
        raise ValueError(f"imdb_gpt2.py takes no argument but smoke, not {arg!r}")
    config = SENTIMENT["get_config"](arg).unlock()
    dpo, ppo = config.dpo_01, config.ppo
    for name in [stage for stage in config.stages if config[stage].kind in ("dpo", "ppo", "evaluate", "best_of_n")]:
        del config[name]
    dpo.optimizer.update({"name": "rmsprop", "learning_rate": 1e-6, "schedule": "constant", "warmup_steps": 150})
    config.preferences.label_beta = None
    ppo.update({"kl_coef": 0.2, "samples_written": 0})
    ppo.optimizer.learning_rate = 1.41e-5
    if arg != "smoke":
        config.sft.model.init = "openai-community/gpt2-large"
        config.preferences.update({"prompts": 25_000, "eval_prompts": 500})
        ppo.update({"batch_size": 512, "minibatches": 8, "epochs": 4})
    for name, beta in BETAS.items():
        config[name] = ConfigDict(dpo.to_dict() | {"beta": beta})
    for name, target in TARGETS.items():
        config[name] = ConfigDict(ppo.to_dict() | {"kl_controller": {"target": target, "horizon": 10_000.0}})
    policies = (*BETAS, *TARGETS)
    config.frontier = ConfigDict(
        {
            "kind": "frontier",
            "reference": "sft",
            "policies": policies,
            "judge": "gold",
            "prompts": 16 if arg == "smoke" else 1000,
            "temperature": 1.0,
            "kl_targets": (3.0, 6.0, 9.0, 12.0),
        }
    )
    config.stages = ("gold", "sft", "preferences", "reward_model", *policies, "frontier")
    return config.lock()
