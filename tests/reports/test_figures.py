import itertools
import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Annotation

from rlhf_jax.reports import curve_data, figures, frames, report
from rlhf_jax.reports.run import Run
from rlhf_jax.reports.style import MUTED, PointLabel, context, label_points, panels, spread
from rlhf_jax.runtime.files import read_rows, write_rows
from rlhf_jax.stages.kinds import KINDS
from tests.support import workdirs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Run(workdirs.write_all(tmp_path_factory.mktemp("run"), seeds=2))


@pytest.fixture(scope="module")
def drawn(run):
    return report.draw(run)


def lines(axes):
    return [np.column_stack([line.get_xdata(), line.get_ydata()]) for line in axes.lines]


def has_line(axes, xs, ys):
    wanted = np.column_stack([xs, ys]).astype(float)
    return any(found.shape == wanted.shape and np.allclose(found, wanted) for found in lines(axes))


def has_point(axes, x, y):
    return any(np.allclose(found, [[x, y]]) for found in lines(axes) if len(found) == 1)


def texts(axes):
    return [text.get_text() for text in axes.texts if text.get_text()]


def boxes(figure, axes):
    renderer = FigureCanvasAgg(figure).get_renderer()
    return [text.get_window_extent(renderer) for text in axes.texts if text.get_text()]


def test_every_figure_that_the_data_allow_is_drawn(drawn):
    learning = [f"learning_{kind}" for kind in ("sft", "reward_model", "dpo", "ppo")]
    assert list(drawn) == ["frontier", "win_rates", "best_of_n", *learning]


def test_the_frontier_shows_every_method_where_its_results_lie(run, drawn):
    axes = drawn["frontier"].axes[0]
    results = run.results()
    for method in ("sft", "best_of_16", "dpo_1", "dpo_01"):
        row = results.set_index("method").loc[method]
        assert has_point(axes, row["kl"], row["gold_score"]), method
    ppo = results[results["method"] == "ppo"]
    assert has_point(axes, ppo["kl"].mean(), ppo["gold_score"].mean()), "the mean over PPO's seeds"
    assert all(has_point(axes, row["kl"], row["gold_score"]) for _, row in ppo.iterrows())
    assert {"SFT", "Best of 16", "DPO β = 1", "DPO β = 0.1", "PPO", "best of 16"} == set(texts(axes))
    assert "nats" in axes.get_xlabel() and "gold" in axes.get_ylabel()


def test_error_bars_are_one_standard_error_long(run, drawn):
    dpo = run.results().set_index("method").loc["dpo_1"]
    segments = [segment for bars in drawn["frontier"].axes[0].collections for segment in _segments(bars)]
    low, high = dpo["gold_score"] - dpo["gold_se"], dpo["gold_score"] + dpo["gold_se"]
    assert any(np.allclose(segment, [[dpo["kl"], low], [dpo["kl"], high]]) for segment in segments)
    low, high = dpo["kl"] - dpo["kl_se"], dpo["kl"] + dpo["kl_se"]
    assert any(np.allclose(segment, [[low, dpo["gold_score"]], [high, dpo["gold_score"]]]) for segment in segments)


def _segments(collection):
    return collection.get_segments() if hasattr(collection, "get_segments") else []


def test_the_frontier_joins_dpo_by_beta_and_lets_best_of_n_start_at_the_reference(tmp_path):
    run = Run(workdirs.write_all(tmp_path))
    path = run.directory("best_of_n") / "curve.jsonl"
    write_rows(path, [row | {"gold": row["gold"] + 0.5} for row in read_rows(path)])
    axes, results = report.draw(run)["frontier"].axes[0], run.results().set_index("method")
    dpo = results.loc[["dpo_1", "dpo_01"]]
    assert has_line(axes, dpo["kl"], dpo["gold_score"])
    curve = run.best_of_n_curve("best_of_n")
    assert has_line(axes, curve["kl"], curve["gold"] - curve["gold"][0] + results["gold_score"]["sft"])


def test_the_names_on_the_frontier_neither_touch_nor_leave_the_figure(drawn):
    figure = drawn["frontier"]
    found = boxes(figure, figure.axes[0])
    assert len(found) == 6
    for i, box in enumerate(found):
        assert not any(box.overlaps(other) for other in found[:i])
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 <= figure.bbox.y1


def test_crowded_points_have_names_that_neither_touch_nor_leave_the_figure():
    with context():
        figure, (axes,) = panels(1, 2)
        axes.set(xlim=(0, 1), ylim=(0, 1))
        points = [
            PointLabel(x, y, "a longer name", "k") for x, y in ((0.5, 0.5), (0.55, 0.52), (0.5, 0.45), (0.99, 0.5))
        ]
        label_points(figure, axes, points, [])
    found = boxes(figure, axes)
    assert len(found) == len(points)
    for i, box in enumerate(found):
        assert not any(box.overlaps(other) for other in found[:i])
        assert box.x1 <= figure.bbox.x1


def test_without_a_judge_the_reward_model_scores_the_frontier(tmp_path):
    run = Run(workdirs.write_all(tmp_path, gold=False))
    axes = report.draw(run)["frontier"].axes[0]
    results = run.results().set_index("method")
    assert has_point(axes, results["kl"]["ppo"], results["reward_score"]["ppo"])
    assert "reward model" in axes.get_ylabel()


def test_best_of_n_is_measured_in_deviations_of_sft_from_its_first_point(run, drawn):
    axes, curve = drawn["best_of_n"].axes[0], run.best_of_n_curve("best_of_n")
    answers = run.samples("evaluate")
    answers = answers[answers["method"] == "sft"]
    for score, column in (("proxy", "score"), ("gold", "gold")):
        gain = (curve[score] - curve[score][0]) / answers[column].std()
        assert has_line(axes, np.sqrt(curve["kl"]), gain), score
    assert len(axes.collections) == 2, "a band each"
    top = axes.collections[1].get_paths()[0].vertices[:, 1]
    width = curve["gold_se"].iloc[-1] / answers["gold"].std()
    assert math.isclose(top.max(), (curve["gold"].iloc[-1] - curve["gold"][0]) / answers["gold"].std() + width)


def test_best_of_n_without_deviations_gives_each_score_its_own_scale(run):
    curve = run.best_of_n_curve("best_of_n")
    proxy, gold = figures.best_of_n(curve, None, judge="gold judge").axes[:2]
    assert has_line(proxy, np.sqrt(curve["kl"]), curve["proxy"] - curve["proxy"][0])
    assert has_line(gold, np.sqrt(curve["kl"]), curve["gold"] - curve["gold"][0])


def test_best_of_n_of_one_prompt_has_a_line_and_no_band(tmp_path):
    """Its standard errors are null: one row has none."""
    run = Run(workdirs.write_all(tmp_path, gold=False))
    path = run.directory("best_of_n") / "curve.jsonl"
    write_rows(path, [row | {"proxy_se": None} for row in read_rows(path)])
    curve = run.best_of_n_curve("best_of_n")
    assert curve["proxy_se"].isna().all() and curve["proxy_se"].dtype == float
    axes = figures.best_of_n(curve, None, judge="gold judge").axes[0]
    assert has_line(axes, np.sqrt(curve["kl"]), curve["proxy"] - curve["proxy"][0])


def test_learning_curves_end_where_training_does_and_show_every_held_out_value(run, drawn):
    loss = drawn["learning_sft"].axes[0]
    metrics = run.metrics("sft")
    held_out = metrics.dropna(subset="eval/loss")
    assert has_line(loss, metrics["step"], metrics["loss"])
    assert has_line(loss, held_out["step"], held_out["eval/loss"])
    assert texts(loss) == ["train", "held out"]
    assert set(texts(drawn["learning_dpo"].axes[2])) == {"β = 1", "β = 0.1"}


def test_several_seeds_show_as_their_mean_and_a_band_of_one_deviation(run, drawn):
    axes = drawn["learning_ppo"].axes[1]
    kl = run.metrics("ppo").pivot(index="step", columns="seed", values="objective/kl")
    window = figures.trend_window(len(kl), alone=True)
    smooth = kl.rolling(window, center=True, min_periods=1).mean()
    assert has_line(axes, smooth.index, smooth.mean(axis=1))
    (band,) = axes.collections
    height = band.get_paths()[0].vertices[:, 1]
    top = smooth.mean(axis=1) + smooth.std(axis=1)
    assert math.isclose(height.max(), top.max(), rel_tol=1e-6)


def test_win_rates_lie_on_their_intervals_which_are_over_seeds_where_there_are_several(run, drawn):
    axes, results = drawn["win_rates"].axes[0], run.results()
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["Best of 16", "DPO β = 1", "DPO β = 0.1", "PPO, 2 seeds"]
    for line, (_, row) in enumerate(results[~results["method"].isin(["sft", "ppo"])].iterrows()):
        assert has_point(axes, 100 * row["win_rate"], line)
        assert has_line(axes, [100 * row["win_low"], 100 * row["win_high"]], [line, line])
    rates = 100 * results[results["method"] == "ppo"]["win_rate"]
    assert has_point(axes, rates.mean(), 3) and has_line(axes, rates, [3, 3])
    low, high = scipy.stats.t.interval(0.95, df=1, loc=rates.mean(), scale=scipy.stats.sem(rates))
    assert has_line(axes, [max(0, low), min(100, high)], [3, 3])
    assert axes.get_xlim()[0] < 50 < axes.get_xlim()[1]
    assert sum(isinstance(text, Annotation) and "[" in text.get_text() for text in axes.texts) == 4


@pytest.mark.parametrize("kind", ["dpo", "online_dpo"])
@pytest.mark.parametrize(
    ("loss", "label", "level"),
    [
        (workdirs.preference_loss(), "DPO", math.log(2)),
        (workdirs.preference_loss("hinge"), "hinge", 1),
        (workdirs.preference_loss("apo_zero", "nca_pair"), "APO-zero + NCA", 1 + 2 * math.log(2)),
        (workdirs.preference_loss("hinge", "sigmoid", loss_weights=[0.5, 2.0]), "hinge + DPO", 0.5 + 2 * math.log(2)),
        (workdirs.preference_loss("ipo"), "IPO", None),
        (workdirs.preference_loss("sigmoid", "sft"), "DPO + SFT", None),
        (workdirs.preference_loss("gone.py:mine"), "mine", None),
        (workdirs.preference_loss("sigmoid", use_weighting=True), "DPO", None),
    ],
)
def test_the_losses_of_a_stage_name_it_and_set_the_level_of_its_loss(tmp_path, kind, loss, label, level):
    files = {"metrics.jsonl": workdirs.metric_rows({"loss": (0.9, 0.2)})}
    workdirs.write_stage(tmp_path, "mine", {"kind": kind, "beta": 0.1, "loss": loss}, files=files)
    run = Run(tmp_path)
    name = f"{label} β = 0.1" if kind == "dpo" else f"online {label} β = 0.1"
    assert frames.stage_labels(run, ["mine"]) == {"mine": name}
    (axes,) = report.draw(run)[f"learning_{kind}"].axes
    assert dashed(axes) == ([] if level is None else [(pytest.approx(level), MUTED)])


@pytest.mark.parametrize(
    ("name", "label", "level"),
    [
        ("bradley_terry", "Bradley-Terry", math.log(2)),
        ("raters", "raters", math.log(2)),
        ("k_wise", "K-wise", math.log(2)),
        ("margin", "Bradley-Terry with margins", None),
        ("plackett_luce", "Plackett-Luce", None),
        ("gone.py:hinge", "hinge", None),
    ],
)
def test_the_loss_of_a_reward_model_names_it_and_sets_the_level_of_its_loss(tmp_path, name, label, level):
    files = {"metrics.jsonl": workdirs.metric_rows({"loss": (0.9, 0.2)})}
    workdirs.write_stage(tmp_path, "mine", {"kind": "reward_model", "loss": workdirs.reward_loss(name)}, files=files)
    run = Run(tmp_path)
    assert frames.stage_labels(run, ["mine"]) == {"mine": label}
    (axes,) = report.draw(run)["learning_reward_model"].axes
    assert axes.get_title("left") == "Loss"
    assert dashed(axes) == ([] if level is None else [(pytest.approx(level), MUTED)])


def test_stages_with_different_losses_have_levels_of_their_own_colours(tmp_path):
    for name, loss, beta in (("a", "sigmoid", 1.0), ("b", "hinge", 0.5), ("c", "ipo", 0.1)):
        section = {"kind": "dpo", "beta": beta, "loss": workdirs.preference_loss(loss)}
        files = {"metrics.jsonl": workdirs.metric_rows({"loss": (beta, 0.1)})}
        workdirs.write_stage(tmp_path, name, section, files=files)
    (axes,) = report.draw(Run(tmp_path))["learning_dpo"].axes
    colors = {text.get_text(): text.get_color() for text in axes.texts if text.get_text()}
    assert set(colors) == {"β = 1", "hinge β = 0.5", "IPO β = 0.1"} and len(set(colors.values())) == 3
    assert sorted(dashed(axes)) == [(pytest.approx(math.log(2)), colors["β = 1"]), (1, colors["hinge β = 0.5"])]


def dashed(axes):
    """Levels of the horizontal lines across the axes, with their colours."""
    across = [line for line in axes.lines if line.get_transform() == axes.get_yaxis_transform(which="grid")]
    return [(line.get_ydata()[0], line.get_color()) for line in across]


def test_a_name_with_dollars_is_no_formula(run):
    table = frames.Training(run.metrics("sft"), {})
    figure = figures.learning_curves(KINDS["sft"], {"a $x_$": table, "b": table})
    figure.canvas.draw()
    assert "a $x_$ train" in texts(figure.axes[0])


def test_one_step_is_enough_to_draw(tmp_path):
    rows = workdirs.metric_rows({"loss": (2, 1)}, steps=1)
    workdirs.write_stage(tmp_path, "sft", {"kind": "sft"}, files={"metrics.jsonl": rows}, complete=False)
    workdirs.write_stage(tmp_path, "ppo", {"kind": "ppo"}, files={"metrics.jsonl": []}, complete=False)
    drawn = report.draw(Run(tmp_path))
    assert list(drawn) == ["learning_sft"]
    drawn["learning_sft"].canvas.draw()


@pytest.mark.parametrize("wanted", [[0.1, 0.1, 0.1], [0.0, 0.5, 0.52, 0.53, 1.0], [0.4], []])
def test_labels_are_spread_in_order_with_the_gap_between_them_and_no_further_than_needed(wanted):
    placed = spread(wanted, 0.1)
    assert all(b - a >= 0.1 - 1e-9 for a, b in itertools.pairwise(placed))
    assert math.isclose(sum(placed), sum(wanted), abs_tol=1e-9), "least squares keeps the mean of each cluster"
    if len(wanted) == 5:
        assert placed[0] == 0.0 and placed[-1] == 1.0, "what had room has not moved"


def test_a_frontier_of_the_reference_alone_is_drawn():
    points = pd.DataFrame([{"kind": "sft", "label": "SFT", "kl": 0.0, "kl_se": 0.0, "score": 0.1, "score_se": 0.05}])
    figure = figures.frontier(points, None, score="score", start="SFT")
    figure.canvas.draw()
    assert has_point(figure.axes[0], 0.0, 0.1)


OWN = """
import dataclasses
from rlhf_jax.stages.kinds import Kind, Panel, Series

@dataclasses.dataclass(frozen=True)
class Config:
    kind: str
    width: int

MINE = Kind(
    config=Config, run=lambda config, context: {}, summary="Measure it", title="Mine", label="width {width}",
    curves=(Panel("Loss", "nats", (Series("loss", ""),)),), colour="violet",
)
"""


def test_kto_and_a_kind_of_ones_own_have_curves_and_names(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    rows = [{"step": x, "seed": 0, "loss": 1 / x, "rewards/chosen": x, "rewards/margins": x} for x in (1, 2)]
    kind = f"{tmp_path}/own.py:MINE"
    workdirs.write_stage(tmp_path / "run", "tuned", {"kind": "kto", "beta": 0.1}, files={"metrics.jsonl": rows})
    workdirs.write_stage(tmp_path / "run", "mine", {"kind": kind, "width": 8}, files={"metrics.jsonl": rows})
    run = Run(tmp_path / "run")
    names = ["learning_kto", frames.learning_figure(kind)]
    drawn = report.draw(run)
    assert list(drawn) == names
    assert [axes.get_title("left") for axes in drawn["learning_kto"].axes] == [
        "Loss",
        "Implicit reward",
        "Reward margin",
    ]
    lines = drawn[names[1]].axes[0].get_lines()
    assert {line.get_color() for line in lines} == {"#7457a8"} and np.asarray(lines[0].get_ydata()).tolist() == [1, 0.5]
    assert list(frames.curves(run, kind)) == ["width 8"]
    assert [group["title"] for group in curve_data.curves({"run": run})] == ["KTO", "Mine"]

    (tmp_path / "own.py").unlink()
    assert list(report.draw(run)) == ["learning_kto"], "without its file the stage is listed alone"
    assert list(frames.curves(run, kind)) == ["mine"]
    assert [group["title"] for group in curve_data.curves({"run": run})] == ["KTO", kind]
