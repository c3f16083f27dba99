"""Kill a run with SIGKILL, start the same command again: nothing shows that anything had happened."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.support import experiments, resumed
from tests.support.interrupted import Process

STAGES = ("sft", "reward_model", "dpo", "ppo", "dapo")
ONE = ("sft",)
KILLS = {
    ONE: (("sft", "save"),),
    STAGES: (
        ("sft", "step"),
        ("sft", "save"),
        ("reward_model", "step"),
        ("dpo", "save"),
        ("ppo", "step"),
        ("ppo", "save"),
        ("dapo", "save"),
    ),
}
"""Stages that are killed in a step or while they save: SFT in the quick tier, all of them every night."""


def arguments(workdir: Path, data: Path, stages: tuple[str, ...]) -> list[str]:
    flags = [f"--config={resumed.__file__}", f"--workdir={workdir}"]
    flags += [f"--config.data.{split}={data}" for split in ("train", "eval")]
    flags += [f"--config.{stage}.loop.checkpoint_every=2" for stage in STAGES]
    flags += [f"--config.{stage}.epochs=2.0" for stage in ("sft", "reward_model", "dpo")]
    flags += [f"--config.{stage}.iterations=8" for stage in ("ppo", "dapo")]
    return [*flags, f"--config.stages={stages}"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """64 pairs over a handful of words."""
    rng = np.random.default_rng(0)
    words = ["the", "film", "is", "good", "bad", "dull", "bright", "and", "never", "slow"]
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    with path.open("w") as file:
        for _ in range(64):
            prompt, chosen, rejected = (" ".join(rng.choice(words, rng.integers(2, 6))) for _ in range(3))
            file.write(json.dumps({"prompt": prompt, "chosen": f" {chosen}.", "rejected": f" {rejected}!"}) + "\n")
    return path


@pytest.fixture(scope="module", params=[ONE, pytest.param(STAGES, marks=pytest.mark.nightly)], ids=["one", "all"])
def runs(request, tmp_path_factory, data) -> tuple[tuple[str, ...], Path, Path]:
    """Stages, a run of them that nobody disturbed, and one that was killed in every stage."""
    stages = request.param
    directory = tmp_path_factory.mktemp("resume")
    whole, disturbed = directory / "whole", directory / "disturbed"
    cache = directory / "cache-all-never"
    Process(directory, cache, "all", "never", arguments(whole, data, stages)).finish()
    for stage, place in KILLS[stages]:
        Process(directory, cache, stage, place, arguments(disturbed, data, stages)).kill_at_marker()
        assert not (disturbed / stage / "complete.json").exists()
        with (disturbed / stage / "metrics.jsonl").open("a") as file:  # a kill within a write leaves part of a call
            file.write('{"step": 7, "seed": 0}\n{"step": 8, "se')
    Process(directory, cache, "none", "never", arguments(disturbed, data, stages)).finish()
    return stages, whole, disturbed


def test_parameters_and_optimiser_are_the_same_bits(runs):
    stages, *workdirs = runs
    for stage in stages:
        whole, disturbed = (experiments.final_state(workdir / stage) for workdir in workdirs)
        assert whole[0] == 8
        experiments.assert_same_bits(whole, disturbed)


def test_metrics_and_samples_are_the_same_bytes(runs):
    stages, *workdirs = runs
    for stage in stages:
        whole, disturbed = (experiments.without_clock(workdir / stage / "metrics.jsonl") for workdir in workdirs)
        assert [row["step"] for row in whole] == list(range(1, 9))
        assert whole == disturbed
        samples = [(workdir / stage / "samples.jsonl").read_bytes() for workdir in workdirs]
        assert samples[0] == samples[1] != b""


def test_summaries_are_equal_but_for_the_clock(runs):
    stages, *workdirs = runs
    for stage in stages:
        whole, disturbed = (json.loads((workdir / stage / "summary.json").read_text()) for workdir in workdirs)
        assert {key: value for key, value in whole.items() if not key.startswith("time/")} == {
            key: value for key, value in disturbed.items() if not key.startswith("time/")
        }
