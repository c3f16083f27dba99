"""Whole runs of our stages on a tiny checkpoint, to compare with those of TRL's trainers on the same rows.

Weights and rows are drawn by numpy, so that they are the same on every machine and need no torch.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tokenizers
from jaxtyping import PyTree

from rlhf_jax.data.batching import BatchOrder
from rlhf_jax.interop import hf
from rlhf_jax.loading.models import Policy, RewardModel
from rlhf_jax.loading.stage_models import load_stage
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.scalars import ScalarNetwork
from tests.support import checkpoints, experiments, tokenizer_files

STEPS, BATCH, MICRO_BATCH, ROWS = 50, 8, 4, 60  # four rows of each epoch are left over
OPTIMIZER = {
    "learning_rate": 1e-2,
    "schedule": "linear",
    "warmup_steps": 5,
    "weight_decay": 0.0,
    # Powers of two are exact. optax computes 1 - b2 ** step in float32 and torch in float64: with b2 = 0.999, which
    # float32 rounds, our updates are 6e-6 smaller than torch's, ten times the difference that the runs have now.
    "b1": 1 - 2**-3,
    "b2": 1 - 2**-4,
    "epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "micro_batch": MICRO_BATCH,
}
DECAY = 0.1
BETA = 0.2
SMOOTHING = 0.1
WEIGHTS = {"desirable_weight": 1.3, "undesirable_weight": 0.7}
VOCABULARY = 16
PAD, EOS = 0, 1
CONFIG = checkpoints.CONFIG | {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "max_position_embeddings": 32,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": EOS,
}
MOST_PROMPT, MOST_RESPONSE = 6, 8
GOLDEN = Path(__file__).parents[1] / "goldens" / "curves.json"
FIRST = 10  # steps in the golden


class Curve(NamedTuple):
    """Loss and gradient norm of each step, and the final weights by path."""

    loss: np.ndarray
    grad_norm: np.ndarray
    weights: dict[str, np.ndarray]


class World(NamedTuple):
    """The files that both sides read."""

    policy: Path
    judge: Path
    pairs: Path
    short: Path  # pairs with prompts of one token
    labelled: Path


def make_world(directory: Path) -> World:
    """Write a language model, a reward model, and the rows."""
    shape = checkpoints.shape(CONFIG)
    policy, judge = directory / "policy", directory / "judge"
    of_policy = PolicyNetwork(shape, VOCABULARY, ()).init
    hf.save_pretrained(policy, "policy", _drawn(of_policy, 0), CONFIG)
    of_judge = ScalarNetwork(shape, VOCABULARY, "last", bias=False).init
    hf.save_pretrained(judge, "reward", _drawn(of_judge, 1), CONFIG | checkpoints.REWARD | {"pad_token_id": PAD})
    for place in (policy, judge):
        tokenizer_files.save(place, _tokenizer(), pad_token="<pad>", eos_token="<eos>")
    rng = np.random.default_rng(0)
    tables = {"pairs": _pairs(rng, MOST_PROMPT), "short": _pairs(rng, 1), "labelled": _labelled(rng)}
    for name, rows in tables.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return World(policy, judge, *(directory / f"{name}.jsonl" for name in tables))


def order(seed: int = 0) -> np.ndarray:
    """The rows that our stages take at each step: int[STEPS, BATCH]."""
    batches = BatchOrder(ROWS, BATCH, seed)
    return np.stack([batches[step] for step in range(STEPS)])


def run(name: str, world: World, directory: Path) -> Curve:
    """Run the stage that `section` describes."""
    place = experiments.run(directory, data_of(name, world), {name: section(name, world)}).find(name)
    return read_metrics(place, STEPS, weights_of(load_stage(place, seed=0)))


def read_metrics(place: Path, steps: int, weights: dict[str, np.ndarray]) -> Curve:
    """Read the curve of a run from its stage's directory."""
    rows = experiments.rows(place / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    loss, grad_norm = (np.array([row[key] for row in rows]) for key in ("loss", "grad_norm"))
    return Curve(loss, grad_norm, weights)


def data_of(name: str, world: World) -> Path:
    """The file of a run's rows.

    ORPO gets prompts of one token: TRL's also learns to predict the prompt, ours only the response, and the first token
    of a sequence is never predicted.
    """
    return {"kto": world.labelled, "orpo": world.short}.get(name, world.pairs)


def section(name: str, world: World) -> dict[str, Any]:
    """A stage's config."""
    common = {
        "optimizer": OPTIMIZER,
        "batch_size": BATCH,
        "epochs": STEPS * BATCH / ROWS,
        "eval_every": STEPS,
        "pack": False,  # rows as TRL has them: packed ones are summed in another order
        "loop": {"steps_per_call": 10, "checkpoint_every": STEPS},
    }
    policy = {"policy": str(world.policy), "preferences": None, "beta": BETA, "sample_prompts": 0}
    sft = {"kind": "sft", "tokenizer": None, "model": {"init": str(world.policy)}, "sample_prompts": 0}
    return (
        common
        | {
            "sft": sft,
            "sft_decayed": sft | {"optimizer": OPTIMIZER | {"weight_decay": DECAY}},
            "reward": {
                "kind": "reward_model",
                "policy": None,
                "preferences": None,
                "model": {"init": str(world.judge)},
                "pooling": "last",
            },
            "dpo": {"kind": "dpo", **policy},
            "ipo": {"kind": "dpo", "loss": {"losses": ("ipo",)}, **policy},
            "cdpo": {"kind": "dpo", "loss": {"losses": ("cdpo",), "label_smoothing": SMOOTHING}, **policy},
            "orpo": {"kind": "dpo", "loss": {"losses": ("orpo",)}, **policy},
            "kto": {"kind": "kto", "loss": WEIGHTS, **policy},
        }[name]
    )


SECTIONS = ("sft", "sft_decayed", "reward", "dpo", "ipo", "cdpo", "kto", "orpo")


def weights_of(model: Policy | RewardModel) -> dict[str, np.ndarray]:
    """A model's parameters by path."""
    return paths(model.params)


def paths(params: PyTree) -> dict[str, np.ndarray]:
    """Leaves of a tree by path."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def _drawn(init: Any, seed: int) -> Any:
    """Random parameters whose predictions are far from uniform and whose norms' scales are not all 1."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        norm = "norm" in jax.tree_util.keystr(path)
        return (norm + (0.1 if norm else 0.4) * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(init, jax.random.key(0)))


def _tokenizer() -> tokenizers.Tokenizer:
    vocabulary = {"<pad>": PAD, "<eos>": EOS} | {f"w{i}": i for i in range(2, VOCABULARY)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return backend


def _words(rng: np.random.Generator, least: int, most: int) -> str:
    return " ".join(f"w{i}" for i in rng.integers(2, VOCABULARY, rng.integers(least, most + 1)))


def _pairs(rng: np.random.Generator, prompt: int) -> list[dict[str, Any]]:
    # One word less than there is room for: EOS follows.
    sides = ("chosen", "rejected")
    return [
        {"prompt": _words(rng, 1, prompt)} | {side: " " + _words(rng, 1, MOST_RESPONSE - 1) for side in sides}
        for _ in range(ROWS)
    ]


def _labelled(rng: np.random.Generator) -> list[dict[str, Any]]:
    # No prompt twice: KTO's reference point takes the response of the row before in TRL, and in ours only where that is
    # a response to another prompt.
    prompts: dict[str, None] = {}
    while len(prompts) < ROWS:
        prompts[_words(rng, 2, MOST_PROMPT)] = None
    return [
        {
            "prompt": prompt,
            "completion": " " + _words(rng, 1, MOST_RESPONSE - 1),
            "label": bool(rng.integers(2)),
        }
        for prompt in prompts
    ]
