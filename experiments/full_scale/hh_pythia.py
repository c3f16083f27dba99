"""Dialogues of Anthropic's HH with Pythia-2.8B: the setting of Rafailov et al. 2023 (arXiv:2305.18290), figure 3.

    rlhf-jax --config=hh_pythia --workdir=runs/hh --config.data.train=train.jsonl.gz --config.data.eval=test.jsonl.gz

From the paper: Pythia-2.8B, fine-tuned on the chosen answers; DPO at beta 0.1 for one epoch with RMSprop at 1e-6, 150
warm-up steps and batches of 64; answers of temperature 1, Best-of-128 as baseline. Not from the paper: the learning
rate of SFT and of the reward model, which are those of experiments/preferences.py, and the reward model as judge
instead of GPT-4. Sequences have up to 512 tokens, half of them the prompt, as in the authors' code.

Data: harmless-base and helpful-base (github.com/anthropics/hh-rlhf), files with `chosen` and `rejected` dialogues.

Not run. `--config=hh_pythia:smoke` tests that everything works, in seconds, on synthetic pairs with a tiny model.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

PREFERENCES = runpy.run_path(str(Path(__file__).parents[1] / "preferences.py"))


def get_config(arg: str = "") -> ConfigDict:
    """Build the experiment, or its `smoke` variant."""
    if arg not in ("", "smoke"):
        raise ValueError(f"hh_pythia.py takes no argument but smoke, not {arg!r}")
    config = PREFERENCES["get_config"](arg or "init=EleutherAI/pythia-2.8b").unlock()
    del config["ppo"]
    config.stages = ("sft", "reward_model", "dpo", "evaluate")
    config.evaluate.policies = ("dpo",)
    config.dpo.optimizer.update({"name": "rmsprop", "learning_rate": 1e-6, "schedule": "constant", "warmup_steps": 150})
    if arg != "smoke":
        config.data.update({"max_prompt_tokens": 256, "max_response_tokens": 256})
        config.sft.model.update({"compute_dtype": "bfloat16", "remat": True})
        for name in ("sft", "reward_model", "dpo"):
            config[name].batch_size = 64
            config[name].optimizer.micro_batch = 8
        config.evaluate.best_of = (128,)
    return config.lock()
