"""Figures, one function each: from tables to a matplotlib Figure, without pyplot. Axes are labelled with units."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhf_jax.core.statistics import t_interval
from rlhf_jax.reports.frames import Training
from rlhf_jax.reports.style import (
    INK,
    MUTED,
    PALETTE,
    EndLabel,
    PointLabel,
    colour,
    context,
    fix_layout,
    label_ends,
    label_points,
    panels,
    scale_by_root,
    shades,
)
from rlhf_jax.stages.kinds import Kind, Panel, Series
from rlhf_jax.types import Row


def learning_curves(kind: Kind, stages: Mapping[str, Training]) -> Figure:
    """Learning curves of all stages of one kind: smoothed lines and, for a single stage, faint unsmoothed ones.

    Args: stages maps labels to trainings, drawn from the lightest line to the darkest. With several seeds, the line is
    the mean over seeds and the band is one standard deviation.
    """
    shown = [panel for panel in kind.curves if any(_has(stage.metrics, panel) for stage in stages.values())]
    with context():
        figure, axes = panels(len(shown), 2.5)
        for panel, ax in zip(shown, axes, strict=True):
            ends = []
            colors = shades(len(stages), PALETTE[kind.colour])
            for color, (label, (table, _)) in zip(colors, stages.items(), strict=True):
                for series in panel.series:
                    color = colour(series.kind) if series.kind else color
                    end = _curve(ax, table, series, color, alone=len(stages) == 1)
                    labelled = series.name or not series.column.startswith("eval/")
                    text = " ".join(filter(None, (label if len(stages) > 1 else "", series.name)))
                    if end is not None and labelled and text:
                        ends.append(EndLabel(end, text, color))
            levels = [_level(panel, stage.section) for stage in stages.values()]
            shared = len(set(levels)) == 1
            for color, level in zip([MUTED] if shared else colors, levels, strict=False):
                if level is not None:
                    ax.axhline(level, color=color, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
            ax.set_title(panel.title)
            ax.set_ylabel(panel.unit)
            ax.set_xlabel(kind.step)
            ax.margins(x=0.04)
            label_ends(ax, ends)
        fix_layout(figure)
    return figure


def frontier(points: pd.DataFrame, curve: pd.DataFrame | None, *, score: str, start: str) -> Figure:
    """Score against KL divergence for every method.

    Args: points has `kind, label, kl, kl_se, score, score_se`, one row per method and seed, DPO in the order of beta;
    curve is Best-of-N for all n (`n, kl, score, score_se`). score labels the y axis; start is the method from which the
    divergence is measured.
    """
    with context():
        figure, (ax,) = panels(1, 4.4)
        scale_by_root(ax)
        labels, obstacles = [], []
        if curve is not None:
            labels += _best_of_n_line(ax, curve)
            obstacles += _along(curve["kl"], curve["score"])
        obstacles += _line_of_means(ax, points[points["kind"] == "dpo"], colour("dpo"))
        labels = _method_points(ax, points) + labels
        for _, row in points.iterrows():
            obstacles += _along([row["kl"]] * 2, [row["score"] - row["score_se"], row["score"] + row["score_se"]])
        ax.set_xlabel(f"KL from {start} (nats per response; square-root scale)")
        ax.set_ylabel(score)
        _nats_ticks(ax, max(x for x, _ in [*obstacles, *zip(points["kl"], points["score"], strict=True)]))
        ax.margins(x=0.04, y=0.08)
        label_points(figure, ax, labels, obstacles)
    return figure


def best_of_n(curve: pd.DataFrame, deviations: tuple[float, float] | None, *, judge: str) -> Figure:
    """Gain over n = 1 in proxy and gold score against the square root of the KL, after fig. 1 of Gao et al. 2022.

    Args: deviations are the standard deviations of the proxy and gold scores of SFT samples, which put both curves on
    one scale; without them, each has its own panel and unit. judge names the judge.
    """
    series = [("proxy", "reward_model", "reward model (proxy)")]
    if curve["gold"].notna().any():
        series.append(("gold", "gold", judge))
    shared = deviations is not None
    with context():
        figure, axes = panels(1 if shared else len(series), 3.3)
        ends: list[EndLabel] = []
        for i, (column, kind, name) in enumerate(series):
            ax, scale = axes[0 if shared else i], deviations[i] if deviations is not None else 1.0
            x = np.sqrt(curve["kl"])
            y, se = (curve[column] - curve[column].iloc[0]) / scale, curve[f"{column}_se"] / scale
            ax.fill_between(x, y - se, y + se, color=colour(kind), alpha=0.18, linewidth=0)
            ax.plot(x, y, color=colour(kind), marker="o", markersize=3.5)
            ends.append(EndLabel(float(y.iloc[-1]), name if shared else "", colour(kind)))
            ax.set_title("Gain over n = 1" if shared else f"Gain over n = 1, {name}")
            ax.set_ylabel("standard deviations of SFT samples" if shared else "score")
            ax.set_xlabel("√KL from SFT (√nats)")
            ax.margins(x=0.03)
            _sizes_on_top(ax, curve)
        if shared:
            label_ends(axes[0], ends)
        fix_layout(figure)
    return figure


def win_rates(results: pd.DataFrame, *, judge: str, start: str) -> Figure:
    """Win rate of each method against the reference's answers to the same prompts, with 95 % intervals.

    With one seed, the interval is Wilson's, over prompts. With several, it is Student's t around the mean over seeds,
    and each seed is a small dot.

    Args: results has `kind, label, seed, win_rate, win_low, win_high`, drawn from top to bottom; start names the
    reference.
    """
    methods = [rows for _, rows in results.groupby("label", sort=False)]
    with context():
        figure, (ax,) = panels(1, 0.9 + 0.26 * max(3, len(methods)))
        labels, ends = [], [50.0]
        for line, rows in enumerate(methods):
            color, several = colour(rows["kind"].iloc[0]), len(rows) > 1
            rates = 100 * rows["win_rate"].to_numpy(float)
            low, high = t_interval(rates, level=0.95) if several else 100 * rows[["win_low", "win_high"]].iloc[0]
            low, high, middle = max(0.0, low), min(100.0, high), rates.mean()
            ax.plot([low, high], [line, line], color=color, linewidth=2.2, solid_capstyle="butt")
            ax.plot([middle], [line], color=color, marker="D" if several else "o", markersize=6, linestyle="none")
            if several:
                ax.plot(rates, [line] * len(rates), color=INK, marker="o", markersize=2.5, linestyle="none", zorder=4)
            ax.annotate(
                f"{middle:.0f} %  [{low:.0f}, {high:.0f}]",
                (1.02, line),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=8,
                color=INK,
            )
            labels.append(f"{rows['label'].iloc[0]}, {len(rows)} seeds" if several else rows["label"].iloc[0])
            ends += [low, high, *rates]
        ax.axvline(50, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        ax.set_yticks(range(len(labels)), labels)
        ax.tick_params(axis="y", length=0, labelsize=8.5)
        ax.grid(axis="y", visible=False)
        ax.spines["left"].set_visible(False)
        ax.set_xlim(min(45, min(ends) - 3), max(55, max(ends) + 3))
        ax.set_ylim(len(labels) - 0.4, -0.6)
        ax.set_xlabel(f"pairs won against {start}, by the {judge} (%; ties count half; 95 % intervals)")
        fix_layout(figure)
    return figure


# ---- parts ---------------------------------------------------------------------------------------------------------


def _has(table: pd.DataFrame, panel: Panel) -> bool:
    return any(series.column in table and table[series.column].notna().any() for series in panel.series)


def _level(panel: Panel, section: Row) -> float | None:
    return panel.chance(section) if callable(panel.chance) else panel.chance


def _curve(ax: Axes, table: pd.DataFrame, series: Series, color: str, *, alone: bool) -> float | None:
    """Draw one series of one stage and return its last value, or None if there is no data."""
    if series.column not in table or table[series.column].dropna().empty:
        return None
    seeds = table.pivot(index="step", columns="seed", values=series.column).dropna(how="all").astype(float)
    if series.column.startswith("eval/"):
        mean = seeds.mean(axis=1)
        ax.plot(mean.index, mean, color=color, marker="o", markersize=4, linewidth=0.8, linestyle=":")
        return float(mean.iloc[-1])
    trends = seeds.rolling(trend_window(len(seeds), alone=alone), min_periods=1, center=True).mean()
    mean = trends.mean(axis=1)
    if seeds.shape[1] > 1:
        deviation = trends.std(axis=1, ddof=1)
        ax.fill_between(mean.index, mean - deviation, mean + deviation, color=color, alpha=0.2, linewidth=0)
    elif alone:
        ax.plot(seeds.index, seeds.iloc[:, 0], color=color, alpha=0.22, linewidth=0.7)
    ax.plot(mean.index, mean, color=color)
    return float(mean.iloc[-1])


def trend_window(steps: int, *, alone: bool) -> int:
    """Width of the centred moving average in steps: 1/20 of the run, or 1/8 if several stages share a panel."""
    return max(1, round(steps / (20 if alone else 8)))


def _method_points(ax: Axes, points: pd.DataFrame) -> list[PointLabel]:
    labels = []
    for label, rows in points.groupby("label", sort=False):
        color, several = colour(rows["kind"].iloc[0]), len(rows) > 1
        for _, row in rows.iterrows():
            ax.errorbar(
                row["kl"],
                row["score"],
                xerr=row["kl_se"] or None,
                yerr=row["score_se"],
                color=color,
                alpha=0.45 if several else 1.0,
                marker="o",
                markersize=3.5 if several else 6,
                elinewidth=1.1,
                zorder=4,
            )
        middle = rows[["kl", "score"]].mean()
        if several:
            ax.plot(middle["kl"], middle["score"], color=color, marker="D", markersize=6, zorder=5)
        labels.append(PointLabel(float(middle["kl"]), float(middle["score"]), str(label), color, bold=True))
    return labels


def _best_of_n_line(ax: Axes, curve: pd.DataFrame) -> list[PointLabel]:
    color = colour("best_of_n")
    low, high = curve["score"] - curve["score_se"], curve["score"] + curve["score_se"]
    ax.fill_between(curve["kl"], low, high, color=color, alpha=0.15, linewidth=0, zorder=1)
    ax.plot(curve["kl"], curve["score"], color=color, marker="o", markersize=2.5, linewidth=1.3, zorder=2)
    last = curve.iloc[-1]
    return [PointLabel(float(last["kl"]), float(last["score"]), f"best of {last['n']:.0f}", color)]


def _line_of_means(ax: Axes, points: pd.DataFrame, color: str) -> list[tuple[float, float]]:
    means = points.groupby("label", sort=False)[["kl", "score"]].mean()
    if len(means) > 1:
        ax.plot(means["kl"], means["score"], color=color, alpha=0.6, linewidth=1.3, zorder=2)
    return _along(means["kl"], means["score"])


def _along(xs: Iterable[float], ys: Iterable[float]) -> list[tuple[float, float]]:
    """Interpolate points along a polyline, as obstacles for labels."""
    vertices = np.array([*zip(xs, ys, strict=True)])
    at = np.linspace(0, len(vertices) - 1, 40 * len(vertices))
    return [
        (float(x), float(y)) for x, y in zip(*(np.interp(at, range(len(vertices)), v) for v in vertices.T), strict=True)
    ]


def _sizes_on_top(ax: Axes, curve: pd.DataFrame) -> None:
    top = ax.secondary_xaxis("top")
    shown = curve.iloc[::2] if len(curve) > 5 else curve
    top.set_xticks(np.sqrt(shown["kl"]), [f"{n:.0f}" if i else f"n = {n:.0f}" for i, n in enumerate(shown["n"])])
    top.tick_params(length=2)
    top.spines["top"].set_visible(False)


def _nats_ticks(ax: Axes, largest: float) -> None:
    candidates: Sequence[float] = [0, 0.1, 0.5, 1, 2, 4, 6, 9, 12, 16, 25, 36, 49, 64, 100, 150, 200]
    step = 1 if largest < 30 else 2
    ticks = [tick for tick in candidates if tick <= max(largest, 0.5) * 1.05][::step]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
