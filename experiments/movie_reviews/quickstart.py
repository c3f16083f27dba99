"""Comparison of Best-of-N, DPO and PPO with SFT on movie reviews, scored by a gold judge.

    rlhf-jax fetch movie_reviews
    rlhf-jax --config=quickstart --workdir=runs/quickstart

`--config=quickstart:smoke` is a test that runs in seconds, on synthetic sentences from this repository.
"""

from pathlib import Path

from ml_collections import ConfigDict, config_dict

SMOKE_DATA = Path(__file__).absolute().parents[1] / "smoke"
DPO_BETAS = {"dpo_1": 1.0, "dpo_01": 0.1, "dpo_005": 0.05}


def get_config(arg: str = "") -> ConfigDict:
    """Build the experiment, or its `smoke` variant, which only tests that everything works."""
    config = ConfigDict()
    config.seed = 0
    config.seeds = 1  # runs of DPO and PPO trained at once
    config.stages = ("gold", "sft", "preferences", "reward_model", "best_of_n", *DPO_BETAS, "ppo", "evaluate")
    config.data = ConfigDict(
        {
            "train": "tfds:movie_reviews/train",
            "eval": "tfds:movie_reviews/validation",
            "test": "tfds:movie_reviews/test",
            "limit": config_dict.placeholder(int),
            "text_prompt_tokens": (2, 5),
            "max_prompt_tokens": 6,
            "max_response_tokens": 24,
            "loss_on": "completion",
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
    config.gold = ConfigDict({"kind": "gold", "model": {"alpha": 1.0, "min_df": 2}, "rating": "rating"})
    config.sft = ConfigDict(
        {
            "kind": "sft",
            "tokenizer": {"kind": "word", "vocab_size": 2048},
            "model": model(d_model=96, n_layers=2),
            "optimizer": adamw(3e-3, schedule="cosine", warmup_steps=20, weight_decay=0.1),
            "batch_size": 64,
            "epochs": 4.0,
            "sample_prompts": 8,
            "eval_every": 260,
            "loop": loop(steps_per_call=10),
        }
    )
    config.preferences = ConfigDict(
        {
            "kind": "preferences",
            "policy": "sft",
            "judge": "gold",
            "prompts": 2500,
            "eval_prompts": 250,
            "samples_per_prompt": 4,
            "label_beta": 2.0,
        }
    )
    config.reward_model = ConfigDict(
        {
            "kind": "reward_model",
            "policy": "sft",
            "preferences": "preferences",
            "model": model(d_model=64, n_layers=1),
            "pooling": "mean",
            "optimizer": adamw(3e-3, schedule="cosine", warmup_steps=20, weight_decay=0.1),
            "batch_size": 64,
            "epochs": 1.0,
            "eval_every": 100,
            "loop": loop(steps_per_call=10),
        }
    )
    config.best_of_n = ConfigDict(
        {
            "kind": "best_of_n",
            "policy": "sft",
            "reward_model": "reward_model",
            "judge": "gold",
            "prompts": 64,
            "pool": 128,
            "temperature": 1.0,
        }
    )
    for name, beta in DPO_BETAS.items():
        config[name] = ConfigDict(
            {
                "kind": "dpo",
                "policy": "sft",
                "preferences": "preferences",
                "beta": beta,
                "optimizer": adamw(3e-4, schedule="linear", warmup_steps=10, weight_decay=0.0),
                "batch_size": 64,
                "epochs": 0.5,
                "sample_prompts": 8,
                "eval_every": 70,
                "loop": loop(steps_per_call=10),
                "cached_reference": True,  # one for all betas
            }
        )
    config.ppo = ConfigDict(
        {
            "kind": "ppo",
            "policy": "sft",
            "reward_model": "reward_model",
            "iterations": 80,
            "batch_size": 128,
            "minibatches": 2,
            "epochs": 2,
            "temperature": 1.0,
            "kl_coef": 0.1,
            "missing_eos_penalty": 0.0,
            "gamma": 1.0,
            "gae_lambda": 0.95,
            "clip_ratio": 0.2,
            "value_clip": 0.2,
            "vf_coef": 0.1,
            "optimizer": adamw(3e-4, schedule="linear", warmup_steps=10, weight_decay=0.0, epsilon=1e-5),
            "samples_every": 10,
            "samples_written": 64,
            "loop": loop(steps_per_call=5),
        }
    )
    config.evaluate = ConfigDict(
        {
            "kind": "evaluate",
            "reference": "sft",
            "policies": (*DPO_BETAS, "ppo"),
            "best_of": (16,),
            "reward_model": "reward_model",
            "judge": "gold",
            "prompts": 1000,
            "selection_prompts": 300,
            "temperature": 1.0,
        }
    )
    if arg == "smoke":
        make_smaller(config)
    elif arg:
        raise ValueError(f"quickstart.py takes no argument but smoke, not {arg!r}")
    return config.lock()


def make_smaller(config: ConfigDict) -> None:
    """Apply the smoke variant: two betas, few rows and steps, tiny networks, and a judge smaller than the policy."""
    betas = ("dpo_1", "dpo_01")
    for name in set(DPO_BETAS) - set(betas):
        del config[name]
    config.stages = ("gold", "sft", "preferences", "reward_model", "best_of_n", *betas, "ppo", "evaluate")
    for split in ("train", "eval", "test"):
        config.data[split] = str(SMOKE_DATA / f"reviews_{split}.jsonl")
    config.data.max_response_tokens = 16
    config.runtime.update({"inference_batch": 128, "compile_quickly": True})
    config.sft.model.update(model(d_model=32, n_layers=1))
    config.sft.tokenizer.vocab_size = 512
    config.sft.update({"epochs": 1.0, "sample_prompts": 4})
    config.preferences.update({"prompts": 200, "eval_prompts": 40})
    config.reward_model.model.update(model(d_model=16, n_layers=1))
    config.best_of_n.update({"prompts": 16, "pool": 16})
    for name in betas:
        config[name].update({"epochs": 0.5, "sample_prompts": 4})
    config.ppo.update({"iterations": 5, "batch_size": 64, "samples_every": 5, "samples_written": 16})
    for name in ("sft", "reward_model", *betas, "ppo"):
        config[name].optimizer.warmup_steps = 2
    config.evaluate.update({"policies": (*betas, "ppo"), "best_of": (4,)})
    config.evaluate.update({"prompts": 128, "selection_prompts": 64})


def model(*, d_model: int, n_layers: int) -> dict:
    """Section of a transformer."""
    return {
        "d_model": d_model,
        "n_layers": n_layers,
        "n_heads": 4,
        "d_ff": 4 * d_model,
        "activation": "relu",
        "param_dtype": "float32",
        "compute_dtype": "float32",
    }


def adamw(
    learning_rate: float, *, schedule: str, warmup_steps: int, weight_decay: float, epsilon: float = 1e-8
) -> dict:
    """Section of an optimiser; epsilon is 1e-5 for PPO (Huang et al. 2024), and Adam's default for the others."""
    return {
        "learning_rate": learning_rate,
        "schedule": schedule,
        "warmup_steps": warmup_steps,
        "weight_decay": weight_decay,
        "epsilon": epsilon,
        "max_grad_norm": 1.0,
        "micro_batch": config_dict.placeholder(int),
        "freeze": (),
    }


def loop(*, steps_per_call: int) -> dict:
    """Section of a training loop."""
    return {"steps_per_call": steps_per_call, "checkpoint_every": 100}
