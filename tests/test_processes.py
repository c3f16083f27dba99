"""Two and four processes, started on this machine, do what one does with as many devices."""

import re
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from rlhf_jax import processes
from rlhf_jax.main import main
from rlhf_jax.runtime.files import read_json
from tests.support import experiments
from tests.support.own_data import PREFERENCES, files
from tests.support.together import Together

TRAINED = ("sft", "reward_model", "dpo", "ppo", "host_ppo")
STAGES = (*TRAINED, "preferences", "best_of_n", "evaluate")
"""Every kind of stage that needs an exchange between processes."""


def run(directory: Path, count: int, stages: tuple[str, ...], *flags: str) -> Path:
    directory.mkdir()
    return Together(directory, count, stages, *flags).finish()


def assert_close(one: dict, other: dict, tolerance: float = 2e-4) -> None:
    """Numbers agree up to the order of sums, and everything else is equal."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, float) and not name.startswith("time/"):
            np.testing.assert_allclose(other[name], value, rtol=tolerance, atol=tolerance, err_msg=name)


def assert_trained_alike(one: Path, other: Path, stage: str) -> None:
    rows, others = (experiments.without_clock(run / stage / "metrics.jsonl") for run in (one, other))
    assert len(rows) == len(others) > 1
    for row, twin in zip(rows, others, strict=True):
        assert_close(row, twin)
    state, twin = (experiments.final_state(run / stage)[1] for run in (one, other))
    for leaf, copy in zip(jax.tree.leaves(state), jax.tree.leaves(twin), strict=True):
        np.testing.assert_allclose(copy, leaf, rtol=2e-3, atol=2e-5)


def assert_same_files(one: Path, other: Path, stage: str) -> None:
    for path in (one / stage).glob("*.jsonl"):
        assert experiments.without_clock(path) == experiments.without_clock(other / stage / path.name), path.name


def assert_same_run(one: Path, other: Path, stage: str) -> None:
    """Rows and states are the same bits."""
    assert_same_files(one, other, stage)
    if stage in TRAINED:
        experiments.assert_same_bits(*(experiments.final_state(run / stage) for run in (one, other)))


@pytest.mark.nightly
def test_two_processes_train_as_one_with_as_many_devices(tmp_path):
    flags = ("--config.data.limit=32",)
    stages = ("sft", "host_ppo")
    one, two = run(tmp_path / "one", 1, stages, *flags), run(tmp_path / "two", 2, stages, *flags)
    for stage in stages:
        assert_trained_alike(one, two, stage)
    calls = (tmp_path / "two" / "calls").read_text().split()
    assert set(calls) == {"0"} and len(calls) == len((tmp_path / "one" / "calls").read_text().split())
    assert read_json(two / "sft" / "environments.json")[0]["layout"]["processes"] == 2
    assert "host_ppo:" in (tmp_path / "two" / "log-0").read_text()
    assert "host_ppo" not in (tmp_path / "two" / "log-1").read_text(), "the first process alone prints"


class Runs(NamedTuple):
    """All stages by one process, and twice by several."""

    one: Path
    several: Path
    again: Path
    count: int
    flags: tuple[str, ...]


@pytest.fixture(scope="module", params=[(2, "fsdp"), (4,)], ids=["two, fsdp", "four, data"])
def runs(request, tmp_path_factory) -> Runs:
    count, *flags = request.param
    directory = tmp_path_factory.mktemp("runs")
    one = run(directory / "one", 1, STAGES, *flags)
    several, again = (run(directory / name, count, STAGES, *flags) for name in ("several", "again"))
    return Runs(one, several, again, count, tuple(flags))


@pytest.mark.nightly
@pytest.mark.parametrize("stage", TRAINED)
def test_every_stage_trains_as_in_one_process(stage, runs):
    assert_trained_alike(runs.one, runs.several, stage)


@pytest.mark.nightly
@pytest.mark.parametrize("stage", STAGES)
def test_the_same_run_twice_gives_the_same_bits(stage, runs):
    assert_same_run(runs.several, runs.again, stage)


@pytest.mark.nightly
def test_sampling_and_evaluation_are_those_of_one_process(runs):
    one, several = runs.one, runs.several
    for file in ("preferences/preferences.jsonl", "best_of_n/curve.jsonl", "evaluate/results.jsonl"):
        rows, others = experiments.rows(one / file), experiments.rows(several / file)
        assert len(rows) == len(others) > 1
        texts = [[row.get("prompt"), row.get("chosen"), row.get("method")] for row in rows]
        assert texts == [[row.get("prompt"), row.get("chosen"), row.get("method")] for row in others]
        if file.startswith("evaluate"):
            for row, twin in zip(rows, others, strict=True):
                assert_close({**row, "seconds": 0.0}, {**twin, "seconds": 0.0}, tolerance=5e-3)


@pytest.mark.nightly
def test_python_rewards_are_called_once_and_in_the_first_process(runs):
    calls = [(workdir.parent / "calls").read_text().split() for workdir in runs[:3]]
    assert {*calls[0], *calls[1]} == {"0"} and len(calls[0]) == len(calls[1]) == len(calls[2])


@pytest.mark.nightly
@pytest.mark.parametrize("stage", ["sft", "ppo", "host_ppo"])
def test_a_killed_process_changes_nothing_once_all_are_started_again(stage, runs):
    directory = runs.several.parents[1] / f"killed-{stage}"
    directory.mkdir()
    marker = directory / "marker"
    Together(directory, runs.count, STAGES, *runs.flags, trap=(stage, marker)).kill_at(marker)
    assert not (directory / "run" / stage / "complete.json").exists()
    disturbed = Together(directory, runs.count, STAGES, *runs.flags).finish()
    for name in STAGES:
        assert_same_run(runs.several, disturbed, name)


@pytest.mark.nightly
def test_a_run_goes_on_with_fewer_processes_and_another_layout_and_says_so(tmp_path):
    whole = run(tmp_path / "whole", 4, ("sft",))
    (tmp_path / "other").mkdir()
    marker = tmp_path / "marker"
    Together(tmp_path / "other", 4, ("sft",), trap=("sft", marker)).kill_at(marker)
    other = Together(tmp_path / "other", 2, ("sft",), "fsdp").finish()
    assert_trained_alike(whole, other, "sft")
    printed = " ".join((tmp_path / "other" / "log-0").read_text().split())
    assert re.search(r"sft continues on .*fsdp = 2.*processes = 2; it was started on .*processes = 4", printed)


def test_one_process_alone_exchanges_nothing():
    array = np.arange(3)
    assert processes.count() == 1 and processes.is_first()
    assert processes.from_first(lambda: array) is array and processes.on_host({"a": array})["a"] is array
    assert processes.any_of(True) and not processes.any_of(False)


def test_processes_that_cannot_be_found_end_with_one_message(tmp_path, capsys):
    assert main([PREFERENCES, f"--workdir={tmp_path / 'run'}", *files(tmp_path), "--distributed"]) == 1
    assert "--coordinator=HOST:PORT, --processes and --process" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
