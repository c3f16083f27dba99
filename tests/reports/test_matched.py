"""A frontier stage in the report: its figures, its table and its file."""

import shutil

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from rich.console import Console

from rlhf_jax.reports import frames, report
from rlhf_jax.reports.cautions import cautions
from rlhf_jax.reports.results_section import first_screen
from rlhf_jax.reports.run import Run
from rlhf_jax.runtime.files import read_json, write_json, write_rows
from rlhf_jax.stages.frontier import at_kl, match
from tests.support import workdirs

SEEDS, TARGETS = (0, 1), (1.0, 4.0)
SLOPES = {"dpo_1": 0.5, "dpo_01": 1.0, "ppo": 2.0}  # of gold score on root KL
LENGTHS = {"dpo_1": 1.5, "dpo_01": 5.0, "ppo": 9.0}  # nats at the end; seed 1 of dpo_01 goes half as far


def written_points():
    points = [{"method": "sft", "seed": 0, "step": 0, "kl": 0.0, "kl_se": 0.0, "gold": 1.0, "gold_se": 0.1}]
    for method, slope in SLOPES.items():
        for seed in SEEDS:
            end = LENGTHS[method] / (2 if (method, seed) == ("dpo_01", 1) else 1)
            for step, kl in zip((10, 20, 40), np.linspace(0, end, 4)[1:], strict=True):
                gold = 1 + (slope + 0.1 * seed) * float(np.sqrt(kl))
                points.append({"method": method, "seed": seed, "step": step, "kl": float(kl), "kl_se": 0.1,
                               "gold": gold, "gold_se": 0.1})  # fmt: skip
    return points


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    workdirs.write_training(root, seeds=2)
    points = written_points()
    files = {
        "points.jsonl": points,
        "matched.jsonl": match(points, tuple(SLOPES), TARGETS),
        "at_kl.jsonl": at_kl(points, tuple(SLOPES), TARGETS),
    }
    workdirs.write_gold(root)
    section = {"kind": "frontier", "judge": {"functions": ["mine.py:f"], "model": "rm"}, "prompts": 200}
    workdirs.write_stage(root, "frontier", section, inputs=("gold", "sft", *SLOPES), files=files)
    return Run(root)


@pytest.fixture(scope="module")
def drawn(run):
    return report.draw(run)


def test_methods_are_compared_over_the_seeds_that_went_so_far(run):
    table = run.matched("frontier").set_index(["method", "kl"])
    assert table["reached"].to_dict() == {
        ("dpo_1", 1.0): 2, ("dpo_1", 4.0): 0, ("dpo_01", 1.0): 2, ("dpo_01", 4.0): 1, ("ppo", 1.0): 2, ("ppo", 4.0): 2
    }  # fmt: skip
    for method, slope in SLOPES.items():
        assert table.loc[(method, 1.0), "gold"] == pytest.approx(1 + slope + 0.05)
        assert table.loc[(method, 1.0), "gold_se"] == pytest.approx(0.05)  # of two seeds, 0.1 apart
    assert table.loc[("ppo", 4.0), "gold"] == pytest.approx(1 + 2 * 2.05)
    assert table.loc[("dpo_01", 4.0), "gold"] == pytest.approx(3.0)
    assert pd.isna(table.loc[("dpo_01", 4.0), "gold_se"])
    assert pd.isna(table.loc[("dpo_1", 4.0), "gold"])


def test_every_run_is_a_line_in_its_methods_panel(drawn):
    figure = drawn["runs"]
    assert [text.get_text() for text in figure.texts][-1] == "score by rm + mine.py:f"
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_visible()}
    assert list(panels) == list(SLOPES)
    for method, axes in panels.items():
        coloured = [line for line in axes.lines if line.get_marker() == "o"]
        assert len(coloured) == len(SEEDS)
        assert len(axes.lines) == len(SEEDS) * len(SLOPES)
        for seed, line in zip(SEEDS, coloured, strict=True):
            expected = [p for p in written_points() if (p["method"], p["seed"]) == (method, seed)]
            np.testing.assert_allclose(np.asarray(line.get_xdata()), [0, *(point["kl"] for point in expected)])
            np.testing.assert_allclose(np.asarray(line.get_ydata()), [1, *(point["gold"] for point in expected)])


def test_the_ranking_has_the_best_on_top_and_says_who_did_not_arrive(drawn):
    figure = drawn["equal_kl"]
    assert {axes.get_xlabel() for axes in figure.axes} == {"score by rm + mine.py:f"}
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["KL 1", "KL 4"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["dpo_1", "dpo_01", "ppo"]
    assert [text.get_text() for text in figure.axes[1].texts] == ["not reached"]


def test_table_and_file(run, monkeypatch):
    monkeypatch.setattr(report, "PNG_DPI", 20)
    report.write_report(run.workdir)
    written = pd.read_csv(run.workdir / "matched.csv")
    assert len(written) == len(SLOPES) * len(TARGETS)
    assert {"runs.png", "equal_kl.png"} <= {path.name for path in (run.workdir / "figures").iterdir()}
    console = Console(width=100)
    with console.capture() as capture:
        report.print_summary(run, console)
    shown = capture.get()
    assert "Score by rm + mine.py:f at equal KL" in " ".join(shown.split())
    half = float(scipy.stats.t.ppf(0.975, df=1)) * 0.05  # two seeds, 0.1 apart
    assert f"3.05 [{3.05 - half:.2f}, {3.05 + half:.2f}]" in shown
    rows = pd.read_csv(run.workdir / "matched_differences.csv").to_dict("records")
    pairs = {(row["kl"], row["method"], row["against"]): row for row in rows}
    ahead = pairs[1.0, "ppo", "dpo_1"]
    assert ahead["difference"] == pytest.approx(1.5) and ahead["low"] == pytest.approx(ahead["high"])
    assert ahead["seeds"] == 2 and (4.0, "ppo", "dpo_01") not in pairs, "which one seed reached"
    assert "(1/2)" in shown and "–" in shown and "no evaluation" not in shown


def test_other_judges_have_names_too(tmp_path):
    workdirs.write_gold(tmp_path)
    judges = {"gold": "gold score", "/models/judge": "score by reward model judge"}
    for number, (judge, named) in enumerate(judges.items()):
        workdirs.write_stage(tmp_path, f"frontier_{number}", {"kind": "frontier", "judge": judge}, inputs=("gold",))
        assert frames.frontier_score(Run(tmp_path), f"frontier_{number}") == named


def test_the_first_screen_says_what_was_found_at_equal_kl(run):
    low, high = 3.05 + np.array([-1, 1]) * 0.05 * scipy.stats.t.ppf(0.975, 1)
    text = first_screen(run)
    assert (
        "At a KL divergence of 1 nats, ppo has the highest score by rm + mine.py:f: 3.05 (95 % interval over 2 seeds: "
        f"{low:.2f} to {high:.2f})."
    ) in text
    assert "200 test prompts; data: train.jsonl;" in text and "no evaluation yet" not in text


def test_the_cautions_of_an_evaluation_hold_at_equal_kl_too(run, tmp_path):
    root = shutil.copytree(run.workdir, tmp_path / "run")
    assert cautions(Run(root)) == []
    config = root / "frontier" / "config.json"
    whole = read_json(config)
    write_json(config, {**whole, "section": {**whole["section"], "judge": "reward_model", "prompts": 50}})
    points = written_points()
    write_rows(root / "frontier" / "points.jsonl", [*points[:-1], points[-1] | {"kl": -0.4}])
    circular, few, negative = cautions(Run(root))
    assert circular.startswith("The judge scores answers that were optimised for it: ppo was selected by, or trained")
    assert few.startswith("Only 50 prompts") and "divergence of ppo was measured below 0 (-0.4 nats)" in negative
