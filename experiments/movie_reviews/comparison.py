"""Comparison of preference losses and policy gradients on one task, at equal KL divergence.

    rlhf-jax --config=experiments/movie_reviews/comparison.py --workdir=runs/comparison
    rlhf-jax --config=experiments/movie_reviews/comparison.py:half_hour --workdir=runs/comparison_half_hour

Task, policy, preferences and reward model are the quickstart's. Every method starts from the same SFT policy and trains
four seeds (`half_hour`: eight methods, two seeds). Checkpoints of each run are sampled on the test prompts and scored
by the gold judge, and each method's score is interpolated where its runs cross 1, 2, 4 and 10 nats of KL:
`matched.csv`, `figures/runs.png`, `figures/equal_kl.png`. An interrupted comparison resumes.

Learning rates, batches and lengths are the quickstart's for all methods of a kind (the online ones run 80 iterations,
`half_hour` 100, and its offline methods train twice as long); none was tuned for this comparison.

All of these runs predate three changes of the defaults: weight decay excludes norms and biases, Adam's epsilon is 1e-8
except in PPO (then 1e-5 everywhere), and evaluations draw their prompts from the whole split.

Results of the whole comparison (seeds 0 to 3; JAX 0.10.2, 2026-11-23; 2 cores of AMD EPYC, mostly with two methods at a
time on one core each, the first ones beside other jobs; 2 h 7 min of stages; results/comparison). The gold score is
0.05 at the start; standard errors are over four seeds, and up to 0.04 unless stated.
- 2 nats: the pairwise losses with a reference are close together and ahead (cdpo 0.65, sigmoid 0.62, robust 0.60, aot
  0.59, sigmoid_norm 0.58, js_divergence, tr_dpo 0.57, exo_pair 0.56, hinge 0.55); then gspo 0.54, rloo 0.53,
  reinforce_plus_plus 0.50, grpo, kto 0.46, ppo 0.41, cispo, online_dpo 0.40, dapo 0.32, simpo 0.28.
- 4 nats: rloo 0.86, gspo 0.78, reinforce_plus_plus 0.74, ppo 0.72 (0.06), grpo 0.65, online_dpo 0.61, dapo 0.50. Few
  offline runs get this far in half an epoch: exo_pair (0.80), aot_unpaired, js_divergence and hinge with two seeds of
  four, kto (0.71) with three.
- 10 nats: ppo 1.64 and rloo 1.54 lead; reinforce_plus_plus (0.08) and gspo 1.26 (0.05), online_dpo 1.06 (0.07), grpo
  1.01 (0.06), cispo 0.91 (0.06), dapo 0.88, dr_grpo 0.85. Methods with almost no penalty continue to 70 nats and more,
  where the gold score saturates near 2.6.
- cpo, orpo, rpo and sft_chosen, whose losses contain the likelihood of the chosen response, stay below 0.3 nats.
  forward_kl and sppo_hard end at 0.4 to 0.8 nats, on the same curve as the others.
- apo_down reaches at most 0.2 and ends near 0 at 9 to 160 nats, as it also lowers the likelihood of the chosen
  responses. discopop falls below the start: at a margin of 0 its loss increases with the margin, because the derivative
  of the modulation (5 at tau = 0.05) dominates, and so it learns to prefer the rejected responses.

In those runs, dapo sampled twice as many groups as it trains on, and kept those with unequal scores. Four separate runs
with the present method, which samples rounds of new prompts until a batch is full (same seeds, one core, beside other
jobs, 2026-11-23; results/comparison_dapo), gave 0.33 (0.05) at 2 nats, 0.49 at 4 and 0.80 (0.05) at 10, the same within
errors.

Results of `half_hour` (seeds 0 and 1; 2 cores of AMD EPYC, JAX 0.10.2, 2026-11-22; 24 minutes of stages, some of them
beside other jobs on the same cores; results/comparison_half_hour): at 2 nats the offline losses with a reference and
RLOO lead (ipo 0.67, sigmoid 0.56, rloo 0.54, grpo 0.49, kto 0.43, ppo 0.37, online_dpo 0.34, simpo 0.25; standard
errors up to 0.07, over two seeds). ipo never reaches 4 nats, and sigmoid ends near 5. At 10 nats rloo (1.62) and ppo
(1.58) are well above grpo (1.02) and online_dpo (0.93), which continue to over 70 nats under their weaker
regularisation, where the gold score no longer rises. simpo, which has no reference, moves 22 nats for a gain of 0.7.
All gains are from a gold score of 0.01.
"""

import runpy
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

QUICKSTART = runpy.run_path(str(Path(__file__).with_name("quickstart.py")))

# Beta is the strength of the pull to the reference in most of them; in ipo and sigmoid_norm, whose scores are a
# token's, it is larger by about the length of a response, and in simpo it multiplies log-probabilities a token.
PREFERENCE_LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {"beta": 0.05},
    "cdpo": {"beta": 0.05, "label_smoothing": 0.1},
    "robust": {"beta": 0.05, "label_smoothing": 0.1},
    "hinge": {"beta": 0.05},
    "ipo": {"beta": 0.5},
    "sigmoid_norm": {"beta": 0.5},
    "exo_pair": {"beta": 0.05, "label_smoothing": 0.001},
    "nca_pair": {"beta": 0.05},
    "bco_pair": {"beta": 0.05},
    "sppo_hard": {"beta": 0.05},
    "aot": {"beta": 0.05},
    "aot_unpaired": {"beta": 0.05},
    "apo_zero": {"beta": 0.05},
    "apo_down": {"beta": 0.05},
    "discopop": {"beta": 0.05},
    "forward_kl": {"beta": 0.05, "losses": ("sigmoid",), "divergence": "forward_kl"},
    "js_divergence": {"beta": 0.05, "losses": ("sigmoid",), "divergence": "js_divergence"},
    "alpha_divergence": {"beta": 0.05, "losses": ("sigmoid",), "divergence": "alpha_divergence"},
    "ld_dpo": {"beta": 0.05, "losses": ("sigmoid",), "ld_alpha": 0.5},
    "wpo": {"beta": 0.05, "losses": ("sigmoid",), "use_weighting": True},
    "rpo": {"beta": 0.05, "losses": ("sigmoid", "sft")},
    "sft_chosen": {"beta": 0.05, "losses": ("sft",)},
    "cpo": {"beta": 0.05},
    "simpo": {"beta": 2.0},
    "orpo": {"beta": 0.5},
}
REFERENCE_FREE = {"sft", "cpo", "simpo", "orpo"}
POLICY_GRADIENTS: dict[str, dict[str, Any]] = {
    "rloo": {"kl_coef": 0.05},
    "reinforce_plus_plus": {"kl_coef": 0.05},
    "grpo": {},
    "dr_grpo": {},
    "dapo": {},
    "gspo": {},
    "cispo": {},
}
HALF_HOUR = ("sigmoid", "ipo", "simpo", "kto", "ppo", "rloo", "grpo", "online_dpo")
SMOKE = ("kto", "ppo", "grpo")
STAGES = ("gold", "sft", "preferences", "reward_model")


def get_config(arg: str = "") -> ConfigDict:
    """Build the comparison: all methods with four seeds; `half_hour`: eight with two; `smoke`: six, as a test."""
    if arg not in ("", "half_hour", "smoke"):
        raise ValueError(f"comparison.py takes the argument half_hour or smoke, or none, not {arg!r}")
    smoke = arg == "smoke"
    quickstart = QUICKSTART["get_config"]("smoke" if smoke else "").unlock()
    config = ConfigDict({name: quickstart[name] for name in ("seed", "data", "runtime", *STAGES)})
    config.seeds = 4 if not arg else 2
    offline = quickstart["dpo_01"].copy_and_resolve_references()
    online = quickstart["ppo"].copy_and_resolve_references()
    del offline.beta, offline.cached_reference
    for section in (offline, online):
        section.loop.keep = 100
    offline.loop.checkpoint_every = 10 if arg else 20
    online.loop.checkpoint_every = 5  # they leave quickly
    offline.update({"sample_prompts": 2, "epochs": 1.0 if arg == "half_hour" else 0.5, "eval_every": 1000})
    online.update({"samples_written": 8, "iterations": online.iterations if arg else 80})

    methods = {name: preference_loss(offline, name) for name in PREFERENCE_LOSSES}
    methods["tr_dpo"] = with_fields(
        methods["sigmoid"], {"cached_reference": False, "reference_update": {"alpha": 0.6, "every": 64}}
    )
    methods["kto"] = with_fields(offline, {"kind": "kto", "beta": 0.05})
    methods["online_dpo"] = online_dpo(online)
    methods["ppo"] = with_fields(online, {"kl_coef": 0.05})
    methods |= {name: policy_gradient(online, name) for name in POLICY_GRADIENTS}
    chosen = {"": tuple(methods), "half_hour": HALF_HOUR, "smoke": SMOKE}[arg]
    for name in chosen:
        config[name] = methods[name]
    config.stages = (*STAGES, *chosen, "frontier")
    config.frontier = ConfigDict(
        {
            "kind": "frontier",
            "reference": "sft",
            "policies": chosen,
            "judge": "gold",
            "prompts": {"": 256, "half_hour": 512, "smoke": 64}[arg],
            "temperature": 1.0,
            "kl_targets": (0.01, 0.1) if smoke else (1.0, 2.0, 4.0, 10.0),
        }
    )
    return config.lock()


def preference_loss(offline: ConfigDict, name: str) -> ConfigDict:
    """Section of DPO with another loss; the reference's log-probabilities are computed once for all of these stages."""
    fields = dict(PREFERENCE_LOSSES[name])
    beta = fields.pop("beta")
    loss = {"losses": (name,), **fields}
    return with_fields(
        offline, {"beta": beta, "loss": loss, "cached_reference": not set(loss["losses"]) <= REFERENCE_FREE}
    )


def policy_gradient(online: ConfigDict, method: str) -> ConfigDict:
    """Section of a group method: PPO's without the value function, with as many responses, in groups of four."""
    section = with_fields(online, {"kind": "group_rl", "method": method, "num_generations": 4})
    section.optimizer.epsilon = 1e-8  # 1e-5 is PPO's
    for name in ("kl_coef", "gamma", "gae_lambda", "clip_ratio", "value_clip", "vf_coef"):
        del section[name]
    return with_fields(section, POLICY_GRADIENTS[method])


def online_dpo(online: ConfigDict) -> ConfigDict:
    """Section of online DPO: half as many prompts as PPO, with two responses to each."""
    section = with_fields(online, {"kind": "online_dpo", "beta": 0.05, "batch_size": online.batch_size // 2})
    section.optimizer.epsilon = 1e-8
    for name in ("kl_coef", "gamma", "gae_lambda", "clip_ratio", "value_clip", "vf_coef"):
        del section[name]
    return section


def with_fields(section: ConfigDict, fields: dict[str, Any]) -> ConfigDict:
    """Copy of a section with some fields changed."""
    section = section.copy_and_resolve_references()
    for name, value in fields.items():
        section[name] = ConfigDict(value) if isinstance(value, dict) else value
    return section
