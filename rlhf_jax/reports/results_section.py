"""First screen of the report, and the tables of results."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from rlhf_jax.core.statistics import t_interval
from rlhf_jax.reports import frames, table
from rlhf_jax.reports.cautions import cautions, meaningless
from rlhf_jax.reports.differences import at_equal_kl, differences, leading_method
from rlhf_jax.reports.markup import scrolling, table_of, text
from rlhf_jax.reports.matched import interval, matched_cells
from rlhf_jax.reports.origins import headline
from rlhf_jax.reports.run import Run

BOLD = "Bold: the highest score, if the intervals of its differences from all others are above 0."
NO_FINDING = "No finding: the reward model that compares the methods ranks held-out pairs no better than chance."


def first_screen(run: Run) -> str:
    """Render what was run, when and where, reasons to mistrust the results, and the finding with its interval."""
    findings = []
    if run.of_kind("evaluate", complete=True):
        findings.append(NO_FINDING if meaningless(run) else _finding(frames.comparison(run), differences(run)))
    for stage in run.of_kind("frontier", complete=True)[-1:]:
        findings += _at_kl(run, stage)
    if not run.of_kind("evaluate", complete=True) and not run.of_kind("frontier", complete=True):
        complete = ", ".join(name for name in run.stages if run.is_complete(name)) or "none"
        findings.append(f"There is no evaluation yet. Complete stages: {complete}.")
    origin = headline(run)
    return (
        (f'<p class="note">{text(origin)}</p>' if origin else "")
        + (f'<p class="note">{text(described)}</p>' if (described := _extent(run)) else "")
        + mistrusted(cautions(run))
        + "".join(f'<p class="lede">{text(finding)}</p>' for finding in findings)
    )


def mistrusted(sentences: Sequence[str]) -> str:
    """Render reasons to mistrust results; empty if there are none."""
    items = "".join(f"<li>{text(sentence)}</li>" for sentence in sentences)
    return f'<h3>What not to believe</h3><ul class="caution">{items}</ul>' if items else ""


def results(run: Run) -> str:
    """Render the tables of an evaluated run."""
    labels = dict(frames.comparison(run)[["method", "label"]].itertuples(index=False))
    best = leading_method(run)
    shown = table.columns(run)
    parts = [
        _results_table(labels, best, [column.heading for column in shown], table.cells(run)),
        f'<p class="note">{text(" ".join([*table.notes(run), BOLD]))}</p>{_meanings(shown)}',
        _win_rates(run),
        _differences(run, labels),
    ]
    if shown := table.columns(run, table.FURTHER):
        headings = [column.heading for column in shown]
        parts += [
            "<h3>Further measurements</h3>",
            _results_table(labels, best, headings, table.cells(run, table.FURTHER)),
        ]
        parts += [_meanings(shown)]
    if faced := table.opponents(run):
        parts += ["<h3>Pairwise win rates</h3>", _results_table(labels, best, faced, table.pairs_won(run))]
        parts += [f'<p class="note">{text(table.PAIRS_WON)}</p>']
    return "".join(parts)


def equal_kl(run: Run) -> str:
    """Render the scores at equal KL that a frontier stage interpolated; empty without such a stage."""
    stages = run.of_kind("frontier", complete=True)
    if not stages:
        return ""
    headings, rows = matched_cells(run.matched(stages[-1]))
    note = (
        f"{frames.frontier_score(run, stages[-1])}, interpolated between checkpoints where each run first reaches the "
        "divergence: mean over seeds [95 % interval over seeds]."
    )
    return f'<h3>Methods at equal KL</h3>{table_of(["method", *headings], rows)}<p class="note">{text(note)}</p>'


def _extent(run: Run) -> str:
    """Describe the size of a run: stages, seeds, prompts, data and wall time."""
    stages = run.stages
    seconds = sum(run.summary(name).get("time/seconds") or 0.0 for name in stages if run.is_complete(name))
    seeds = max((run.config(name)["common"].get("seeds", 1) for name in stages), default=1)
    prompts = [int(run.results()["n_prompts"].max()) for _ in run.of_kind("evaluate", complete=True)[-1:]]
    prompts += [run.config(stage)["section"]["prompts"] for stage in run.of_kind("frontier", complete=True)[-1:]]
    parts = [
        f"Stages: {', '.join(stages)}" if stages else "No stage yet",
        f"{seeds} seed{'s' if seeds > 1 else ''}",
        *(f"{count} test prompts" for count in dict.fromkeys(prompts)),
        *(f"data: {name}" for name in _data(run)),
        f"{seconds:,.0f} s of wall time",
    ]
    return "; ".join(parts) + "."


def _data(run: Run) -> list[str]:
    """Names of the training data of all stages: the name of a file, or of a data set."""
    sources = dict.fromkeys(str(run.config(name)["common"]["data"]["train"]) for name in run.stages)
    return [source if ":" in source else Path(source).name for source in sources]


def _finding(results: pd.DataFrame, gaps: pd.DataFrame) -> str:
    means = results.groupby("method", sort=False)[["score", "kl", "win_rate"]].mean()
    labels, kinds = (dict(zip(results["method"], results[name], strict=True)) for name in ("label", "kind"))
    best, start = frames.best_method(results), results.loc[results["reference"], "method"].iloc[0]
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


def _at_kl(run: Run, stage: str) -> list[str]:
    """Describe the best method at the largest divergence that all methods of a frontier stage reached."""
    table = run.matched(stage)
    scores = table.pivot(index="method", columns="kl", values="gold").astype(float)
    common = [kl for kl in scores.columns if scores[kl].notna().all()]
    if not common:
        return ["No divergence from the reference was reached by all methods, so that none is the best at equal KL."]
    kl = max(common)
    best = str(scores[kl].idxmax())
    row = table[(table["kl"] == kl) & (table["method"] == best)].iloc[0]
    low, high = interval(row)
    seeds = int(row["reached"])
    over = (
        f"95 % interval over {seeds} seeds: {low:.2f} to {high:.2f}" if seeds > 1 else "one seed, without an interval"
    )
    gaps = at_equal_kl(run.at_kl(stage))
    gaps = gaps[(gaps["kl"] == kl) & (gaps["method"] == best) & (gaps["low"] <= 0)]
    close = f" It does not differ significantly from {', '.join(gaps['against'])}." if len(gaps) else ""
    return [
        f"At a KL divergence of {kl:g} nats, {best} has the highest {frames.frontier_score(run, stage)}: "
        f"{row['gold']:.2f} ({over}).{close}".replace("-", "−")
    ]


def _win_rates(run: Run) -> str:
    """Render bars of the win rates against the reference: over prompts (Wilson) or, with several seeds, over seeds."""
    shown = frames.comparison(run)
    rows = []
    for label, group in shown[~shown["reference"]].groupby("label", sort=False):
        rates = group["win_rate"].to_numpy(float)
        several = len(rates) > 1
        low, high = t_interval(rates, level=0.95) if several else group[["win_low", "win_high"]].iloc[0]
        colour = frames.colour_of(run, group["method"].iloc[0])
        rows.append((str(label), float(rates.mean()), max(0.0, float(low)), min(1.0, float(high)), colour))
    if not rows:
        return ""
    start = shown.loc[shown["reference"], "label"].iloc[0]
    note = (
        f"Pairs won against {start}'s answer to the same prompt, by the {frames.judge_of(run)}, in %. Intervals: 95 %, "
        "Wilson's over prompts with one seed, Student's t over seeds with several. Line: 50 %."
    )
    return f'<h3>Win rates</h3>{intervals(rows)}<p class="note">{text(note)}</p>'


def intervals(rows: Sequence[tuple[str, float, float, float, str]]) -> str:
    """Render shares with intervals as bars from 0 to 100 %, in a table: label, share, its low and high end, colour."""
    body = "".join(
        f'<tr><th scope="row">{text(label)}</th><td class="bar" aria-hidden="true" style="--colour: var(--{colour})">'
        f'<span style="left: {100 * low:.1f}%; width: {100 * (high - low):.1f}%"></span>'
        f'<i style="left: {100 * share:.1f}%"></i></td>'
        f"<td>{100 * share:.0f} [{100 * low:.0f}, {100 * high:.0f}]</td></tr>"
        for label, share, low, high, colour in rows
    )
    head = '<tr><th scope="col"></th><td aria-hidden="true"></td><th scope="col">%</th></tr>'
    return scrolling(f'<table class="intervals"><thead>{head}</thead><tbody>{body}</tbody></table>')


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
    return f'<h3>Differences</h3>{_results_table(labels, None, names, rows)}<p class="note">{text(note)}</p>'


def _results_table(
    labels: Mapping[str, str], best: str | None, headings: Sequence[str], rows: Sequence[Sequence[str]]
) -> str:
    body = []
    for name, *values in rows:
        plain = name.removesuffix(table.CHOSEN).strip()
        label = "" if labels[plain] == plain else f" <small>{text(labels[plain])}</small>"
        cells = "".join(f"<td>{text(value)}</td>" for value in values)
        style_class = ' class="best"' if plain == best else ""
        body.append(f'<tr{style_class}><th scope="row">{text(name)}{label}</th>{cells}</tr>')
    head = "".join(f'<th scope="col">{text(heading)}</th>' for heading in headings)
    return scrolling(
        f'<table><thead><tr><th scope="col">method</th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'
    )


def _meanings(columns: Sequence[table.Column]) -> str:
    terms = "".join(f"<dt>{text(c.heading)}</dt><dd>{text(c.meaning)}</dd>" for c in columns)
    return f"<details><summary>What the columns mean</summary><dl>{terms}</dl></details>"
