"""Stages on packed rows: the same numbers as on padded ones, on several devices and seeds, and exact resume."""

import io
import json

import numpy as np
import pytest

from rlhf_jax.loading import trainable
from rlhf_jax.methods import offline
from rlhf_jax.runtime import progress
from rlhf_jax.types import RlhfError
from tests.support import experiments

LOOP = {"steps_per_call": 2, "checkpoint_every": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return experiments.models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Pairs of chats, of which few are long."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "pairs.jsonl"

    def say(role):
        count = 1 + int(rng.exponential(1.5))
        return [{"role": role, "content": " ".join(rng.choice(experiments.WORDS, min(count, 6)))}]

    rows = [{"prompt": say("user"), "chosen": say("assistant"), "rejected": say("assistant")} for _ in range(40)]
    rows = [row for row in rows if row["chosen"] != row["rejected"]][:32]  # equal ones differ by rounding
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def dpo(model, **changes):
    return experiments.dpo_section(model, **{"loop": LOOP, "batch_size": 16, "epochs": 2.0, "eval_every": 4, **changes})


def metrics(place, name):
    return [
        {key: value for key, value in row.items() if not key.startswith("time/")}
        for row in experiments.rows(place.root / name / "metrics.jsonl")
    ]


def assert_same(packed, padded):
    assert len(packed) == len(padded) > 0
    for row, other in zip(packed, padded, strict=True):
        assert row.pop("token_share") > 1.15 * other.pop("token_share")
        for name, value in other.items():
            np.testing.assert_allclose(row[name], value, rtol=2e-4, atol=2e-5, err_msg=name)


@pytest.fixture(scope="module")
def padded(models, pairs, tmp_path_factory):
    place = tmp_path_factory.mktemp("padded")
    return metrics(experiments.run(place, pairs, {"dpo": dpo(models[0], pack=False)}), "dpo")


def test_a_warm_up_that_lasts_for_all_updates_is_a_warning(models, pairs, tmp_path, monkeypatch):
    def stop(*arguments):
        raise RlhfError("stopped before training")

    monkeypatch.setattr(offline, "train", stop)
    for warmup, warned in ((0, False), (1000, True)):
        optimizer, console = {**experiments.OPTIMIZER, "warmup_steps": warmup}, io.StringIO()
        stages = {"dpo": dpo(models[0], optimizer=optimizer)}
        with pytest.raises(RlhfError, match="stopped before training"):
            experiments.run(tmp_path / str(warmup), pairs, stages, console=console)
        printed = " ".join(console.getvalue().split())
        assert ("Warning: dpo: the learning rate still rises at the last update" in printed) == warned


def test_packed_rows_give_the_same_numbers_and_resume_exactly(models, pairs, padded, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "SLOW", 0.0)
    monkeypatch.setattr(trainable, "DEEP", 1)
    console, stages = io.StringIO(), {"dpo": dpo(models[0])}
    place = experiments.run(tmp_path / "run", pairs, stages, console=console)
    printed = " ".join(console.getvalue().split())
    assert "sequences packed into rows of" in printed
    assert printed.count("dpo: the first call takes more than a minute, as it compiles 1 layers one by one") == 1
    assert_same(metrics(place, "dpo"), [dict(row) for row in padded])
    experiments.assert_resumes(place.root, pairs, stages)


@pytest.mark.nightly
@pytest.mark.parametrize("strategy", ["jit", pytest.param("pmap", marks=pytest.mark.nightly)])
def test_devices_and_micro_batches_hold_whole_groups(strategy, models, pairs, padded, tmp_path):
    optimizer = {**experiments.OPTIMIZER, "micro_batch": 8}
    runtime = {**experiments.RUNTIME, "strategy": strategy, "data": 2}
    stages = {"dpo": dpo(models[0], optimizer=optimizer)}
    place = experiments.run(tmp_path, pairs, stages, runtime=runtime)
    assert_same(metrics(place, "dpo"), [dict(row) for row in padded])


@pytest.mark.nightly
def test_seeds_trained_at_once_share_the_size_of_the_packing(models, pairs, padded, tmp_path):
    place = experiments.run(tmp_path, pairs, {"dpo": dpo(models[0])}, seeds=2)
    rows = metrics(place, "dpo")
    first = [row for row in rows if row.get("seed", 0) == 0]
    for row, other in zip(first, padded, strict=True):
        np.testing.assert_allclose(row["loss"], other["loss"], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "devices", "message"),
    [
        ({"batch_size": 15}, 2, "a batch of 15 rows does not divide over 2 devices"),
        ({"optimizer": {**experiments.OPTIMIZER, "micro_batch": 32}}, 1, "16 rows does not divide into slices"),
        ({"optimizer": {**experiments.OPTIMIZER, "micro_batch": 6}}, 1, "16 rows does not divide into slices"),
    ],
)
def test_rows_that_do_not_divide_are_an_error(changes, devices, message, models, pairs, tmp_path):
    with pytest.raises(RlhfError, match=message):
        runtime = {**experiments.RUNTIME, "data": devices}
        experiments.run(tmp_path, pairs, {"dpo": dpo(models[0], **changes)}, runtime=runtime)
