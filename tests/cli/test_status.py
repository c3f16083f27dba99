"""`rlhf-jax status` and `rlhf-jax show` on complete, running, failed and killed stages, at 80 columns."""

import time

import pytest

from rlhf_jax.cli.status import statuses
from rlhf_jax.runtime import stage_state
from rlhf_jax.runtime.files import write_json
from rlhf_jax.runtime.stage_state import LOCK, StageState
from rlhf_jax.runtime.workdir import Workdir
from tests.support import workdirs
from tests.support.commands import fails, succeeds

SECTION = {"kind": "dpo", "beta": 0.1, "optimizer": {"learning_rate": 1e-4, "micro_batch": None}}


@pytest.fixture(autouse=True)
def columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def run(tmp_path):
    """A complete stage, one that is not, and two that have not started."""
    root = tmp_path / "run"
    rows = workdirs.metric_rows({"loss": (2.0, 1.0), "eval/loss": (3.0, 2.0)})
    samples = [workdirs.sample_row(40, 0, f"was\n{word}", score=0.5, kl=1.0) for word in ("good", "bad", "dull")]
    files = {"metrics.jsonl": rows, "samples.jsonl": samples}
    workdirs.write_stage(root, "sft", {"kind": "sft"}, files=files, summary={"steps": 40})
    workdirs.write_stage(root, "dpo", SECTION, inputs=("sft",), complete=False)
    Workdir(root).record(["sft", "dpo", "ppo", "evaluate"])
    return root


def shown(capsys, directory, *flags):
    return [line.rstrip() for line in succeeds(capsys, "show", str(directory), *flags).splitlines()]


def status(run):
    return {row.stage: row for row in statuses(run)}


def test_stages_come_in_the_order_of_the_experiment(run, capsys):
    found = status(run)
    assert list(found) == ["sft", "dpo", "ppo", "evaluate"]
    assert found["sft"][1:4] == ("complete", "40", "12 s")
    assert [found[name].state for name in ("dpo", "ppo")] == ["not complete", "not started"]
    lines = succeeds(capsys, "status", str(run)).splitlines()
    assert [line.split()[0] for line in lines] == ["stage", "sft", "dpo", "ppo", "evaluate"]
    assert max(map(len, lines)) <= 80


def test_a_running_stage_has_step_rate_and_time_left(run, monkeypatch):
    monkeypatch.setattr(stage_state, "INTERVAL", 0.0)
    state = StageState(run / "dpo")
    state.update(doing="compiling (17 s the last time)", done=0, total=0, seconds_per_step=0.0, figures="")
    found = status(run)["dpo"]
    assert (found.state, found.steps, found.time) == ("running", "", "for 0 s")
    assert found.detail == "compiling (17 s the last time)"
    state.update(doing="", done=100, total=400, seconds_per_step=0.25, figures="loss 1.5")
    found = status(run)["dpo"]
    assert (found.state, found.steps, found.detail) == ("running", "100/400", "loss 1.5")
    assert found.time == "for 0 s, 4 steps/s, 75 s left"
    state.complete()


def test_a_failed_stage_has_its_error_and_a_killed_one_has_none(run, monkeypatch, capsys):
    monkeypatch.setattr(stage_state, "INTERVAL", 0.0)
    state = StageState(run / "dpo")
    state.update(done=100, total=400)
    state.fail("dpo: the loss is not finite at step 101: lower the learning rate or inspect that batch; it is long")
    found = status(run)["dpo"]
    assert (found.state, found.steps) == ("failed", "100/400") and "not finite" in found.detail
    printed = succeeds(capsys, "status", str(run))
    assert "dpo: the loss is not finite at step 101" in printed and max(map(len, printed.splitlines())) <= 80
    write_json(run / "dpo" / "state.json", {"error": None, "written": time.time() - 300, "done": 7, "total": 9})
    (run / "dpo" / LOCK).touch()  # left behind, and nobody holds it
    assert status(run)["dpo"][1:4] == ("killed", "7/9", "5 min ago")
    write_json(run / "dpo" / "state.json", {"error": None, "written": time.time() + 9e6, "done": 7, "total": 9})
    assert status(run)["dpo"].time == "0 s ago", "the clock was set back since"
    StageState(run / "dpo").fail("KeyboardInterrupt")
    assert status(run)["dpo"].state == "interrupted" and not status(run)["dpo"].detail


def test_stages_of_the_inputs_are_complete(run, tmp_path):
    other = tmp_path / "other"
    workdirs.write_stage(other, "dpo", SECTION, inputs=("sft",), elsewhere=run, complete=False)
    Workdir(other, run).record(["sft", "dpo"])
    found = status(other)
    assert found["sft"][1:4] == ("complete", "", f"in {run}") and found["dpo"].state == "not complete"


def test_a_directory_without_stages_is_an_error(tmp_path, capsys):
    assert "has no stage: give the --workdir of an experiment" in fails(capsys, "status", str(tmp_path))


def test_show_has_config_inputs_metrics_and_samples(run, capsys):
    lines = shown(capsys, run / "dpo")
    assert "dpo (dpo)" in lines and "not complete" in lines
    assert "optimizer.learning_rate  0.0001" in lines and "optimizer.micro_batch    None" in lines
    assert lines[lines.index("Inputs") + 1].startswith("sft")
    assert "Metrics" not in lines

    lines = shown(capsys, run / "sft", "--samples=2")
    assert "complete, 40 steps, 12 s" in lines
    table = lines[lines.index("Metrics") + 1 :]
    assert table[0].split() == ["of", "40", "steps", "first", "last"]
    assert table[1].split() == ["loss", "1.975", "1"] and table[2].split() == ["eval/loss", "2.75", "2"]
    assert lines[-3:] == ["Last samples", "step 40 [0.5]  film 40 was↵bad", "step 40 [0.5]  film 40 was↵dull"]
    assert max(map(len, lines)) <= 80


def test_a_path_that_is_no_stage_is_an_error(run, capsys):
    assert f"the stages of {run}: dpo, sft" in fails(capsys, "show", str(run / "ppo"))
