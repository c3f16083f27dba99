"""Positive movie reviews: SmolLM2-135M fine-tuned for sentiment, after Rafailov et al. 2023, section 6.1.

    rlhf-jax --config=sentiment --workdir=runs/imdb

Paper: Direct Preference Optimization (arXiv:2305.18290), figure 2, left: reward against KL from the reference on IMDb
(Maas et al. 2011), where prompts are the first 2 to 8 tokens of a review. The paper's base model is GPT-2-large and its
gold judge a sentiment classifier, with 4 samples per prefix and their 6 pairs; DPO's beta is .05 to 5, PPO's target KL
3 to 12. Here the base model is SmolLM2-135M-Instruct (4 bits, fetched from a package index), responses have
48 tokens, the gold judge is a logistic classifier on TF-IDF features fitted to the labels of the training split, and
labels of pairs are sampled from a Bradley-Terry model of its log-odds.

Data: TFDS's imdb_reviews, prepared once with
`tfds.builder("imdb_reviews", file_format="array_record").download_and_prepare()`, or any file with the columns `text`
and `label`: `--config.data.train=FILE --config.data.eval=FILE`. If the file has `stars`, a regression on them is a more
precise judge: `--config=sentiment:stars`.

Criterion: DPO (with beta selected on the evaluation split), PPO and Best-of-16 each beat SFT in gold score by more
than four standard errors, and PPO's KL stays below 15 nats.

Cost and result: it has not been run in full. The smoke variant (`:smoke`, a tiny random model of the same family on
synthetic sentences, in seconds) only tests that everything works.
"""

from pathlib import Path

from ml_collections import ConfigDict, config_dict

SMOKE_DATA = Path(__file__).absolute().parents[1] / "smoke"
DPO_BETAS = {"dpo_1": 1.0, "dpo_01": 0.1, "dpo_005": 0.05}
JUDGES = {
    "label": {"inverse_penalty": 10.0, "min_df": 5},
    "stars": {"alpha": 1.0, "min_df": 5},
}


def get_config(arg: str = "") -> ConfigDict:
    """Build the experiment; `stars` fits the judge to stars, `smoke` is the smoke variant; separate both by a comma."""
    options = set(filter(None, arg.split(",")))
    if unknown := options - {"stars", "smoke"}:
        raise ValueError(f"sentiment.py takes stars and smoke, not {', '.join(sorted(unknown))}")
    config = ConfigDict()
    config.seed = 0
    config.seeds = 1
    config.stages = ("gold", "sft", "preferences", "reward_model", "best_of_n", *DPO_BETAS, "ppo", "evaluate")
    config.data = ConfigDict(
        {
            "train": "tfds:imdb_reviews/train",
            "eval": "tfds:imdb_reviews/test[:2000]",
            "test": "tfds:imdb_reviews/test[2000:]",
            "limit": config_dict.placeholder(int),
            "text_prompt_tokens": (2, 8),
            "max_prompt_tokens": 9,
            "max_response_tokens": 48,
            "loss_on": "completion",
        }
    )
    config.runtime = ConfigDict(
        {
            "strategy": "jit",
            "data": 1,
            "fsdp": 1,
            "tensor": 1,
            "inference_batch": 256,
            "deterministic": True,
            "compile_quickly": False,
        }
    )
    rating = "stars" if "stars" in options else "label"
    config.gold = ConfigDict({"kind": "gold", "model": JUDGES[rating], "rating": rating})
    config.sft = ConfigDict(
        {
            "kind": "sft",
            "tokenizer": None,
            "model": {"init": "smollm2", "param_dtype": "float32", "compute_dtype": "bfloat16", "remat": False},
            "optimizer": adamw(1e-4, schedule="cosine"),
            "batch_size": 64,
            "epochs": 1.0,
            "sample_prompts": 8,
            "eval_every": 100,
            "loop": loop(),
        }
    )
    config.preferences = ConfigDict(
        {
            "kind": "preferences",
            "policy": "sft",
            "judge": "gold",
            "prompts": 5000,
            "eval_prompts": 250,
            "samples_per_prompt": 4,
            "label_beta": 2.0,
        }
    )
    config.reward_model = ConfigDict(
        {
            "kind": "reward_model",
            "policy": config_dict.placeholder(str),
            "preferences": "preferences",
            "model": {"init": "sft"},
            "pooling": "last",
            "optimizer": adamw(2e-5, schedule="cosine"),
            "batch_size": 64,
            "epochs": 1.0,
            "eval_every": 100,
            "loop": loop(),
        }
    )
    config.best_of_n = ConfigDict(
        {
            "kind": "best_of_n",
            "policy": "sft",
            "reward_model": "reward_model",
            "judge": "gold",
            "prompts": 128,
            "pool": 256,
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
                "optimizer": adamw(1e-5, schedule="linear"),
                "batch_size": 64,
                "epochs": 1.0,
                "sample_prompts": 8,
                "eval_every": 100,
                "loop": loop(),
            }
        )
    config.ppo = ConfigDict(
        {
            "kind": "ppo",
            "policy": "sft",
            "reward_model": "reward_model",
            "iterations": 200,
            "batch_size": 128,
            "minibatches": 2,
            "epochs": 2,
            "temperature": 1.0,
            "kl_coef": 0.05,
            "missing_eos_penalty": 0.0,
            "gamma": 1.0,
            "gae_lambda": 0.95,
            "clip_ratio": 0.2,
            "value_clip": 0.2,
            "vf_coef": 0.1,
            "optimizer": adamw(1e-5, schedule="linear", epsilon=1e-5),
            "samples_every": 20,
            "samples_written": 32,
            "loop": loop(),
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
    if "smoke" in options:
        make_smaller(config)
    return config.lock()


def make_smaller(config: ConfigDict) -> None:
    """Apply the smoke variant: a tiny model of the same family with its own tokenizer, one beta, few rows and steps."""
    for name in ("dpo_1", "dpo_005"):
        del config[name]
    config.stages = ("gold", "sft", "preferences", "reward_model", "best_of_n", "dpo_01", "ppo", "evaluate")
    config.data.update({"limit": 200, "max_response_tokens": 12})
    for split in ("train", "eval", "test"):
        config.data[split] = str(SMOKE_DATA / f"reviews_{split}.jsonl")
    config.runtime.update({"inference_batch": 64, "compile_quickly": True})
    config.gold.model.min_df = 1
    config.sft.tokenizer = ConfigDict({"kind": "byte_bpe", "vocab_size": 320})
    config.sft.model = ConfigDict(
        {
            "d_model": 24,
            "n_layers": 2,
            "n_heads": 3,
            "n_kv_heads": 1,
            "d_ff": 64,
            "activation": "silu",
            "gated": True,
            "norm_epsilon": 1e-5,
            "rope": {"theta": 100_000.0},
            "param_dtype": "float32",
            "compute_dtype": "bfloat16",
        }
    )
    for name in ("sft", "reward_model", "dpo_01"):
        config[name].update({"batch_size": 16, "epochs": 1.0})
    config.preferences.update({"prompts": 40, "eval_prompts": 8})
    config.best_of_n.update({"prompts": 8, "pool": 8})
    config.ppo.update({"iterations": 10, "batch_size": 16, "samples_written": 8})
    config.evaluate.update({"policies": ("dpo_01", "ppo"), "best_of": (4,), "prompts": 32, "selection_prompts": 16})


def adamw(learning_rate: float, *, schedule: str, epsilon: float = 1e-8) -> dict:
    """Section of an optimiser; epsilon is 1e-5 for PPO (Huang et al. 2024), and Adam's default for the others."""
    return {
        "learning_rate": learning_rate,
        "schedule": schedule,
        "warmup_steps": 20,
        "weight_decay": 0.0,
        "epsilon": epsilon,
        "max_grad_norm": 1.0,
        "micro_batch": config_dict.placeholder(int),
        "freeze": (),
    }


def loop() -> dict:
    """Section of a training loop."""
    return {"steps_per_call": 5, "checkpoint_every": 50}
