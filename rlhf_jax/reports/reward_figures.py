"""Figures of a reward model's calibration and accuracy on held-out pairs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhf_jax.reports.style import MUTED, colour, context, fix_layout, panels

GROUPS = (
    ("by_margin", "By margin", "difference of scores"),
    ("by_label_margin", "By label", "margin of labels"),
    ("by_length", "By length", "tokens, chosen − rejected"),
)


def calibration(report: dict[str, Any]) -> Figure:
    """Reliability diagram with Wilson's 95 % intervals, and histograms of the scores of chosen and rejected responses.

    Args: report is the content of `calibration.json`.
    """
    with context():
        figure, (left, right) = panels(2, 3.0)
        rows, color = report["reliability"], colour("reward_model")
        left.plot([50, 100], [50, 100], color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        x, y, low, high = (
            100 * np.array([row[name] for row in rows]) for name in ("confidence", "accuracy", "low", "high")
        )
        left.plot(x, y, color=color, linewidth=1.0, alpha=0.6)
        left.errorbar(x, y, yerr=[y - low, high - y], color=color, marker="o", markersize=4.5, linestyle="none")
        left.set_title(f"Calibration error {100 * report['ece']:.1f} %")
        left.set_xlabel("predicted probability (%)")
        left.set_ylabel("ranked correctly (%)")
        left.set_xlim(49, 101)
        left.set_ylim(min(45.0, float(low.min()) - 3), 103)

        edges = np.array(report["scores"]["edges"])
        for name, shade in (("rejected", MUTED), ("chosen", color)):
            counts = np.array(report["scores"][name])
            right.stairs(counts, edges, color=shade, fill=True, alpha=0.25)
            right.stairs(counts, edges, color=shade, linewidth=1.3)
        top = max(max(report["scores"]["chosen"]), max(report["scores"]["rejected"]))
        for i, (name, shade) in enumerate((("chosen", color), ("rejected", MUTED))):
            position = (0.98, 0.96 - 0.09 * i)
            right.annotate(name, position, xycoords="axes fraction", ha="right", va="top", color=shade)
        right.set_ylim(0, 1.18 * top)
        right.set_title("Scores of held-out responses")
        right.set_xlabel("score")
        right.set_ylabel("responses")
        fix_layout(figure)
    return figure


def accuracy(report: dict[str, Any]) -> Figure:
    """Accuracy on groups of about equal size, with Wilson's 95 % intervals; the dashed line is chance.

    Args: report is the content of `calibration.json`.
    """
    shown = [(title, unit, report[name]) for name, title, unit in GROUPS if name in report]
    with context():
        figure, axes = panels(len(shown), 1.2 + 0.26 * max(len(rows) for _, _, rows in shown))
        lowest = 100 * min(row["low"] for _, _, rows in shown for row in rows)
        for ax, (title, unit, rows) in zip(axes, shown, strict=True):
            _groups(ax, rows)
            whole = report["all"]["accuracy"]
            ax.axvline(100 * whole, color=colour("reward_model"), linewidth=0.8, alpha=0.6, zorder=1)
            ax.set_title(title)
            ax.set_ylabel(unit)
            ax.set_xlabel("ranked correctly (%)")
            ax.set_xlim(min(45.0, lowest - 3), 103)
        fix_layout(figure)
    return figure


def _groups(ax: Axes, rows: Sequence[dict[str, Any]]) -> None:
    color = colour("reward_model")
    for line, row in enumerate(rows):
        low, middle, high = (100 * row[name] for name in ("low", "accuracy", "high"))
        ax.plot([low, high], [line, line], color=color, linewidth=2.2, solid_capstyle="butt")
        ax.plot([middle], [line], color=color, marker="o", markersize=5, linestyle="none")
    ax.axvline(50, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    ax.set_yticks(range(len(rows)), [span(row["from"], row["to"]) for row in rows])
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    ax.set_ylim(len(rows) - 0.4, -0.6)


def span(low: float, high: float) -> str:
    """Write a range of numbers with at most two decimals."""
    ends = [f"{end:.2f}".rstrip("0").rstrip(".").replace("-", "−") for end in (low, high)]
    ends = ["0" if end in ("", "−0") else end for end in ends]
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"
