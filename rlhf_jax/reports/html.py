"""`report.html`: one file that opens offline, by day and by night, on a desk and on a telephone."""

import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from rlhf_jax.reports import frames, style, table
from rlhf_jax.reports.run import Run

SHOWN, FOLDED = 5, 25
"""Prompts whose answers stand open, and those behind a fold."""

REPEATED = 60
"""Characters of a prompt that is repeated before each of its answers."""

CAPTIONS = {
    "frontier": (
        "Score against divergence",
        "Large points: the methods of the table, on the test split, with bars of ±1 standard error over prompts; with "
        "several seeds, small points are seeds and the diamond is their mean. Green: Best-of-N for every n up to the "
        "size of its pool (band: ±1 standard error). Blue: DPO, joined in the order of β. Small dots: PPO's samples "
        "through training, to training prompts, with a line through the means of three that leads to its point.",
    ),
    "runs": (
        "The way of every run",
        "A panel a method, a line a seed, a dot a checkpoint; grey: all other methods.",
    ),
    "equal_kl": (
        "Methods at equal divergence",
        "Interpolated between checkpoints where each run first reaches the divergence; bars: ±1 standard error over "
        "seeds.",
    ),
    "win_rates": (
        "Pairs won",
        "Each method's answer against the reference's answer to the same prompt.",
    ),
    "best_of_n": (
        "Best-of-N, by the reward model and by the judge",
        "What choosing the best of n by the reward model gains in its own score, and in the judge's, from one pool of "
        "samples a prompt, without bias for every n. Bands: ±1 standard error of each mean over prompts. Where the "
        "lines part, the reward model is being exploited (Gao et al. 2022, fig. 1).",
    ),
    "reward_calibration": (
        "The reward model on held-out pairs",
        "Left: how often the response with the higher score is the chosen one, by the probability that Bradley and "
        "Terry's model gives it; on the dashed line probabilities come true.",
    ),
    "reward_accuracy": ("Where the reward model is right", "Groups of equal size. Dashed: chance; line: all pairs."),
    "learning_sft": ("Supervised fine-tuning", ""),
    "learning_reward_model": ("Reward model", "Dashed: chance."),
    "learning_dpo": ("DPO", "Dashed: where every policy starts."),
    "learning_ppo": ("PPO", ""),
    "learning_group_rl": ("Policy gradients without a value function", ""),
    "learning_online_dpo": ("Online DPO", ""),
}
CURVES_CAPTION = (
    "Faint: every step. Strong: the mean of its neighbourhood, a twentieth of all steps (an eighth where several share "
    "a panel); with several seeds, the mean over seeds with a band of one standard deviation. Dots: held-out data."
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
.note, figcaption { color: var(--muted); font-size: .875rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; width: 100%%; }
th, td { padding: .4rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }
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
    """The whole report as one HTML document, without any reference to another file."""
    title, evaluated = run.workdir.resolve().name, bool(run.of_kind("evaluate", complete=True))
    main = [_head(run, title, evaluated)]
    if evaluated:
        main += [_results(run)]
    main += [_figure(name, figure) for name, figure in figures.items() if not name.startswith("learning_")]
    if evaluated:
        main += [_answers(run)]
    learning = [_figure(name, figure) for name, figure in figures.items() if name.startswith("learning_")]
    if learning:
        main += [
            f'<section id="learning"><h2>Learning curves</h2><p class="note">{_text(CURVES_CAPTION)}</p>',
            *learning,
        ]
        main += ["</section>"]
    main += [_stages(run), _stage_samples(run)]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(title)} · rlhf_jax</title>",
            f"<style>{CSS % _colors()}</style></head>",
            "<body><main>",
            *main,
            "</main></body></html>",
            "",
        ]
    )


# ---- sections ------------------------------------------------------------------------------------------------------


def _head(run: Run, title: str, evaluated: bool) -> str:
    if not evaluated:
        complete = ", ".join(name for name in run.stages if run.is_complete(name)) or "none"
        lede = f"There is no evaluation yet. Complete stages: {complete}."
    else:
        lede = _lede(frames.comparison(run))
    return f'<header><h1>{_text(title)}</h1><p class="lede">{_text(lede)}</p></header>'


def _lede(results: pd.DataFrame) -> str:
    means = results.groupby("label", sort=False)[["score", "kl", "win_rate"]].mean()
    best, judge = means["score"].idxmax(), "gold" if frames.judged_by_gold(results) else "reward"
    start = results.loc[results["reference"], "label"].iloc[0]
    row, sentence = means.loc[best], f"{best} has the highest {judge} score"
    if best == start:
        return sentence + "."
    most = "at most " if (results.loc[results["label"] == best, "kind"] == "best_of_n").all() else ""
    return (
        f"{sentence}: {row['score']:.2f}, where {start} has {means.loc[start, 'score']:.2f}. It wins "
        f"{100 * row['win_rate']:.0f} % of pairs against {start}, {most}{row['kl']:.1f} nats away from it."
    ).replace("-", "−")


def _results(run: Run) -> str:
    labels = dict(frames.comparison(run)[["method", "label"]].itertuples(index=False))
    shown = table.columns(run)
    parts = [
        _results_table(labels, [column.heading for column in shown], table.cells(run)),
        f'<p class="note">{_text(" ".join(table.notes(run)))}</p>{_meanings(shown)}',
    ]
    if shown := table.columns(run, table.FURTHER):
        headings = [column.heading for column in shown]
        parts += [
            "<h3>Pairs and answers, more closely</h3>",
            _results_table(labels, headings, table.cells(run, table.FURTHER)),
        ]
        parts += [_meanings(shown)]
    if faced := table.opponents(run):
        parts += ["<h3>Pairs won against one another</h3>", _results_table(labels, faced, table.pairs_won(run))]
        parts += [f'<p class="note">{_text(table.PAIRS_WON)}</p>']
    return f'<section id="results"><h2>Results</h2>{"".join(parts)}</section>'


def _results_table(labels: Mapping[str, str], headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    body = []
    for name, *values in rows:
        plain = name.removesuffix(table.CHOSEN).strip()
        label = "" if labels[plain] == plain else f" <small>{_text(labels[plain])}</small>"
        cells = "".join(f"<td>{_text(value)}</td>" for value in values)
        style_class = ' class="chosen"' if name.endswith(table.CHOSEN) else ""
        body.append(f"<tr{style_class}><th>{_text(name)}{label}</th>{cells}</tr>")
    head = "".join(f"<th>{_text(heading)}</th>" for heading in headings)
    return (
        f'<div class="scroll"><table><thead><tr><th>method</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _meanings(columns: Sequence[table.Column]) -> str:
    return f"<dl>{''.join(f'<dt>{_text(c.heading)}</dt><dd>{_text(c.meaning)}</dd>' for c in columns)}</dl>"


def _answers(run: Run) -> str:
    gold = frames.judged_by_gold(run.results())
    prompts = [_answers_to(prompt, rows, gold) for prompt, rows in frames.answers(run, SHOWN + FOLDED)]
    folded = ""
    if len(prompts) > SHOWN:
        more = "".join(prompts[SHOWN:])
        folded = f"<details><summary>{len(prompts) - SHOWN} more prompts</summary>{more}</details>"
    score = "gold" if gold else "reward"
    note = f"The first prompts of the test split, chosen by nobody; on the right, the {score} score."
    return (
        f'<section id="answers"><h2>Answers side by side</h2><p class="note">{note}</p>'
        f"{''.join(prompts[:SHOWN])}{folded}</section>"
    )


def _answers_to(prompt: str, rows: pd.DataFrame, gold: bool) -> str:
    cards, opening = [], prompt if len(prompt) <= REPEATED else "…"
    for _, row in rows.iterrows():
        score = f"{row['gold' if gold else 'score']:.2f}".replace("-", "−")
        color = style.COLORS.get(row["kind"], style.OTHER)
        cards.append(
            f'<article class="answer" style="--color: {_variable(color)}"><header><b>{_text(row["label"])}</b>'
            f'<span>{score}</span></header><p><span class="prompt">{_text(opening)}</span>'
            f"{_text(row['completion'])}</p></article>"
        )
    return f'<h3 class="prose">{_text(prompt)} …</h3><div class="answers">{"".join(cards)}</div>'


def _stages(run: Run) -> str:
    rows, configs, total = [], [], 0.0
    for name in run.stages:
        config, complete = run.config(name), run.is_complete(name)
        summary = run.summary(name) if complete else {}
        seconds = summary.get("time/seconds")
        total += seconds or 0.0
        common = config["common"]
        last = common["seed"] + common.get("seeds", 1) - 1
        seeds = f"{common['seed']}" if last == common["seed"] else f"{common['seed']}–{last}"
        wall = "not complete" if seconds is None else f"{seconds:.0f} s"
        facts = ", ".join(
            f"{key.replace('_', ' ')} {_plain(value)}" for key, value in summary.items() if _is_fact(key, value)
        )
        cells = f"<td>{_text(config['section']['kind'])}</td><td>{seeds}</td><td>{wall}</td>"
        rows.append(f'<tr><th>{_text(name)}</th>{cells}<td class="text">{_text(facts)}</td></tr>')
        configs.append(_fold(name, config["section"]["kind"], _json(config)))
    return (
        '<section id="stages"><h2>Stages, times and configs</h2><div class="scroll"><table><thead><tr><th>stage</th>'
        "<th>kind</th><th>seed</th><th>wall time</th><th></th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        f'<p class="note">{total:.0f} s in all.</p><h3>Configs</h3>{"".join(configs)}</section>'
    )


def _stage_samples(run: Run) -> str:
    folds = []
    for name in run.stages:
        if run.kind(name) == "evaluate" or not (run.directory(name) / "samples.jsonl").exists():
            continue
        samples = run.samples(name)
        if len(samples):
            last = samples[samples["step"] == samples["step"].max()].head(12)
            what = "chosen of n =" if run.kind(name) == "best_of_n" else "at step"
            folds.append(_fold(name, f"{what} {last['step'].iloc[0]}", _samples(last)))
    return f'<section id="samples"><h2>Samples of each stage</h2>{"".join(folds)}</section>' if folds else ""


def _samples(rows: pd.DataFrame) -> str:
    body = []
    for _, row in rows.iterrows():
        numbers = "".join(f"<td>{_plain(row[name])}</td>" for name in ("score", "kl", "length"))
        prompt = f'<span class="prompt">{_text(row["prompt"])}</span>'
        body.append(f'<tr><td class="text">{prompt}{_text(row["completion"])}</td>{numbers}</tr>')
    head = "<th>prompt and completion</th><th>score</th><th>KL, nats</th><th>tokens</th>"
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


# ---- figures -------------------------------------------------------------------------------------------------------


def _figure(name: str, figure: Figure) -> str:
    title, caption = CAPTIONS[name]
    level = "h3" if name.startswith("learning_") else "h2"
    below = f"<figcaption>{_text(caption)}</figcaption>" if caption else ""
    drawing = f'<div class="scroll">{svg(figure, name)}</div>'
    return f'<{level}>{_text(title)}</{level}><figure id="{name}">{drawing}{below}</figure>'


def svg(figure: Figure, name: str) -> str:
    """A figure as an inline SVG: text one can select, colours that follow the page, ids that no other figure has."""
    buffer = io.StringIO()
    with style.context():
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", text, flags=re.DOTALL)
    text = text.replace("xlink:href=", "href=").replace("'DejaVu Sans'", "system-ui, sans-serif")
    head = rf'<svg \1 role="img" aria-label="{CAPTIONS[name][0]}">'
    text = re.sub(r"<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>", head, text)
    text = re.sub(r"( id=\"|url\(#|href=\"#)", rf"\g<1>{name}-", text)
    return re.sub("|".join(style.DARK), lambda m: _variable(m[0]), text).strip()


def _variable(color: str) -> str:
    return f"var(--{color[1:]})"


def _colors() -> dict[str, str]:
    names = {"ink": style.INK, "muted": style.MUTED, "rule": style.RULE, "paper": style.PAPER}
    roles = " ".join(f"--{name}: {_variable(color)};" for name, color in names.items())
    light = " ".join(f"--{color[1:]}: {color};" for color in style.DARK)
    dark = " ".join(f"--{color[1:]}: {night};" for color, night in style.DARK.items())
    return {"light": f"{light} {roles}", "dark": dark}


# ---- small things --------------------------------------------------------------------------------------------------


# Not allowed in HTML: controls, lone surrogates, and what is no character at all.
_FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def _text(value: Any) -> str:
    return html.escape(_FORBIDDEN.sub("\ufffd", str(value)))


def _fold(title: str, detail: str, body: str) -> str:
    return f"<details><summary>{_text(title)} <small>{_text(detail)}</small></summary>{body}</details>"


def _json(value: Any) -> str:
    return f"<pre>{_text(json.dumps(value, indent=2, ensure_ascii=False))}</pre>"


def _is_fact(key: str, value: Any) -> bool:
    return not key.startswith("time/") and isinstance(value, (int, float, str))


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return "–" if pd.isna(value) else f"{value:.3g}".replace("-", "−")
    return "–" if value is None else _text(value)
