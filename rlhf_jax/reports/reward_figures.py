"""Figures of how far a reward model can be believed, from what its stage reports of held-out pairs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhf_jax.reports.style import MUTED, colour, context, panels, settle

GROUPS = (
    ("by_margin", "By margin", "difference of scores"),
    ("by_label_margin", "By label", "margin of labels"),
    ("by_length", "By length", "tokens, chosen − rejected"),
)


def calibration(found: dict[str, Any]) -> Figure:
    """Whether predicted probabilities come true, and how the scores of chosen and rejected responses are spread.

    Args: found is `calibration.json`. Bars are Wilson's 95 % intervals.
    """
    with context():
        figure, (left, right) = panels(2, 3.0)
        rows, color = found["reliability"], colour("reward_model")
        left.plot([50, 100], [50, 100], color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        x, y, low, high = (
            100 * np.array([row[name] for row in rows]) for name in ("confidence", "accuracy", "low", "high")
        )
        left.plot(x, y, color=color, linewidth=1.0, alpha=0.6)
        left.errorbar(x, y, yerr=[y - low, high - y], color=color, marker="o", markersize=4.5, linestyle="none")
        left.set_title(f"Calibration error {100 * found['ece']:.1f} %")
        left.set_xlabel("predicted that the preferred is chosen (%)")
        left.set_ylabel("came true (%)")
        left.set_xlim(49, 101)
        left.set_ylim(min(45.0, float(low.min()) - 3), 103)

        edges = np.array(found["scores"]["edges"])
        for name, shade in (("rejected", MUTED), ("chosen", color)):
            counts = np.array(found["scores"][name])
            right.stairs(counts, edges, color=shade, fill=True, alpha=0.25)
            right.stairs(counts, edges, color=shade, linewidth=1.3)
        top = max(max(found["scores"]["chosen"]), max(found["scores"]["rejected"]))
        for place, (name, shade) in enumerate((("chosen", color), ("rejected", MUTED))):
            at = (0.98, 0.96 - 0.09 * place)
            right.annotate(name, at, xycoords="axes fraction", ha="right", va="top", color=shade)
        right.set_ylim(0, 1.18 * top)
        right.set_title("Scores of held-out responses")
        right.set_xlabel("score")
        right.set_ylabel("responses")
        settle(figure)
    return figure


def accuracy(found: dict[str, Any]) -> Figure:
    """Pairs ranked correctly, in groups of about equal size, with Wilson's 95 % intervals; dashed is chance.

    Args: found is `calibration.json`.
    """
    shown = [(title, unit, found[name]) for name, title, unit in GROUPS if name in found]
    with context():
        figure, axes = panels(len(shown), 1.2 + 0.26 * max(len(rows) for _, _, rows in shown))
        lowest = 100 * min(row["low"] for _, _, rows in shown for row in rows)
        for ax, (title, unit, rows) in zip(axes, shown, strict=True):
            _groups(ax, rows)
            whole = found["all"]["accuracy"]
            ax.axvline(100 * whole, color=colour("reward_model"), linewidth=0.8, alpha=0.6, zorder=1)
            ax.set_title(title)
            ax.set_ylabel(unit)
            ax.set_xlabel("ranked correctly (%)")
            ax.set_xlim(min(45.0, lowest - 3), 103)
        settle(figure)
    return figure


def _groups(ax: Axes, rows: Sequence[dict[str, Any]]) -> None:
    color = colour("reward_model")
    for line, row in enumerate(rows):
        low, middle, high = (100 * row[name] for name in ("low", "accuracy", "high"))
        ax.plot([low, high], [line, line], color=color, linewidth=2.2, solid_capstyle="butt")
        ax.plot([middle], [line], color=color, marker="o", markersize=5, linestyle="none")
    ax.axvline(50, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    ax.set_yticks(range(len(rows)), [_range(row["from"], row["to"]) for row in rows])
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    ax.set_ylim(len(rows) - 0.4, -0.6)


def _range(low: float, high: float) -> str:
    ends = [f"{end:.2f}".rstrip("0").rstrip(".").replace("-", "−") for end in (low, high)]
    ends = ["0" if end in ("", "−0") else end for end in ends]
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"
