"""Summaries of Reddit posts with Pythia: the setting of Huang et al. 2024 (arXiv:2403.17031), "The N+ details".

    rlhf-jax --config=tldr_pythia:1b --workdir=runs/tldr_1b \
        --config.data.train=train.jsonl --config.data.eval=validation.jsonl

`1b`, `2.8b` and `6.9b` are the paper's sizes. From the paper: one epoch of SFT (batches of 128), reward model (64) and
DPO (64, beta 0.05), and a million episodes of PPO in batches of 512, four epochs of one minibatch, KL coefficient 0.05,
gamma 1, lambda 0.95, both clips 0.2, value coefficient 0.1, temperature 0.7, 53 response tokens after up to 512 of the
post, a score of -1 without EOS; Adam with an epsilon of 1e-5 in PPO, and learning rates of 3e-6 that decay to 0. The
reward model judges, instead of GPT-3.5; the paper's accuracies on held-out pairs are .628, .669 and .689. Not as in the
paper: SFT is on the chosen summaries of the pairs, as all stages read one table, instead of the reference summaries.

Data: the pairs of openai/summarize_from_feedback as `prompt, chosen, rejected`.

Not run. `--config=tldr_pythia:smoke` tests that everything works, in seconds, on synthetic pairs with a tiny model.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

PREFERENCES = runpy.run_path(str(Path(__file__).parents[1] / "preferences.py"))
SIZES = ("1b", "2.8b", "6.9b")
BATCHES = {"sft": 128, "reward_model": 64, "dpo": 64}
EPISODES = 1_000_000


def get_config(arg: str = "") -> ConfigDict:
    """Build the experiment for a size (the smallest by default), or its `smoke` variant."""
    if arg not in ("", *SIZES, "smoke"):
        raise ValueError(f"tldr_pythia.py takes {', '.join(SIZES)} or smoke, not {arg!r}")
    smoke, size = arg == "smoke", arg or SIZES[0]
    config = PREFERENCES["get_config"]("smoke" if smoke else f"init=EleutherAI/pythia-{size}-deduped").unlock()
    for name in ("sft", "reward_model", "dpo", "ppo"):
        config[name].optimizer.update(
            {"learning_rate": 3e-6, "schedule": "linear", "warmup_steps": 0, "weight_decay": 0.0}
        )
    config.dpo.beta = 0.05
    config.ppo.update({"minibatches": 1, "epochs": 4, "temperature": 0.7, "missing_eos_score": -1.0})
    config.ppo.missing_eos_penalty = 0.0
    config.evaluate.temperature = 0.7
    if not smoke:
        config.data.update({"max_prompt_tokens": 512, "max_response_tokens": 53})
        config.sft.model.update({"compute_dtype": "bfloat16", "remat": True})
        for name, rows in BATCHES.items():
            config[name].update({"batch_size": rows, "epochs": 1.0})
            config[name].optimizer.micro_batch = 8
        calls = EPISODES // 512 // config.ppo.loop.steps_per_call
        config.ppo.update({"batch_size": 512, "iterations": calls * config.ppo.loop.steps_per_call})
        config.ppo.optimizer.micro_batch = 8
    return config.lock()
