"""Write docs/results.md and docs/results: the verdict on every claim of the papers by question, with figures.

    python experiments/papers/write_results.py

Every number comes from the results beside the papers; `rlhf-jax reproduce --check` recomputes the verdicts from them.
"""

from collections import Counter
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhf_jax.papers.claims import Above, Below, Criterion
from rlhf_jax.papers.listing import probability
from rlhf_jax.papers.reproduce import overview
from rlhf_jax.papers.suite import FIGURE, load_paper, read_results, results_directory
from rlhf_jax.reports import style
from rlhf_jax.runtime.files import write_text
from rlhf_jax.stages.kinds import Colour
from rlhf_jax.types import Json

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "results.md"
FIGURES = ROOT / "docs" / "results"
QUESTIONS = {
    "preference tuning": "Does preference tuning improve on SFT alone?",
    "weak judge": "Can a weaker model judge a stronger one?",
    "reward model alone": "Is the reward model alone enough?",
    "poor data": "What does poor data cost?",
    "foundations": "Foundations",
}
VERDICTS = ("reproduced", "contradicted", "inconclusive", "not run")
COLOURS: dict[str, Colour] = {"reproduced": "green", "contradicted": "orange", "inconclusive": "grey"}
FAR = 6.0
"""Greatest distance from a criterion's bound that an overview shows."""

INTRODUCTION = """\
# Results

Each claim of a paper has a criterion that was committed before the run that it judges. The statistic has one value per
seed (or per problem, topic, or other independent unit); "here" is its mean with Student's t interval at 95 %, which is
not adjusted for other claims. Verdicts hold the chance of any wrong one among the claims of a question at 5 %: "p" is
adjusted for them (Holm's method), so that a claim may be inconclusive although its interval excludes the bound.
"Smallest effect" is the distance from the bound that these units, with the spread measured here, show with a chance of
80 % as the only claim. "Exact" statistics have no sampling error. [Reading
results](explanation/reading-results.md#papers) defines the verdicts. What a paper's experiment is here, and how it
differs from the paper's, stands at the head of its `paper.py`, with doubts about the result under "Found" and "Learning
rate". `rlhf-jax reproduce --check` recomputes this page's verdicts from the committed results, `rlhf-jax reproduce
--list` prints them, and `experiments/papers/write_results.py` writes the page.

The overview of a question shows how far every statistic is from its criterion's bound, in half-widths of its interval:
to the right on the side of the claim, to the left on the other. Beyond 1 the interval excludes the bound; the verdicts
need more, as claims share the error rate. Exact statistics are at the edge, and so are distances of 6 or more.
"""


def main() -> None:
    """Write the page and the overviews."""
    rows = overview()
    write_text(PAGE, page(rows))
    FIGURES.mkdir(exist_ok=True)
    for question in QUESTIONS:
        with style.context():
            draw(rows, question).savefig(FIGURES / f"{question.replace(' ', '_')}.png")


def page(rows: list[dict[str, Json]]) -> str:
    """Make the page of all claims."""
    lines = [INTRODUCTION, *summary(rows)]
    for question, heading in QUESTIONS.items():
        own = [row for row in rows if row["question"] == question]
        figure = f"results/{question.replace(' ', '_')}.png"
        lines += ["", f"## {heading}", "", f"![Claims on the question: {heading}]({figure})"]
        for name in dict.fromkeys(row["paper"] for row in own):
            lines += ["", *of_paper([row for row in own if row["paper"] == name])]
    return "\n".join(lines) + "\n"


def summary(rows: list[dict[str, Json]]) -> list[str]:
    """Table with the number of claims of every question by verdict, and the cost of all runs."""
    lines = [f"| question | papers | {' | '.join(VERDICTS)} |", "|---" + "|---:" * (1 + len(VERDICTS)) + "|"]
    for question, heading in QUESTIONS.items():
        own = [row for row in rows if row["question"] == question]
        count = Counter(row["verdict"] for row in own)
        cells = [len({row["paper"] for row in own}), *(count[verdict] for verdict in VERDICTS)]
        lines.append(f"| {heading} | {' | '.join(map(str, cells))} |")
    hours = sum({row["paper"]: row["seconds"] or 0 for row in rows}.values()) / 3600
    lines += [
        "",
        f"The runs took {hours:.1f} hours of one core. `rlhf-jax reproduce --all --processes=2` repeats them.",
    ]
    return lines


def of_paper(rows: list[dict[str, Json]]) -> list[str]:
    """Section of a paper: what was run, its claims, and its figure."""
    name, first = rows[0]["paper"], rows[0]
    lines = [f"### {first['title']} ({first['source']})", ""]
    if first["date"]:
        scale = load_paper(name).scales[first["scale"]]
        lines += [
            f"{first['figure']}, at scale `{first['scale']}`, {scale.seeds} {'seed' if scale.seeds == 1 else 'seeds'}, "
            f"{first['seconds']:,.0f} s, {first['date'][:10]}, commit {first['commit'][:12]}. "
            f"Record: [`paper.py`](../experiments/papers/{name}/paper.py)."
        ]
    else:
        lines += [f"{first['figure']}. Not run. Record: [`paper.py`](../experiments/papers/{name}/paper.py)."]
    if "gpu" in load_paper(name).scales and read_results(results_directory(name, "gpu")) is None:
        lines += ["", f"`rlhf-jax reproduce {name} --scale=gpu`, the paper's own setting: not run."]
    headings = ("claim", "the paper says", "criterion", "here", "p", "smallest effect", "verdict")
    lines += ["", f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    lines += [f"| {' | '.join(cells_of(row))} |" for row in rows]
    directory, details = results_directory(name, first["scale"]), load_paper(name).details
    if first["date"]:
        figure = (directory / FIGURE).relative_to(ROOT).as_posix()
        lines += ["", f"![{first['figure']} of {first['title']}](../{figure})"]
        table = read_results(directory)
        if details is not None and table is not None:
            lines += ["", *table_of(details(table))]
    return lines


def table_of(found: pd.DataFrame) -> list[str]:
    """Lines of a table in Markdown; all columns but the first are aligned on the right."""
    rows = [list(found.columns), ["---", *["---:"] * (len(found.columns) - 1)], *found.astype(str).to_numpy().tolist()]
    return [f"| {' | '.join(row)} |" for row in rows]


def draw(rows: list[dict[str, Json]], question: str) -> Figure:
    """Draw how far the statistic of every claim of a question is from its criterion's bound, paper by paper."""
    own = [row for row in rows if row["question"] == question and row["verdict"] != "not run"]
    papers = list(dict.fromkeys(row["paper"] for row in own))
    labels: list[str] = []
    figure, (panel,) = style.panels(1, 1.0 + 0.15 * (len(own) + len(papers)))
    for name in papers:
        labels.append(name)
        for row in own:
            if row["paper"] == name:
                draw_claim(panel, row, len(labels))
                labels.append(row["claim"])
    panel.set_yticks(range(len(labels)), labels, fontsize=6)
    for label in panel.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() in papers else "normal")
    panel.tick_params(axis="y", length=0)
    panel.set_ylim(len(labels) - 0.4, -0.6)
    panel.set_xlim(-FAR - 0.5, FAR + 0.5)
    panel.axvline(0, lw=0.8, color=style.INK)
    for end in (-1, 1):
        panel.axvline(end, lw=0.8, ls=":", color=style.MUTED)
    for place, side, text in ((-0.2, "right", "against the claim"), (0.2, "left", "for the claim")):
        panel.text(place, 1, text, ha=side, va="bottom", fontsize=7, transform=panel.get_xaxis_transform())
    panel.set_xlabel("distance from the bound, in half-widths of the interval", fontsize=7)
    for verdict, colour in COLOURS.items():
        panel.plot([], [], "o", ms=4, color=style.PALETTE[colour], label=verdict)
    panel.plot([], [], "D", ms=4, color=style.MUTED, label="exact")
    panel.plot([], [], ">", ms=4, color=style.MUTED, label=f"{FAR:g} or more")
    figure.legend(*panel.get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=7, frameon=False)
    return figure


def draw_claim(panel: Axes, row: dict[str, Json], place: int) -> None:
    """Draw the mark of one claim: a circle, a diamond without sampling error, an arrow beyond the edge."""
    (claim,) = (claim for claim in load_paper(row["paper"]).claims if claim.name == row["claim"])
    far = distance(claim.criterion, row)
    marker = "D" if row["low"] is None else ">" if far >= FAR else "<" if far <= -FAR else "o"
    shown = max(-FAR, min(FAR, far))
    panel.plot(shown, place, marker, ms=4, color=style.PALETTE[COLOURS[row["verdict"]]])


def distance(criterion: Criterion, row: dict[str, Json]) -> float:
    """Distance of a statistic from its criterion's bound in half-widths of its interval, positive for the claim."""
    mean = row["statistic"]
    if isinstance(criterion, Above):
        margin = mean - criterion.bound
    elif isinstance(criterion, Below):
        margin = criterion.bound - mean
    else:
        margin = criterion.margin - abs(mean - criterion.target)
    half = 0.0 if row["low"] is None else (row["high"] - row["low"]) / 2
    return margin / half if half else (FAR if margin >= 0 else -FAR)


def cells_of(row: dict[str, Json]) -> list[str]:
    """Cells of a claim."""
    found = "" if row["statistic"] is None else f"{row['statistic']:.3g}"
    if row["low"] is not None:
        found += f" [{row['low']:.3g}, {row['high']:.3g}]"
    smallest = "" if row["smallest_effect"] is None else f"{row['smallest_effect']:.2g}"
    if found and row["low"] is None:
        smallest = "exact"
    paper = row["statement"] if row["number"] == "-" else f"{row['statement']}; {row['number']}"
    adjusted = "" if row["p"] is None else probability(row["p"])
    criterion = f"{row['criterion']} {row['unit']}"
    cells = [row["claim"], paper, criterion, found, adjusted, smallest, row["verdict"]]
    return [str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells]


if __name__ == "__main__":
    main()
