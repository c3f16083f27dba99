"""The list of claims and verdicts as text, paper by paper."""

import itertools
import textwrap
from collections.abc import Iterable

from rlhf_jax.runtime.progress import duration
from rlhf_jax.types import Json


def listing(rows: Iterable[dict[str, Json]], columns: int) -> list[str]:
    """Lines of at most `columns` characters: each paper with its cost, then its claims with verdict and statistic.

    Args: rows are those of `overview`, the claims of a paper together.
    """
    lines: list[str] = []
    for name, claims in itertools.groupby(rows, key=lambda row: row["paper"]):
        own = list(claims)
        lines += [""] * bool(lines) + _wrapped(f"{name}: {own[0]['title']} ({own[0]['source']})", 0, columns)
        lines += _wrapped(ran(own[0]), 2, columns)
        for row in own:
            lines += _wrapped(f"{row['verdict']}: {row['claim']}", 2, columns)
            if row["statistic"] is not None:
                lines += _wrapped(measured(row), 6, columns)
    return lines


def ran(row: dict[str, Json]) -> str:
    """Describe a paper's run by scale, seeds, cost, date and commit, or its expected cost if it was not run."""
    if row["date"] is None:
        return f"not run at scale {row['scale']}: {row['cost']}"
    seeds = f"{row['seeds']} {'seed' if row['seeds'] == 1 else 'seeds'}"
    took = f"{duration(row['seconds'])} of one core"
    return f"scale {row['scale']}, {seeds}, {took}, {row['date'][:10]}, commit {row['commit'][:12]}"


def measured(row: dict[str, Json]) -> str:
    """Describe a claim's statistic by mean, interval, criterion, and p adjusted for the question's claims."""
    text = f"{row['statistic']:.3g}"
    if row["low"] is not None:
        text += f" [{row['low']:.3g}, {row['high']:.3g}]"
    text += f" {row['unit']}; criterion: {row['criterion']}"
    if row["p"] is None:
        return text
    p = probability(row["p"])
    return f"{text}; p {p}" if p.startswith("<") else f"{text}; p = {p}"


def probability(p: float) -> str:
    """Write a p-value with two significant digits, down to 0.001."""
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def _wrapped(text: str, indent: int, columns: int) -> list[str]:
    return textwrap.wrap(
        text,
        columns,
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent + 4),
        break_long_words=False,
        break_on_hyphens=False,
    )
