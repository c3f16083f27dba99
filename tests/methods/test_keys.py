"""Random keys: no key is drawn from twice, and none that is drawn from is the parent of another."""

import json
import traceback
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.extend.random import define_prng_impl

from tests.support import experiments

ROWS = 8
LOOP = {"steps_per_call": 2, "checkpoint_every": 100}
LORA = {"rank": 2, "alpha": 4.0, "targets": ("attention/[qv]", "up"), "dropout": 0.5}
TRAINED = {
    "optimizer": experiments.OPTIMIZER,
    "batch_size": 4,
    "epochs": 1.0,
    "eval_every": 100,
    "pack": False,  # a packed row without a sequence draws the mask of another one in vain
    "loop": LOOP,
}
ONLINE = {
    "policy": "sft",
    "reward_model": "rm",
    "iterations": 2,
    "batch_size": 4,
    "minibatches": 2,
    "epochs": 2,
    "temperature": 1.0,
    "optimizer": experiments.OPTIMIZER,
    "samples_every": 1,
    "samples_written": 1,
    "loop": LOOP,
}


def stages(model: str) -> dict[str, dict[str, Any]]:
    """An experiment of all kinds of stages that draw random numbers, with adapters and dropout where they can be."""
    return {
        "sft": {
            "kind": "sft",
            "tokenizer": None,
            "model": {"init": model, "lora": LORA},
            "sample_prompts": 4,
            **TRAINED,
        },
        "rm": {
            "kind": "reward_model",
            "policy": None,
            "preferences": None,
            "model": {"init": model, "lora": LORA},
            "pooling": "last",
            "ensemble": {"members": 2, "combine": "mean"},
            "normalise": {"policy": "sft", "prompts": 4},
            **TRAINED,
        },
        "preferences": {
            "kind": "preferences",
            "policy": "sft",
            "judge": None,
            "reward_model": "rm",
            "prompts": 6,
            "eval_prompts": 2,
            "samples_per_prompt": 3,
            "label_beta": 2.0,
        },
        "best_of_n": {
            "kind": "best_of_n",
            "policy": "sft",
            "reward_model": "rm",
            "judge": None,
            "prompts": 4,
            "pool": 4,
            "temperature": 1.0,
            "soft": (1.0,),
        },
        "pool": {
            "kind": "pool",
            "policy": "sft",
            "reward_models": ("rm",),
            "judge": None,
            "prompts": 4,
            "samples": 3,
            "temperature": 1.0,
        },
        "noisy_labels": {"kind": "noisy_labels", "preferences": "preferences", "pairs": 8, "flipped": 0.5},
        "rejection_sampling": {
            "kind": "rejection_sampling",
            "policy": "sft",
            "reward_model": "rm",
            "prompts": 6,
            "eval_prompts": 2,
            "samples_per_prompt": 2,
            "temperature": 1.0,
            "keep": {"soft_temperature": 1.0},
        },
        "dpo": {
            "kind": "dpo",
            "policy": "sft",
            "preferences": "preferences",
            "beta": 0.1,
            "sample_prompts": 4,
            "tuning": {"lora": LORA},
            **TRAINED,
        },
        "kto": {
            "kind": "kto",
            "policy": "sft",
            "preferences": "preferences",
            "beta": 0.1,
            "sample_prompts": 4,
            "tuning": {"lora": LORA},
            **TRAINED,
        },
        "online_dpo": {"kind": "online_dpo", "beta": 0.1, "tuning": {"lora": LORA}, **ONLINE},
        "ppo": {
            "kind": "ppo",
            "kl_coef": 0.1,
            "gamma": 1.0,
            "gae_lambda": 0.95,
            "clip_ratio": 0.2,
            "value_clip": 0.2,
            "vf_coef": 0.1,
            "value_trunk": "policy",
            "value_head": "normal",
            "ptx": {"coef": 1.0, "batch_size": 4},
            "tuning": {"lora": LORA | {"dropout": 0.0}},
            **ONLINE,
        },
        "dapo": {
            "kind": "group_rl",
            "method": "dapo",
            "num_generations": 2,
            "dynamic_sampling_rounds": 2,
            **ONLINE,
        },
        "evaluate": {
            "kind": "evaluate",
            "reference": "sft",
            "policies": ("dpo", "kto"),
            "best_of": (2,),
            "reward_model": "rm",
            "judge": None,
            "prompts": 4,
            "selection_prompts": 4,
            "temperature": 1.0,
        },
        "frontier": {
            "kind": "frontier",
            "reference": "sft",
            "policies": ("dpo", "kto"),
            "judge": "rm",
            "prompts": 4,
            "temperature": 1.0,
            "kl_targets": (0.1,),
        },
    }


class Record:
    """Keys as a run uses them, by their data, and where in the package."""

    def __init__(self) -> None:
        self.drawn: dict[tuple[int, ...], list[str]] = defaultdict(list)
        self.split: dict[tuple[int, ...], list[str]] = defaultdict(list)
        self.folded: dict[tuple[int, ...], list[str]] = defaultdict(list)

    def faults(self) -> dict[str, Counter[str]]:
        """Count keys that are used in two ways, by the places of their use."""
        parents = {**self.split, **self.folded}
        return {
            "drawn from more than once": Counter(
                " and ".join(sorted(places)) for places in self.drawn.values() if len(places) > 1
            ),
            "drawn from, and parents of other keys": Counter(
                f"{self.drawn[key][0]} and {parents[key][0]}" for key in self.drawn.keys() & parents.keys()
            ),
            "split as well as folded, which gives the same keys": Counter(
                f"{self.split[key][0]} and {self.folded[key][0]}" for key in self.split.keys() & self.folded.keys()
            ),
        }


def place() -> str:
    """The innermost line of the package that is being run."""
    frames = [frame for frame in traceback.extract_stack() if "/rlhf_jax/" in frame.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "elsewhere"


def recording(record: Record) -> Any:
    """JAX's default generator, telling `record` of every key that numbers or other keys are made from."""

    def note(noted: dict[tuple[int, ...], list[str]], key: jax.Array) -> None:
        here = place()
        jax.debug.callback(lambda data: noted[tuple(np.asarray(data).tolist())].append(here), key)

    def typed(key: jax.Array) -> jax.Array:
        return jax.random.wrap_key_data(key, impl="threefry2x32")

    def split(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        note(record.split, key)
        return jax.random.key_data(jax.random.split(typed(key), shape))

    def fold_in(key: jax.Array, data: int) -> jax.Array:
        note(record.folded, key)
        return jax.random.key_data(jax.random.fold_in(typed(key), data))

    def random_bits(key: jax.Array, bits: int, shape: tuple[int, ...]) -> jax.Array:
        note(record.drawn, key)
        return jax.random.bits(typed(key), shape, f"uint{bits}")

    def seed(number: jax.Array) -> jax.Array:
        return jax.random.key_data(jax.random.key(number, impl="threefry2x32"))

    return define_prng_impl(
        key_shape=(2,), seed=seed, split=split, random_bits=random_bits, fold_in=fold_in, name="recording", tag="rec"
    )


@pytest.fixture
def record(monkeypatch):
    """List the uses of every key that the run derives from a seed."""
    record = Record()
    implementation, original, rng = recording(record), jax.random.key, np.random.default_rng

    def key(seed: Any, *, impl: Any = None) -> jax.Array:
        return original(seed, impl=impl or implementation)

    def default_rng(seed: Any) -> np.random.Generator:
        if isinstance(seed, np.ndarray):
            record.drawn[tuple(seed.tolist())].append(place())
        return rng(seed)

    monkeypatch.setattr(jax.random, "key", key)
    monkeypatch.setattr(np.random, "default_rng", default_rng)
    return record


def pairs(path: Path) -> Path:
    rng = np.random.default_rng(0)
    texts = [[" ".join(rng.choice(experiments.WORDS, 3)) for _ in range(3)] for _ in range(ROWS)]
    rows = [{"prompt": a, "chosen": f" {b}", "rejected": f" {c}"} for a, b, c in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.nightly
def test_no_key_is_used_twice(tmp_path, record):
    model, _ = experiments.models(tmp_path)
    one_by_one = experiments.RUNTIME | {"inference_batch": 1}  # rows that fill up a batch are drawn in vain
    experiments.run(tmp_path / "run", pairs(tmp_path / "pairs.jsonl"), stages(model), runtime=one_by_one)
    jax.effects_barrier()
    assert len(record.drawn) > 500
    for fault, places in record.faults().items():
        assert not places, f"{places.total()} keys are {fault}: {dict(places.most_common(5))}"
