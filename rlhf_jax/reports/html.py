"""`report.html`: a single self-contained file with light and dark colours and a layout for small screens."""

import io
import re
from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from rlhf_jax.reports import frames, style, table
from rlhf_jax.reports.cautions import cautions, meaningless
from rlhf_jax.reports.data_section import data
from rlhf_jax.reports.differences import differences
from rlhf_jax.reports.frames import learning_figure, learning_kinds
from rlhf_jax.reports.markup import text
from rlhf_jax.reports.origins import headline, origins
from rlhf_jax.reports.run import Run
from rlhf_jax.reports.stage_sections import stage_samples, stages

SHOWN, FOLDED = 5, 25
"""Number of prompts whose answers are shown, and of those in a fold."""

REPEATED = 60
"""Prompts of up to so many characters are repeated before each answer."""

CAPTIONS = {
    "frontier": (
        "Score against divergence",
        "Large points: the methods of the table on the test split, with bars of ±1 standard error over prompts; with "
        "several seeds, small points are seeds and the diamond is their mean. Green: Best-of-N for every n up to the "
        "pool size (band: ±1 standard error). Blue: DPO, connected in the order of β. Small dots: PPO's samples on "
        "training prompts during training, with a moving average of three that ends at PPO's point.",
    ),
    "runs": (
        "Score and divergence during training",
        "One panel per method, one line per seed, one dot per checkpoint; grey: all other methods.",
    ),
    "equal_kl": (
        "Methods at equal divergence",
        "Interpolated between checkpoints where each run first reaches the divergence. Bars: 95 % t intervals over "
        "seeds; those of two or three seeds may extend beyond the panel.",
    ),
    "win_rates": (
        "Win rates",
        "Each method's answer against the reference's answer to the same prompt. With one seed the interval is "
        "Wilson's, over prompts; with several it is Student's t over seeds, and small dots are the seeds.",
    ),
    "best_of_n": (
        "Best-of-N, by the reward model and by the judge",
        "Gain from choosing the best of n by the reward model, in the reward model's score and in the judge's; an "
        "unbiased estimate for every n from one pool of samples per prompt. Bands: ±1 standard error over prompts. "
        "Where the lines diverge, the reward model is being over-optimised (Gao et al. 2022, fig. 1).",
    ),
    "reward_calibration": (
        "The reward model on held-out pairs",
        "Left: accuracy against the probability that the Bradley-Terry model assigns to the preferred response; the "
        "dashed line is perfect calibration. Right: scores of chosen and rejected responses.",
    ),
    "reward_accuracy": (
        "Reward-model accuracy by group",
        "Groups of equal size. Dashed: chance; solid: accuracy on all pairs.",
    ),
}
CURVES_CAPTION = (
    "Faint: every step. Strong: moving average over 1/20 of all steps (1/8 if several stages share a panel); with "
    "several seeds, the mean over seeds with a band of one standard deviation. Dots: held-out data."
)

CSS = """
:root { %(light)s }
@media (prefers-color-scheme: dark) { :root { %(dark)s } }
* { box-sizing: border-box; }
html { color-scheme: light dark; -webkit-text-size-adjust: 100%%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 3rem 0 .75rem; }
h3 { font-size: 1rem; margin: 1.75rem 0 .5rem; }
p, figcaption, dd, dt, li { max-width: 44rem; }
.lede { font-size: 1.1rem; }
.caution { border-left: 4px solid; padding: .5rem 1rem .5rem 2rem; margin: 1rem 0; font-weight: 600; }
.note, figcaption { color: var(--muted); font-size: .875rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; width: 100%%; }
th, td { padding: .4rem .45rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }
th, td { vertical-align: top; }
th { color: var(--muted); font-weight: 600; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tbody th { color: inherit; font-weight: inherit; position: sticky; left: 0; background: var(--paper); }
tr.chosen th, tr.chosen td { font-weight: 650; }
td small, th small { color: var(--muted); font-weight: normal; }
dl { font-size: .875rem; display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
dt { font-weight: 600; } dd { margin: 0; color: var(--muted); }
figure { margin: 1rem 0 2rem; } figcaption { margin-top: .5rem; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figure svg { display: block; width: 100%%; min-width: 35rem; max-width: 47rem; height: auto; }
.answers { display: grid; grid-template-columns: repeat(auto-fill, minmax(13.5rem, 1fr)); gap: .75rem; }
.answer { border: 1px solid var(--rule); border-left: 3px solid var(--color, var(--rule)); border-radius: 4px; }
.answer { padding: .55rem .7rem; font-size: .9rem; line-height: 1.45; overflow-wrap: anywhere; }
.answer p { margin: .25rem 0 0; white-space: pre-wrap; }
.answer header { display: flex; justify-content: space-between; gap: .5rem; font-size: .8rem; color: var(--muted); }
.answer header b { color: var(--ink); }
h3.prose { white-space: pre-wrap; overflow-wrap: anywhere; max-width: 44rem; }
.prompt { color: var(--muted); }
details { border-top: 1px solid var(--rule); padding: .5rem 0; } details[open] { padding-bottom: 1rem; }
summary { cursor: pointer; font-weight: 600; font-size: .9375rem; }
summary small { color: var(--muted); font-weight: normal; }
pre { font: .8rem/1.5 ui-monospace, monospace; overflow-x: auto; margin: .5rem 0; }
@media (max-width: 40rem) { tbody th small { display: block; } }
td.text { text-align: left; white-space: pre-wrap; min-width: 16rem; overflow-wrap: anywhere; }
"""


def page(run: Run, figures: Mapping[str, Figure]) -> str:
    """Render the report as one HTML document without references to other files."""
    title, evaluated = run.workdir.resolve().name, bool(run.of_kind("evaluate", complete=True))
    main = [_head(run, title, evaluated)]
    if evaluated:
        main += [_results(run)]
    main += [_figure(name, *CAPTIONS[name], figure) for name, figure in figures.items() if name in CAPTIONS]
    if evaluated:
        main += [_answers(run)]
    kinds = {learning_figure(name): (kind.title or name, kind) for name, kind in learning_kinds(run).items()}
    learning = [
        _figure(name, title, kind.caption, figures[name]) for name, (title, kind) in kinds.items() if name in figures
    ]
    if learning:
        main += [
            f'<section id="learning"><h2>Learning curves</h2><p class="note">{text(CURVES_CAPTION)}</p>',
            *learning,
        ]
        main += ["</section>"]
    main += [data(run), stages(run), origins(run), stage_samples(run)]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{text(title)} · rlhf_jax</title>",
            f"<style>{CSS % _colors()}</style></head>",
            "<body><main>",
            *main,
            "</main></body></html>",
            "",
        ]
    )


# ---- sections ------------------------------------------------------------------------------------------------------


def _head(run: Run, title: str, evaluated: bool) -> str:
    warnings = "".join(f"<li>{text(sentence)}</li>" for sentence in cautions(run))
    if not evaluated:
        complete = ", ".join(name for name in run.stages if run.is_complete(name)) or "none"
        lede = f"There is no evaluation yet. Complete stages: {complete}."
    else:
        lede = "" if meaningless(run) else _lede(frames.comparison(run), differences(run))
    return (
        f"<header><h1>{text(title)}</h1>"
        + (f'<ul class="caution">{warnings}</ul>' if warnings else "")
        + (f'<p class="lede">{text(lede)}</p>' if lede else "")
        + (f'<p class="note">{text(origin)}</p>' if (origin := headline(run)) else "")
        + "</header>"
    )


def _lede(results: pd.DataFrame, gaps: pd.DataFrame) -> str:
    means = results.groupby("method", sort=False)[["score", "kl", "win_rate"]].mean()
    labels, kinds = (dict(zip(results["method"], results[name], strict=True)) for name in ("label", "kind"))
    best, start = str(means["score"].idxmax()), results.loc[results["reference"], "method"].iloc[0]
    judge = "gold" if frames.judged_by_gold(results) else "reward"
    row, sentence = means.loc[best], f"{labels[best]} has the highest {judge} score"
    pairs = {gap["against"]: gap for gap in gaps.to_dict("records") if gap["method"] == best}
    close = [labels[other] for other, gap in pairs.items() if gap["low"] <= 0]
    ties = f" It does not differ significantly from {', '.join(close)}." if close else ""
    if best == start:
        return f"{sentence}.{ties}".replace("-", "−")
    gain = pairs[start]
    over = f"{gain['seeds']} seeds" if gain["over"] == "seeds" else "prompts only, with one seed"
    at_most = "at most " if kinds[best] == "best_of_n" else ""
    return (
        f"{sentence}: {row['score']:.2f}, which is {gain['difference']:.2f} above {labels[start]} "
        f"(95 % interval over {over}: {gain['low']:.2f} to {gain['high']:.2f}). It wins {100 * row['win_rate']:.0f} % "
        f"of pairs against {labels[start]}, at a KL divergence of {at_most}{row['kl']:.1f} nats.{ties}"
    ).replace("-", "−")


def _results(run: Run) -> str:
    labels = dict(frames.comparison(run)[["method", "label"]].itertuples(index=False))
    shown = table.columns(run)
    parts = [
        _results_table(labels, [column.heading for column in shown], table.cells(run)),
        f'<p class="note">{text(" ".join(table.notes(run)))}</p>{_meanings(shown)}',
    ]
    if shown := table.columns(run, table.FURTHER):
        headings = [column.heading for column in shown]
        parts += [
            "<h3>Further measurements</h3>",
            _results_table(labels, headings, table.cells(run, table.FURTHER)),
        ]
        parts += [_meanings(shown)]
    parts.append(_differences(run, labels))
    if faced := table.opponents(run):
        parts += ["<h3>Pairwise win rates</h3>", _results_table(labels, faced, table.pairs_won(run))]
        parts += [f'<p class="note">{text(table.PAIRS_WON)}</p>']
    return f'<section id="results"><h2>Results</h2>{"".join(parts)}</section>'


def _differences(run: Run, labels: Mapping[str, str]) -> str:
    """Render the table of score differences between all pairs of methods."""
    gaps = differences(run)
    by_pair = {(gap["method"], gap["against"]): gap for gap in gaps.to_dict("records")}
    names, rows = [*labels], []
    if len(names) < 2:
        return ""
    for own in names:
        cells = []
        for other in names:
            gap = by_pair.get((own, other))
            cells.append("–" if gap is None else f"{gap['difference']:.2f} [{gap['low']:.2f}, {gap['high']:.2f}]")
        rows.append([own, *(cell.replace("-", "−") for cell in cells)])
    judge = "gold" if frames.judged_by_gold(run.results()) else "reward"
    seeds = int(gaps["seeds"].max())
    over = (
        f"over up to {seeds} seeds, paired; a method with one seed is held fixed; two such methods: over prompts"
        if seeds > 1
        else "over prompts only: with one seed they do not include the variation between seeds"
    )
    note = f"The row's {judge} score minus the column's [95 % t intervals {over}]."
    return f'<h3>Differences</h3>{_results_table(labels, names, rows)}<p class="note">{text(note)}</p>'


def _results_table(labels: Mapping[str, str], headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    body = []
    for name, *values in rows:
        plain = name.removesuffix(table.CHOSEN).strip()
        label = "" if labels[plain] == plain else f" <small>{text(labels[plain])}</small>"
        cells = "".join(f"<td>{text(value)}</td>" for value in values)
        style_class = ' class="chosen"' if name.endswith(table.CHOSEN) else ""
        body.append(f"<tr{style_class}><th>{text(name)}{label}</th>{cells}</tr>")
    head = "".join(f"<th>{text(heading)}</th>" for heading in headings)
    return (
        f'<div class="scroll"><table><thead><tr><th>method</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _meanings(columns: Sequence[table.Column]) -> str:
    return f"<dl>{''.join(f'<dt>{text(c.heading)}</dt><dd>{text(c.meaning)}</dd>' for c in columns)}</dl>"


def _answers(run: Run) -> str:
    gold = frames.judged_by_gold(run.results())
    prompts = [answers_to(prompt, rows, gold) for prompt, rows in frames.answers(run, SHOWN + FOLDED)]
    folded = ""
    if len(prompts) > SHOWN:
        more = "".join(prompts[SHOWN:])
        folded = f"<details><summary>{len(prompts) - SHOWN} more prompts</summary>{more}</details>"
    score = "gold" if gold else "reward"
    note = f"The first prompts of the test split, in the order of the data; {score} scores on the right."
    return (
        f'<section id="answers"><h2>Answers side by side</h2><p class="note">{note}</p>'
        f"{''.join(prompts[:SHOWN])}{folded}</section>"
    )


def answers_to(prompt: str, rows: pd.DataFrame, gold: bool) -> str:
    """Render the answers of all methods to one prompt."""
    cards, opening = [], prompt if len(prompt) <= REPEATED else "…"
    for _, row in rows.iterrows():
        score = f"{row['gold' if gold else 'score']:.2f}".replace("-", "−")
        color = style.colour(row["kind"])
        cards.append(
            f'<article class="answer" style="--color: {_variable(color)}"><header><b>{text(row["label"])}</b>'
            f'<span>{score}</span></header><p><span class="prompt">{text(opening)}</span>'
            f"{text(row['completion'])}</p></article>"
        )
    return f'<h3 class="prose">{text(prompt)} …</h3><div class="answers">{"".join(cards)}</div>'


# ---- figures -------------------------------------------------------------------------------------------------------


def _figure(name: str, title: str, caption: str, figure: Figure) -> str:
    level = "h3" if name.startswith("learning_") else "h2"
    below = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    drawing = f'<div class="scroll">{svg(figure, name, title)}</div>'
    return f'<{level}>{text(title)}</{level}><figure id="{name}">{drawing}{below}</figure>'


def svg(figure: Figure, name: str, title: str) -> str:
    """Render a figure as inline SVG with selectable text, the page's colours, and ids unique to the figure."""
    buffer = io.StringIO()
    with style.context():
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", drawing, flags=re.DOTALL)
    drawing = drawing.replace("xlink:href=", "href=").replace("'DejaVu Sans'", "system-ui, sans-serif")
    head = rf'<svg \1 role="img" aria-label="{text(title)}">'
    drawing = re.sub(r"<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>", head, drawing)
    drawing = re.sub(r"( id=\"|url\(#|href=\"#)", rf"\g<1>{name}-", drawing)
    return re.sub("|".join(style.DARK), lambda m: _variable(m[0]), drawing).strip()


def _variable(color: str) -> str:
    return f"var(--{color[1:]})"


def _colors() -> dict[str, str]:
    names = {"ink": style.INK, "muted": style.MUTED, "rule": style.RULE, "paper": style.PAPER}
    roles = " ".join(f"--{name}: {_variable(color)};" for name, color in names.items())
    light = " ".join(f"--{color[1:]}: {color};" for color in style.DARK)
    dark = " ".join(f"--{color[1:]}: {night};" for color, night in style.DARK.items())
    return {"light": f"{light} {roles}", "dark": dark}
