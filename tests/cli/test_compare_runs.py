"""`rlhf-jax compare` on two runs of tiny stages, and on directories that cannot be compared."""

import shutil
from pathlib import Path

import pytest

from rlhf_jax.main import main
from tests.support import experiments

LOOP = {"steps_per_call": 2, "checkpoint_every": 100}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A stage run twice alike, and with another learning rate."""
    place = tmp_path_factory.mktemp("runs")
    policy, _ = experiments.models(place)
    pairs = experiments.preference_rows(place / "pairs.jsonl")
    changes = {"one": {}, "same": {}, "fast": {"optimizer": experiments.OPTIMIZER | {"learning_rate": 0.01}}}
    for name, change in changes.items():
        section = experiments.dpo_section(policy, **{"loop": LOOP, **change})
        experiments.run(place / name, pairs, {"dpo": section})
    return {name: place / name for name in changes}


def compared(capsys: pytest.CaptureFixture[str], *places: Path) -> list[str]:
    assert main(["compare", *map(str, places)]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.nightly
def test_equal_runs_agree(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]):
    rows = len(experiments.rows(runs["one"] / "dpo" / "metrics.jsonl"))
    assert compared(capsys, runs["one"], runs["same"]) == [f"dpo: metrics agree in all {rows} rows that both have"]


@pytest.mark.nightly
def test_the_first_step_and_its_metrics(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]):
    lines = compared(capsys, runs["one"], runs["fast"])
    assert lines[0] == "dpo: metrics part at step 1"
    assert lines[1] == "  setting section.optimizer.learning_rate: 0.003 | 0.01"
    metrics = {line.split()[1].rstrip(":"): line for line in lines[2:]}
    assert "loss" not in metrics and "learning_rate" in metrics  # the first loss is that of the reference
    assert not any(name.startswith("time/") for name in metrics)


@pytest.mark.nightly
def test_a_later_step_and_a_metric_of_one_run(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(runs["one"], tmp_path / "other")
    file = tmp_path / "other" / "dpo" / "metrics.jsonl"
    rows = file.read_text().splitlines(keepends=True)
    assert '"loss": ' in rows[3]
    file.write_text("".join([*rows[:3], rows[3].replace('"loss": ', '"lost": '), *rows[4:]]))
    step, loss = (experiments.rows(runs["one"] / "dpo" / "metrics.jsonl")[3][name] for name in ("step", "loss"))
    assert compared(capsys, runs["one"], tmp_path / "other") == [
        f"dpo: metrics part at step {step}",
        f"  metric loss: {loss} | None",
        f"  metric lost: None | {loss}",
    ]


@pytest.mark.nightly
def test_a_shorter_run_and_stages_of_one_run(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(runs["one"], tmp_path / "other")
    shutil.copytree(runs["one"] / "dpo", tmp_path / "other" / "again")
    file = tmp_path / "other" / "dpo" / "metrics.jsonl"
    rows = file.read_text().splitlines(keepends=True)
    file.write_text("".join(rows[:-2]))
    assert compared(capsys, runs["one"], tmp_path / "other") == [
        f"dpo: metrics agree in all {len(rows) - 2} rows that both have, of {len(rows)} and {len(rows) - 2}",
        f"again: only in {tmp_path / 'other'}",
    ]


@pytest.mark.nightly
def test_directories_that_cannot_be_compared(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(runs["one"], tmp_path / "damaged")
    with (tmp_path / "damaged" / "dpo" / "metrics.jsonl").open("a") as file:
        file.write("not json\n")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("missing", "missing does not exist: give the --workdir of an experiment"),
        ("empty", "empty has no stages: give the --workdir of an experiment"),
        ("damaged", "metrics.jsonl is damaged"),
    ):
        assert main(["compare", str(runs["one"]), str(tmp_path / name)]) == 1
        error = capsys.readouterr().err
        assert message in error and error.startswith("Error: ") and error.count("\n") == 1
