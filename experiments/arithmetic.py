"""Arithmetic word problems with answers that can be checked: a learned verifier, and RL from the exact reward.

    rlhf-jax --config=arithmetic --workdir=runs/arithmetic

Problems come from a seeded generator (`rlhf_jax/data/arithmetic.py`), so that nothing is downloaded and the difficulty
is a setting: `steps` and `largest` in the sources of `config.data`. No problem of the test split, with other names
and things either, is in the training split. SFT learns worked solutions that end in `#### ANSWER`. Four sampled
solutions of each problem are compared with the known answer, and a verifier learns to classify them as right or wrong,
as in Cobbe et al. 2021 (arXiv:2110.14168). The verifier chooses among samples (Best-of-N), and GRPO trains on the exact
reward, as in Shao et al. 2024 (arXiv:2402.03300). The gold score is the share of right answers.

SFT reads a third of the training problems, so that GRPO mostly sees new ones: in the pilot of papers/yue_2025 it gained
nothing if SFT had read all of them.

`--config=arithmetic:smoke` is a test that runs in seconds.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict, config_dict

PREFERENCES = runpy.run_path(str(Path(__file__).with_name("preferences.py")))
adamw, loop, model = (PREFERENCES[name] for name in ("adamw", "loop", "model"))

DIFFICULTY = "steps=1-2,largest=10"
EXACT = {"functions": ("rlhf_jax.rewards.exact:exact_answer",)}
"""Reward 1 for the right answer, and 0 for any other."""


def get_config(arg: str = "") -> ConfigDict:
    """Build the experiment, or its `smoke` variant, which only tests that everything works."""
    if arg not in ("", "smoke"):
        raise ValueError(f"arithmetic.py takes no argument but smoke, not {arg!r}")
    config = ConfigDict()
    config.seed = 0
    config.seeds = 1  # runs of GRPO trained at once
    config.stages = ("sft", "pairs", "verifier", "best_of_n", "grpo", "evaluate")
    config.data = ConfigDict(
        {
            "train": f"arithmetic:train,problems=40000,{DIFFICULTY}",
            "eval": f"arithmetic:validation,problems=400,{DIFFICULTY}",
            "test": f"arithmetic:test,problems=1000,{DIFFICULTY}",
            "limit": config_dict.placeholder(int),
            "text_prompt_tokens": (1, 1),  # of plain texts, which these data do not have
            "max_prompt_tokens": 48,
            "max_response_tokens": 20,
        }
    )
    config.runtime = ConfigDict(
        {
            "strategy": "jit",
            "data": 1,
            "fsdp": 1,
            "tensor": 1,
            "inference_batch": 512,
            "deterministic": True,
            "compile_quickly": False,
        }
    )
    config.sft = ConfigDict(
        {
            "kind": "sft",
            "tokenizer": {"kind": "byte_bpe", "vocab_size": 512},
            "model": model(d_model=48, n_layers=2),
            "optimizer": adamw(5e-3, schedule="cosine", weight_decay=0.1),
            "batch_size": 32,
            "epochs": 0.36,
            "sample_prompts": 8,
            "eval_every": 200,
            "loop": loop(steps_per_call=20),
        }
    )
    config.pairs = ConfigDict(
        {
            "kind": "preferences",
            "policy": "sft",
            "judge": None,
            "reward_model": EXACT,
            "prompts": 3000,
            "eval_prompts": 150,
            "samples_per_prompt": 4,
            "label_beta": None,
        }
    )
    config.verifier = ConfigDict(
        {
            "kind": "reward_model",
            "policy": None,
            "preferences": "pairs",
            "model": {"init": "sft"},
            "pooling": "last",
            "loss": {"name": "classification"},
            "optimizer": adamw(3e-3, schedule="cosine", weight_decay=0.1),
            "batch_size": 32,
            "epochs": 2.0,
            "eval_every": 100,
            "loop": loop(steps_per_call=10),
        }
    )
    config.best_of_n = ConfigDict(
        {
            "kind": "best_of_n",
            "policy": "sft",
            "reward_model": "verifier",
            "judge": EXACT,
            "prompts": 100,
            "pool": 128,
            "temperature": 1.0,
        }
    )
    config.grpo = ConfigDict(
        {
            "kind": "group_rl",
            "method": "grpo",
            "num_generations": 8,
            "policy": "sft",
            "reward_model": EXACT,
            "iterations": 60,
            "batch_size": 512,
            "minibatches": 2,
            "epochs": 1,
            "temperature": 1.0,
            "kl_coef": 0.01,
            "optimizer": adamw(1e-3, schedule="linear", weight_decay=0.0),
            "samples_every": 10,
            "samples_written": 16,
            "loop": loop(steps_per_call=5),
        }
    )
    config.evaluate = ConfigDict(
        {
            "kind": "evaluate",
            "reference": "sft",
            "policies": ("grpo",),
            "best_of": (16,),
            "reward_model": "verifier",
            "judge": EXACT,
            "prompts": 1000,
            "selection_prompts": 200,
            "temperature": 1.0,
        }
    )
    if arg == "smoke":
        make_smaller(config)
    return config.lock()


def make_smaller(config: ConfigDict) -> None:
    """Apply the smoke variant: easy problems, few of them, tiny networks, and few steps."""
    for split, name, problems in (("train", "train", 400), ("eval", "validation", 24), ("test", "test", 24)):
        config.data[split] = f"arithmetic:{name},problems={problems},steps=1,largest=5"
    config.data.update({"max_prompt_tokens": 64, "max_response_tokens": 12})
    config.runtime.update({"inference_batch": 64, "compile_quickly": True})
    config.sft.model.update(model(d_model=32, n_layers=1))
    config.sft.tokenizer.vocab_size = 400
    config.sft.optimizer.learning_rate = 1e-2
    config.sft.update({"batch_size": 16, "epochs": 3.0, "sample_prompts": 2, "eval_every": 1000})
    config.pairs.update({"prompts": 48, "eval_prompts": 16})
    config.verifier.update({"batch_size": 16, "epochs": 0.5})
    config.best_of_n.update({"prompts": 8, "pool": 8})
    config.grpo.update({"iterations": 5, "batch_size": 32, "samples_written": 4})
    config.evaluate.update({"prompts": 16, "selection_prompts": 8, "best_of": (4,)})
