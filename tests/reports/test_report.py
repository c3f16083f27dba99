import os
import struct

import pytest

from rlhf_jax.reports import report
from rlhf_jax.reports.run import Run
from tests.support import workdirs

FIGURES = {
    "frontier",
    "win_rates",
    "best_of_n",
    "learning_sft",
    "learning_reward_model",
    "learning_dpo",
    "learning_ppo",
}


def one_curve(root):
    workdirs.write_stage(root, "sft", {"kind": "sft"}, files={"metrics.jsonl": workdirs.metric_rows({"loss": (2, 1)})})


def left_by(root):
    return {path.stem for path in (root / "figures").glob("*.png")}


@pytest.fixture(autouse=True)
def coarse(request, monkeypatch):
    if "three_things" not in request.node.name:
        monkeypatch.setattr(report, "PNG_DPI", 20)


def test_the_report_is_three_things_at_the_root(tmp_path):
    workdirs.write_all(tmp_path)
    assert report.write_report(tmp_path) == tmp_path / "report.html"
    assert left_by(tmp_path) == FIGURES
    assert (tmp_path / "results.csv").exists()
    assert not [path for path in tmp_path.rglob("*.tmp")], "nothing temporary stays"
    for path in (tmp_path / "figures").glob("*.png"):
        width, _ = struct.unpack(">II", path.read_bytes()[16:24])
        assert width == 1400, path.name


def test_a_stage_that_wrote_no_samples_is_reported(tmp_path):
    workdirs.write_all(tmp_path)
    (tmp_path / "ppo" / "samples.jsonl").write_text("")
    report.write_report(tmp_path)
    assert left_by(tmp_path) == FIGURES


def test_a_report_is_current_until_a_stage_is_completed_or_something_is_missing(tmp_path):
    one_curve(tmp_path)
    assert not report.is_current(tmp_path)
    page = report.write_report(tmp_path)
    assert report.is_current(tmp_path)
    workdirs.write_stage(tmp_path, "later", {"kind": "gold"}, complete=False)
    assert report.is_current(tmp_path), "what is not complete is none of its business"
    workdirs.write_stage(tmp_path, "later", {"kind": "gold"})
    os.utime(page, (2e9, 2e9))
    assert not report.is_current(tmp_path), "although it is newer, as the clock was set back"
    report.write_report(tmp_path)
    assert report.is_current(tmp_path)
    page.unlink()
    assert not report.is_current(tmp_path)


def test_a_report_of_an_evaluation_is_current_only_with_its_csv(tmp_path):
    workdirs.write_training(tmp_path)
    workdirs.write_evaluate(tmp_path, gold=False)
    report.write_report(tmp_path)
    assert left_by(tmp_path) == FIGURES - {"best_of_n"}, "an experiment without Best-of-N has its other figures"
    assert report.is_current(tmp_path)
    (tmp_path / "results.csv").unlink()
    assert not report.is_current(tmp_path)


@pytest.mark.parametrize("stages", [[], ["training"], ["training", "best_of_n"], ["gold"]])
def test_a_half_done_experiment_is_reported_as_far_as_it_is(tmp_path, stages):
    if "gold" in stages:
        workdirs.write_gold(tmp_path)
    if "training" in stages:
        workdirs.write_training(tmp_path)
    if "best_of_n" in stages:
        workdirs.write_best_of_n(tmp_path, gold=True)
    page = report.write_report(tmp_path).read_text()
    assert "There is no evaluation yet" in page
    assert not (tmp_path / "results.csv").exists()
    learning = {name for name in FIGURES if name.startswith("learning")} if "training" in stages else set()
    assert left_by(tmp_path) == learning | ({"best_of_n"} & set(stages))


@pytest.mark.nightly
def test_stages_under_inputs_are_reported_with_those_here(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir(), new.mkdir()
    workdirs.write_gold(old)
    workdirs.write_training(old)
    workdirs.write_best_of_n(old, gold=True)
    section = {"kind": "ppo", "policy": "sft", "reward_model": "reward_model", "kl_coef": 0.5}
    rows = workdirs.metric_rows({"objective/scores": (0, 1), "objective/kl": (0, 1)})
    samples = [workdirs.sample_row(1, 0, "it is", 0.1, 0.2)]
    files = {"metrics.jsonl": rows, "samples.jsonl": samples}
    workdirs.write_stage(new, "ppo", section, inputs=("sft", "reward_model"), files=files, elsewhere=old)
    workdirs.write_evaluate(new, gold=True, elsewhere=old)
    report.write_report(new, old)
    assert left_by(new) == FIGURES
    assert not (old / "report.html").exists()
    assert report.is_current(new, old)
    assert Run(new, old).directory("best_of_n") == old / "best_of_n"


def test_a_disk_that_fills_up_leaves_every_file_as_it_was(tmp_path, monkeypatch):
    one_curve(tmp_path)
    report.write_report(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for name in ("a figure", "the page"):
        with pytest.raises(OSError, match="No space left"):
            report.write_report(tmp_path)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before, name
        monkeypatch.setattr(report, "write_png", lambda figure, path: None)
