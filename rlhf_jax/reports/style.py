"""Style of figures: a palette safe for colour-blind readers, and direct labels for lines and points."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.transforms import Bbox

from rlhf_jax.stages.kinds import Colour, shown_kind

INK, MUTED, RULE, PAPER = "#1f2328", "#656d76", "#d8dee4", "#ffffff"

# Okabe & Ito 2008: distinct to readers with any of the common colour deficiencies.
PALETTE: dict[Colour, str] = {
    "grey": "#4d5561",
    "amber": "#c07f00",
    "pink": "#b0568a",
    "green": "#00875f",
    "blue": "#0072b2",
    "orange": "#c24e00",
    "sky": "#3d8fae",
    "violet": "#7457a8",
    "brown": "#a8741a",
}

# For several stages of one kind in one panel.
SHADES = ("#6aaede", "#3f8fcb", "#1c6fb0", "#0a528c", "#063a67", "#02213f")

# Replacements for dark pages, in SVG figures.
DARK = {
    INK: "#e6edf3",
    MUTED: "#9aa4ae",
    RULE: "#343b43",
    PAPER: "#14181d",
    "#4d5561": "#aab4c0",
    "#c07f00": "#e6b450",
    "#b0568a": "#df8fbd",
    "#00875f": "#35c296",
    "#0072b2": "#5eb1ea",
    "#c24e00": "#ff9454",
    "#3d8fae": "#6fc0dd",
    "#7457a8": "#b39ae0",
    "#a8741a": "#dcae5c",
    **dict(zip(SHADES, ("#4a7fae", "#4f8fc4", "#5a9fd6", "#7fb9e8", "#a9d2f3", "#d5eafb"), strict=True)),
}

RC: dict[str, Any] = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "text.parse_math": False,  # names of stages may contain dollar signs
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "rlhf_jax",
}

WIDTH = 7.0
"""Inches; 700 pixels at 100 dpi."""


def colour(kind: str) -> str:
    """Colour of a kind of stage; grey for methods that are no stage's, such as a checkpoint."""
    row = shown_kind(kind)
    return PALETTE["grey" if row is None else row.colour]


def panels(count: int, height: float, **kwargs: Any) -> tuple[Figure, list[Axes]]:
    """Create a figure with panels side by side; call it and draw under `context()`."""
    figure = Figure(
        figsize=(WIDTH, height), dpi=100, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06, wspace=0.04)
    )
    axes = figure.subplots(1, count, squeeze=False, **kwargs)[0]
    return figure, list(axes)


def shades(count: int, own: str) -> list[str]:
    """Colours for `count` lines of one kind: `own` for one line, otherwise shades from light to dark."""
    if count == 1:
        return [own]
    return [SHADES[round(i * (len(SHADES) - 1) / (count - 1))] for i in range(count)]


def scale_by_root(axes: Axes) -> None:
    """Scale the x axis by the square root, over which gains of a policy are nearly straight in KL (Gao et al. 2022)."""
    axes.set_xscale("function", functions=(lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: np.sign(x) * x**2))


def context() -> Any:
    """Context manager that applies the style."""
    return matplotlib.rc_context(RC)


def fix_layout(figure: Figure) -> None:
    """Compute the layout of a figure and freeze it, so that later drawing is faster."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
    figure.set_layout_engine("none")


class EndLabel(NamedTuple):
    """Label of a line, placed to the right of its last value."""

    y: float
    text: str
    color: str


def label_ends(axes: Axes, labels: Sequence[EndLabel], *, gap: float = 0.085) -> None:
    """Label lines at their right ends without overlap. Fixes the limits of the y axis.

    Args: gap is the minimum distance between two labels, as a fraction of the panel's height.
    """
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    ordered = sorted(labels, key=lambda label: label.y)
    wanted = [(label.y - low) / (high - low) for label in ordered]
    for label, height in zip(ordered, spread(wanted, gap), strict=True):
        axes.text(
            1.03,
            height,
            label.text,
            color=label.color,
            transform=axes.transAxes,
            va="center",
            ha="left",
            fontsize=8,
        )


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Least-squares positions at least `gap` apart for ascending `wanted` ones.

    Isotonic regression of wanted[i] - i * gap by the pool-adjacent-violators algorithm.
    """
    blocks: list[list[float]] = []  # sum, count
    for i, position in enumerate(wanted):
        blocks.append([position - i * gap, 1.0])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    levels = [total / count for total, count in blocks for _ in range(int(count))]
    return [level + i * gap for i, level in enumerate(levels)]


class PointLabel(NamedTuple):
    """Label of a point in data coordinates."""

    x: float
    y: float
    text: str
    color: str
    bold: bool = False


OFFSETS = [(7, 0), (7, 7), (7, -7), (0, 10), (0, -10), (-7, 7), (-7, -7), (-7, 0), (14, 14), (14, -14), (-14, 14)]


def label_points(
    figure: Figure, axes: Axes, labels: Sequence[PointLabel], obstacles: Sequence[tuple[float, float]]
) -> None:
    """Label points, placing each label where it covers the fewest obstacles and other labels.

    Args: obstacles are data coordinates that should stay visible. Fixes the figure's layout.
    """
    fix_layout(figure)
    renderer = FigureCanvasAgg(figure).get_renderer()
    points = axes.transData.transform(np.array([(label.x, label.y) for label in labels]))
    marks = [points + corner for corner in ((-5, -5), (-5, 5), (5, -5), (5, 5))]
    blocked = np.concatenate([axes.transData.transform(np.array(obstacles).reshape(-1, 2)), *marks])
    taken: list[Bbox] = []
    for label in labels:
        text = axes.annotate(
            label.text,
            (label.x, label.y),
            xytext=(0, 0),
            textcoords="offset points",
            color=label.color,
            fontsize=8.5 if label.bold else 8,
            fontweight="bold" if label.bold else "normal",
            annotation_clip=False,
        )
        best = None
        for rank, offset in enumerate(OFFSETS):
            _place(text, offset)
            box = text.get_window_extent(renderer).padded(1.5)
            cost = 4 * sum(box.overlaps(other) for other in taken) + box.count_contains(blocked)
            cost += 8 * (not _inside(box, axes)) + 0.01 * rank
            if best is None or cost < best[0]:
                best = (cost, offset, box)
        assert best is not None
        _place(text, best[1])
        taken.append(best[2])


def _place(text: Any, offset: tuple[int, int]) -> None:
    text.xyann = offset
    text.set_horizontalalignment("left" if offset[0] > 0 else "right" if offset[0] < 0 else "center")
    text.set_verticalalignment("bottom" if offset[1] > 0 else "top" if offset[1] < 0 else "center")


def _inside(box: Bbox, axes: Axes) -> bool:
    frame, page = axes.bbox, axes.figure.bbox
    return bool(box.x0 >= frame.x0 and box.x1 <= page.x1 and box.y0 >= frame.y0 and box.y1 <= page.y1)
