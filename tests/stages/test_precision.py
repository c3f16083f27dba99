"""Checkpoints in bfloat16 are tuned as float32 ones are; what is lost to rounding is measured, and said."""

import dataclasses
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import config as configs
from rlhf_jax.interop import hf
from rlhf_jax.loading.models import Tuning
from rlhf_jax.loading.pretrained import load_checkpoint
from rlhf_jax.loading.trainable import init_trainable, trainable
from rlhf_jax.models.lora import LoraConfig
from rlhf_jax.stages import dpo, kto, sft
from rlhf_jax.stages.reward_model import RewardModelConfig
from rlhf_jax.types import RlhfError, TokenBatch
from tests.support import experiments, tiny


class Done(NamedTuple):
    stage: Path
    console: str
    assert_resumes: Callable[[], None]


RATE = 1e-6  # of Adam: near 0.02, numbers in bfloat16 are 1.2e-4 apart


COMMON: dict[Any, dict[str, Any]] = {
    sft.SFTConfig: {"sample_prompts": 2},
    RewardModelConfig: {"preferences": None, "pooling": "last"},
    dpo.DPOConfig: {"preferences": None, "beta": 0.1, "sample_prompts": 2},
    kto.KTOConfig: {"preferences": None, "beta": 0.1, "sample_prompts": 2},
}
for _fields in COMMON.values():
    _fields |= {
        "optimizer": experiments.OPTIMIZER,
        "batch_size": 16,
        "epochs": 1.0,
        "eval_every": 1,
        "loop": experiments.LOOP,
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """SFT of the same weights from a file in float32 and from one in bfloat16, each once."""
    directory = tmp_path_factory.mktemp("precision")
    wide = Path(experiments.models(directory)[0])
    found = hf.load_pretrained(str(wide))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), found.params)
    places = {"float32": half_file(directory, wide, half, jnp.float32), "bfloat16": half_file(directory, wide, half)}
    data = directory / "rows.jsonl"
    rng = np.random.default_rng(0)
    with data.open("w") as file:
        for _ in range(48):
            prompt, answer = (" ".join(rng.choice(experiments.WORDS, 3)) for _ in range(2))
            row = {"prompt": prompt, "chosen": answer, "rejected": "dull"}
            file.write(
                json.dumps(
                    {k: [{"role": "assistant" if k != "prompt" else "user", "content": v}] for k, v in row.items()}
                )
                + "\n"
            )
    done: dict[Any, Any] = {}

    def run(source: str, model: dict[str, Any] | None = None, **optimizer: Any):
        key = json.dumps([source, model, optimizer])
        if key not in done:
            section = {
                "kind": "sft",
                "tokenizer": None,
                "model": {"init": str(places[source])} | (model or {}),
                "optimizer": experiments.OPTIMIZER | {"learning_rate": RATE, "epsilon": 1e-8} | optimizer,
                "batch_size": 16,
                "epochs": 8.0,
                "sample_prompts": 2,
                "eval_every": 100,
                "loop": experiments.LOOP | {"checkpoint_every": 12},
            }
            console, number = io.StringIO(), str(len(done))
            stage = experiments.run(directory / number, data, {"sft": section}, console=console).find("sft")
            done[key] = Done(
                stage, console.getvalue(), lambda: experiments.assert_resumes(stage.parent, data, {"sft": section})
            )
        return done[key]

    return half, run


def half_file(directory: Path, like: Path, params: Any, dtype: Any = jnp.bfloat16) -> Path:
    """A checkpoint of these weights, with the tokenizer of another."""
    place = directory / jnp.dtype(dtype).name
    hf.save_pretrained(place, "policy", jax.tree.map(lambda leaf: leaf.astype(dtype), params), hf.read_config(like))
    for file in like.iterdir():
        if not (place / file.name).exists():
            (place / file.name).write_bytes(file.read_bytes())
    return place


def movement(start: Any, stage: Path, what: str = "policy") -> np.ndarray:
    """Return the change of a run's weights, or of its masters, in float64."""
    items = experiments.final_state(stage)[1]
    end = items["policy"] if what == "policy" else items["rest"]["opt_state"]["masters"]["policy"]
    flat = [np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in jax.tree.leaves(t)]) for t in (start, end)]
    return flat[1] - flat[0]


def metrics(stage: Path, name: str) -> np.ndarray:
    return np.array([row[name] for row in experiments.rows(stage / "metrics.jsonl")])


def apart(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


@pytest.mark.nightly
def test_a_bfloat16_checkpoint_moves_as_the_float32_one_does(runs):
    half, run = runs
    expected = movement(half, run("float32").stage)
    assert np.abs(expected).max() > 10 * RATE
    assert apart(movement(half, run("bfloat16").stage), expected) <= 0.05


@pytest.mark.nightly
def test_masters_of_bfloat16_weights_move_as_float32_weights_do(runs):
    half, run = runs
    stage, said, _ = run("bfloat16", {"param_dtype": "bfloat16"})
    items = experiments.final_state(stage)[1]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(items["policy"])} == {"bfloat16"}
    masters = items["rest"]["opt_state"]["masters"]["policy"]
    state = jax.tree.leaves(items["rest"]["opt_state"])
    assert {leaf.dtype.name for leaf in state if leaf.ndim} == {"float32"}  # moments and masters
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), masters)
    jax.tree.map(np.testing.assert_array_equal, rounded, items["policy"])
    assert apart(movement(half, stage, "masters"), movement(half, run("float32").stage)) <= 0.05
    np.testing.assert_allclose(metrics(stage, "update_survived"), 1, atol=0.02)
    assert "survived" not in said


@pytest.mark.nightly
def test_rounded_to_nearest_the_updates_are_lost_and_the_run_says_so(runs):
    half, run = runs
    stage, said, _ = run("bfloat16", {"param_dtype": "bfloat16"}, low_precision="nearest")
    assert apart(movement(half, stage), movement(half, run("float32").stage)) > 0.9
    assert metrics(stage, "update_survived").mean() < 0.1
    assert re.search(r"Warning: sft: [0-9]% of the updates survived rounding", said)
    assert said.count("survived rounding") == 1
    assert "Omit param_dtype to train in float32, or set optimizer.low_precision to 'masters'" in said


@pytest.mark.nightly
def test_rounded_stochastically_the_updates_survive_in_sum_and_a_killed_run_resumes_exactly(runs):
    """Each weight moves by noise of many updates' size, and all together by what was asked for.

    The projection on float32's movement is noisy here: 2,320 weights, each with an error whose variance is the distance
    it moves times the spacing of its numbers. The mean itself is tested on many draws in tests/runtime.
    """
    half, run = runs
    stage, said, assert_resumes = run("bfloat16", {"param_dtype": "bfloat16"}, low_precision="stochastic")
    expected, found = movement(half, run("float32").stage), movement(half, stage)
    assert 0.8 < found @ expected / (expected @ expected) < 1.2
    assert 0.7 < metrics(stage, "update_survived").mean() < 1.3
    assert "survived" not in said
    assert not jax.tree.leaves(experiments.final_state(stage)[1]["rest"]["opt_state"]["masters"])
    assert_resumes()


@pytest.mark.nightly
@pytest.mark.parametrize("network", [tiny.POLICY, tiny.REWARD], ids=["policy", "values"])
def test_what_is_trained_is_float32_unless_a_field_says_otherwise(network):
    held = dataclasses.replace(network, config=dataclasses.replace(network.config, param_dtype="bfloat16"))
    source = held.init(jax.random.key(0))
    head = source.pop("head", None)
    assert dtypes(source) == {"bfloat16"} and dtypes(head) <= {"float32"}  # a scalar head's dtype is its own
    source = source if head is None else source | {"head": head}
    for tuning, expected in ((Tuning(), "float32"), (Tuning(param_dtype="bfloat16"), "bfloat16")):
        trained = trainable(held, tuning)
        assert trained.config.param_dtype == expected
        start = init_trainable(trained, source, jax.random.key(0))
        assert start.base is None and dtypes(start.trained) - dtypes(head) <= {expected}
        assert start.trained.get("body", start.trained)["embedding"].dtype == expected
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(a.dtype)), start.trained, source)
    adapted = trainable(held, Tuning(lora=LoraConfig(2, 4.0, ("attention/[qv]",))))
    start = init_trainable(adapted, source, jax.random.key(0))
    assert start.base is source and dtypes(start.trained) == {"float32"}


def dtypes(tree: Any) -> set[str]:
    return {leaf.dtype.name for leaf in jax.tree.leaves(tree)}


@pytest.mark.nightly
def test_float16_is_refused_for_what_is_trained_and_serves_inference(runs, tmp_path):
    message = "dtype = 'float16' is for inference only"
    lora = {"rank": 2, "alpha": 4.0, "targets": ("up",)}
    for held in ({"param_dtype": "float16"}, {"compute_dtype": "float16"}, {"compute_dtype": "float16", "lora": lora}):
        for kind, section in (
            (sft.SFTConfig, {"kind": "sft", "tokenizer": None, "model": {"init": "model"} | held}),
            (RewardModelConfig, {"kind": "reward_model", "policy": None, "model": {"init": "model"} | held}),
            (dpo.DPOConfig, {"kind": "dpo", "policy": "model", "tuning": held}),
            (kto.KTOConfig, {"kind": "kto", "policy": "model", "tuning": held}),
        ):
            with pytest.raises(RlhfError, match=message):
                configs.build(kind, COMMON[kind] | section, "config.stage")
    with pytest.raises(ValueError, match=message):
        tiny.with_config(tuning=Tuning(param_dtype="float16"))
    tiny.with_config(tuning=Tuning(param_dtype="float16", lora=LoraConfig(2, 4.0, ("up",))))
    low = dataclasses.replace(tiny.MODEL, compute_dtype="float16")
    with pytest.raises(RlhfError, match=f"compute_{message}.*set it to 'bfloat16' or 'float32'"):
        trainable(dataclasses.replace(tiny.POLICY, config=low), Tuning())  # an earlier stage's
    place = half_file(tmp_path, runs[1]("float32").stage.parents[1] / "model", runs[0], jnp.float16)
    found: Any = load_checkpoint(str(place), Tuning(param_dtype="float16", compute_dtype="float16"))
    tokens, mask = jnp.full((1, 4), 5, jnp.int32), jnp.ones((1, 4), bool)
    stats = found.network.sequence_stats(found.params, TokenBatch(tokens, mask, mask))
    assert dtypes(found.params) == {"float16"} and np.isfinite(stats.logprobs).all()
