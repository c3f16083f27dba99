"""Write docs/results.md: the verdict on every claim of the papers, question by question, with figures.

    python experiments/papers/write_results.py

Every number comes from the results beside the papers; `rlhf-jax reproduce --check` recomputes the verdicts from them.
"""

from collections import Counter
from pathlib import Path

from rlhf_jax.papers.reproduce import overview
from rlhf_jax.papers.suite import FIGURE, load_paper, results_directory
from rlhf_jax.runtime.files import write_text
from rlhf_jax.types import Json

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "results.md"
QUESTIONS = {
    "preference tuning": "Does preference tuning improve on SFT alone?",
    "weak judge": "Can a weaker model judge a stronger one?",
    "reward model alone": "Is the reward model alone enough?",
    "poor data": "What does poor data cost?",
    "foundations": "Foundations",
}
VERDICTS = ("reproduced", "contradicted", "inconclusive", "not run")
INTRODUCTION = """\
# Results

Each claim of a paper has a criterion that was committed before the run that it judges. The statistic has one value per
seed (or per problem, topic, or other independent unit); the interval is Student's t at 95 %. Verdicts hold the chance
of any wrong one among the claims of a question at 5 % (Holm's method). "Smallest effect" is the one that these units
show with a chance of 80 %, alone. "Exact" statistics have no sampling error. What a paper's experiment is here, and how
it differs from the paper's, stands at the head of its `paper.py`. `rlhf-jax reproduce --check` recomputes this page's
verdicts from the committed results; `experiments/papers/write_results.py` writes the page.
"""


def main() -> None:
    """Write the page."""
    write_text(PAGE, page(overview()))


def page(rows: list[dict[str, Json]]) -> str:
    """Make the page of all claims."""
    lines = [INTRODUCTION, *summary(rows)]
    for question, heading in QUESTIONS.items():
        own = [row for row in rows if row["question"] == question]
        lines += ["", f"## {heading}"]
        for name in dict.fromkeys(row["paper"] for row in own):
            lines += ["", *of_paper([row for row in own if row["paper"] == name])]
    return "\n".join(lines) + "\n"


def summary(rows: list[dict[str, Json]]) -> list[str]:
    """Table with the number of claims of every question by verdict."""
    lines = [f"| question | papers | {' | '.join(VERDICTS)} |", "|---" + "|---:" * (1 + len(VERDICTS)) + "|"]
    for question, heading in QUESTIONS.items():
        own = [row for row in rows if row["question"] == question]
        count = Counter(row["verdict"] for row in own)
        cells = [len({row["paper"] for row in own}), *(count[verdict] for verdict in VERDICTS)]
        lines.append(f"| {heading} | {' | '.join(map(str, cells))} |")
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
    lines += ["", "| claim | paper | criterion | here | smallest effect | verdict |", "|---|---|---|---|---|---|"]
    lines += [f"| {' | '.join(cells_of(row))} |" for row in rows]
    figure = results_directory(name, first["scale"]) / FIGURE
    if first["date"]:
        lines += ["", f"![{first['figure']} of {first['title']}](../{figure.relative_to(ROOT).as_posix()})"]
    return lines


def cells_of(row: dict[str, Json]) -> list[str]:
    """Cells of a claim."""
    found = "" if row["statistic"] is None else f"{row['statistic']:.3g}"
    if row["low"] is not None:
        found += f" [{row['low']:.3g}, {row['high']:.3g}]"
    smallest = "" if row["smallest_effect"] is None else f"{row['smallest_effect']:.2g}"
    if found and row["low"] is None:
        smallest = "exact"
    cells = [row["statement"], row["number"], f"{row['criterion']} {row['unit']}", found, smallest, row["verdict"]]
    return [str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells]


if __name__ == "__main__":
    main()
