"""Score-versus-KL curves of runs, compared at fixed KL."""

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from rich.table import Table
from rich.text import Text
from scipy import special

from rlhf_jax.reports.style import INK, MUTED, RULE, WIDTH, colour, context, fix_layout
from rlhf_jax.reports.table import split_to_width

COLUMNS = 4
ROW_HEIGHT = 1.45  # inches


def runs(points: pd.DataFrame, kinds: dict[str, str], start: str, score: str) -> Figure:
    """Judge's score against KL for every checkpoint: one panel per method, one line per seed, other methods in grey.

    Args: points as written by a frontier stage; kinds maps methods to stage kinds, in the order of the panels; score
    labels the y axis.
    """
    columns = min(COLUMNS, len(kinds))
    curves = {method: _curves(points, method, start) for method in kinds}
    rows = math.ceil(len(kinds) / columns)
    with context():
        figure = Figure(
            figsize=(WIDTH, 0.7 + ROW_HEIGHT * rows), dpi=100, layout=ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.04)
        )
        FigureCanvasAgg(figure)
        axes = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
        for ax, (method, kind) in zip(axes, kinds.items(), strict=False):
            for other, lines in curves.items():
                if other != method:
                    for kl, gold in lines:
                        ax.plot(kl, gold, color=RULE, linewidth=0.7, zorder=1)
            for kl, gold in curves[method]:
                color = colour(kind)
                ax.plot(kl, gold, color=color, linewidth=1.1, marker="o", markersize=1.8, zorder=2)
            ax.set_title(method, fontsize=8, pad=3)
            ax.tick_params(labelsize=7)
        for ax in axes[len(kinds) :]:
            ax.set_visible(False)
        for ax in axes[len(kinds) - columns : len(kinds)]:  # the last of each column
            ax.tick_params(labelbottom=True)
        _root_scale(figure.axes[0], points["kl"].max())
        figure.supxlabel(f"KL from {start} (nats per response; square-root scale)", fontsize=9, color=INK)
        figure.supylabel(score, fontsize=9, color=INK)
        fix_layout(figure)
    return figure


def ranking(matched: pd.DataFrame, kinds: dict[str, str], score: str) -> Figure:
    """Score of each method at each KL, mean and 95 % interval over seeds; best method on top."""
    targets = sorted(matched["kl"].unique())
    order = _order(matched)
    with context():
        figure = Figure(
            figsize=(WIDTH, 0.9 + 0.2 * len(order)), dpi=100, layout=ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.04)
        )
        FigureCanvasAgg(figure)
        for ax, target in zip(figure.subplots(1, len(targets), squeeze=False, sharey=True)[0], targets, strict=True):
            rows = matched[matched["kl"] == target].set_index("method")
            for place, method in enumerate(reversed(order)):
                row = rows.loc[method]
                color = colour(kinds[method])
                if not row["reached"]:
                    ax.text(0.02, place, "not reached", transform=ax.get_yaxis_transform(), fontsize=7, color=MUTED,
                            va="center")  # fmt: skip
                    continue
                low, _ = interval(row)  # symmetric around the mean
                error = 0.0 if pd.isna(low) else row["gold"] - low
                ax.errorbar(row["gold"], place, xerr=error, color=color, marker="o", markersize=3.5, linewidth=1.2)
            ax.set_yticks(range(len(order)), reversed(order))
            ax.set_ylim(-0.6, len(order) - 0.4)
            if rows["reached"].any():  # limits from standard errors: intervals of two seeds are very wide
                errors = 4 * rows["gold_se"].astype(float).fillna(0.0)
                ax.set_xlim((rows["gold"] - errors).min() - 0.02, (rows["gold"] + errors).max() + 0.02)
            else:
                ax.set_xticks([])
            ax.set_title(f"KL {target:g}")
            ax.set_xlabel(score)
        fix_layout(figure)
    return figure


def matched_tables(matched: pd.DataFrame, score: str, width: int) -> list[Table | Text]:
    """Text version of `ranking` for terminals of `width` characters: one row per method, one column per KL.

    `2/4` means that two of four seeds reached the divergence. Intervals are Student's t over those seeds.
    """
    headings, rows = matched_cells(matched)
    caption = f"{score[0].upper()}{score[1:]} at equal KL: mean over seeds [95 % interval over seeds]"
    return split_to_width(headings, rows, width, caption=caption)


def matched_cells(matched: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the table of scores at equal KL; each row begins with the method's name."""
    targets = sorted(matched["kl"].unique())
    rows = []
    for method in _order(matched):
        by_kl = matched[matched["method"] == method].set_index("kl")
        rows.append([method, *(_cell(by_kl.loc[target]) for target in targets)])
    return [f"KL {target:g}" for target in targets], rows


def _cell(row: pd.Series) -> str:
    if not row["reached"]:
        return "–"
    low, high = interval(row)
    between = "" if pd.isna(low) else f" [{low:.2f}, {high:.2f}]"
    seeds = "" if row["reached"] == row["seeds"] else f" ({row['reached']}/{row['seeds']})"
    return f"{row['gold']:.2f}{between}{seeds}".replace("-", "−")


def interval(row: pd.Series) -> tuple[float, float]:
    """95 % interval over seeds, computed from the standard error for stages of older versions."""
    if "gold_low" in row:
        return row["gold_low"], row["gold_high"]
    if pd.isna(row["gold_se"]):
        return math.nan, math.nan
    half = row["gold_se"] * special.stdtrit(row["reached"] - 1, 0.975)
    return row["gold"] - half, row["gold"] + half


def _order(matched: pd.DataFrame) -> list[str]:
    """Sort methods by score, best first, at the largest KL that all reached (or the smallest KL, if there is none)."""
    wide = matched.pivot(index="method", columns="kl", values="gold").astype(float)
    common = [kl for kl in wide.columns if wide[kl].notna().all()]
    return list(wide.sort_values(max(common, default=min(wide.columns)), ascending=False, na_position="last").index)


def _curves(points: pd.DataFrame, method: str, start: str) -> list[tuple[np.ndarray, np.ndarray]]:
    first = points[points["method"] == start].iloc[0]
    curves = []
    for _, run in points[points["method"] == method].groupby("seed"):
        run = run.sort_values("step")
        curves.append((np.append(0, run["kl"].clip(lower=0)), np.append(first["gold"], run["gold"])))
    return curves


def _root_scale(ax: Axes, largest: float) -> None:
    ax.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    candidates = (0, 1, 4, 10, 20, 40, 80, 160) if largest > 4 else (0, 0.1, 0.5, 1, 2, 4)
    ticks = [tick for tick in candidates if tick <= 1.1 * largest]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set_xlim(0, 1.05 * largest)
