"""Figures of a reward model, and their place in the report."""

import numpy as np
import pytest

from rlhf_jax.core import calibration
from rlhf_jax.reports import report, reward_figures
from rlhf_jax.reports.run import Run
from rlhf_jax.runtime.files import write_json
from tests.support import workdirs


@pytest.fixture(scope="module")
def found():
    rng = np.random.default_rng(0)
    margins = rng.normal(0.7, 1.2, 400)
    correct = calibration.agreement(margins, np.ones(400))
    rows = calibration.reliability(1 / (1 + np.exp(-margins)), np.ones(400), bins=10)
    return {
        "all": calibration.accuracy(correct),
        "by_margin": calibration.accuracy_by(abs(margins), correct, bins=5),
        "by_length": calibration.accuracy_by(rng.integers(-40, 60, 400), correct, bins=5),
        "reliability": rows,
        "ece": calibration.expected_calibration_error(rows),
        "scores": calibration.histograms({"chosen": margins, "rejected": -margins}, bins=30),
    }


def test_points_are_the_groups_and_bars_their_intervals(found):
    ax = reward_figures.calibration(found).axes[0]
    (points,) = [line for line in ax.lines if line.get_marker() == "o"]
    np.testing.assert_allclose(np.asarray(points.get_ydata()), [100 * row["accuracy"] for row in found["reliability"]])
    np.testing.assert_allclose(
        np.asarray(points.get_xdata()), [100 * row["confidence"] for row in found["reliability"]]
    )
    assert f"{100 * found['ece']:.1f} %" in ax.get_title(loc="left")

    axes = reward_figures.accuracy(found).axes
    assert [ax.get_title(loc="left") for ax in axes] == ["By margin", "By length"]
    for ax, name in zip(axes, ("by_margin", "by_length"), strict=True):
        points = [np.asarray(line.get_xdata())[0] for line in ax.lines if line.get_marker() == "o"]
        np.testing.assert_allclose(points, [100 * row["accuracy"] for row in found[name]])
    labels = reward_figures.accuracy(found | {"by_label_margin": [found["all"] | {"from": -1.0, "to": -1.0}]}).axes[1]
    assert [label.get_text() for label in labels.get_yticklabels()] == ["−1"]


def test_the_report_shows_them_where_the_stage_wrote_them(found, tmp_path):
    for name, written in (("old", False), ("new", True)):
        root = tmp_path / name
        directory = workdirs.write_stage(root, "reward_model", {"kind": "reward_model", "loss": workdirs.reward_loss()})
        if written:
            write_json(directory / "calibration.json", found)
        drawn = report.draw(Run(root))
        assert set(drawn) == ({"reward_calibration", "reward_accuracy"} if written else set())
    html = report.write_report(root).read_text()
    assert 'data-chart="reliability-0"' in html and 'data-chart="scores-0"' in html
    assert "Pairs ranked correctly, by margin: difference of scores" in html
