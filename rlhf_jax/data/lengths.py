"""Lengths of a split's rows in a model's tokens, and the share of rows that are cut."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax.data import chat, pipeline
from rlhf_jax.data.pipeline import Content, DataConfig, Row
from rlhf_jax.text.tokenizer import Tokenizer

MOST_ROWS = 5000
"""Rows of a split that are measured: all, or so many at even distances."""

WARN_ABOVE = 0.05
"""Share of rows that may be cut without a warning."""

Pairs = tuple[Sequence[Content], Sequence[Content]]
"""Prompts, and the answer to each; the prompts of plain texts are None."""


def answer_pairs(rows: list[Row]) -> dict[str, Pairs]:
    """The prompt of each row with its answers: a column each, or all of a ranked row's as one."""
    if "completions" in rows[0]:
        answers = [(row["prompt"], answer) for row in rows for answer in row["completions"]]
        return {"completions": ([prompt for prompt, _ in answers], [answer for _, answer in answers])}
    columns = ("chosen", "rejected") if "chosen" in rows[0] else ("completion",)
    return {column: ([row["prompt"] for row in rows], [row[column] for row in rows]) for column in columns}


def of_answers(pairs: Mapping[str, Pairs], tokenizer: Tokenizer, config: DataConfig) -> list[dict[str, Any]]:
    """The lengths of prompts and of answers, a figure a column, as `figure` gives them.

    They are counted as `encode_pairs` counts them: BOS belongs to the prompt, EOS or the template's end of a turn to
    the answer. Of plain texts there is one figure, `text`, whose limit is that of prompt and answer together.
    """
    uncut = dataclasses.replace(config, max_prompt_tokens=2**30, max_response_tokens=2**30)
    prompts: list[int] = []
    figures = []
    for name, (asked, answers) in pairs.items():
        count = len(answers)
        chosen = range(0, count, math.ceil(count / MOST_ROWS))
        asked, answers = [asked[row] for row in chosen], [answers[row] for row in chosen]
        examples, _ = pipeline.encode_pairs(asked, answers, tokenizer, uncut)
        if asked[0] is None:
            whole = [len(example.prompt) + len(example.response) for example in examples]
            limit = config.max_prompt_tokens + config.max_response_tokens
            return [figure("text", whole, limit, "max_response_tokens", count)]
        prompts = prompts or [len(example.prompt) for example in examples]
        lengths = [len(example.response) for example in examples]
        figures.append(figure(name, lengths, config.max_response_tokens, "max_response_tokens", count))
    return [figure("prompt", prompts, config.max_prompt_tokens, "max_prompt_tokens", count), *figures]


def of_prompts(rows: list[Row], tokenizer: Tokenizer, config: DataConfig) -> list[dict[str, Any]]:
    """The lengths of prompts; nothing for plain texts, whose beginnings are prompts of a length that is chosen."""
    chosen = rows[:: math.ceil(len(rows) / MOST_ROWS)]
    if "prompt" not in rows[0] and "messages" not in rows[0]:
        return []
    contents: list[Any] = [row["prompt"] if "prompt" in row else chat.question(row["messages"]) for row in chosen]
    if isinstance(contents[0], list):
        lengths = [len(ids) for ids in tokenizer.encode_all(chat.render_prompts(contents, tokenizer))]
    else:
        lengths = [len(tokenizer.begin(ids)) for ids in tokenizer.encode_all(contents)]
    return [figure("prompt", lengths, config.max_prompt_tokens, "max_prompt_tokens", len(rows))]


def figure(column: str, lengths: Sequence[int], limit: int, field: str, rows: int) -> dict[str, Any]:
    """Percentiles of lengths in tokens, and the share that is longer than a limit, which a field of `data` sets."""
    half, most = np.percentile(lengths, [50, 95], method="higher").tolist()
    return {
        "column": column,
        "rows": rows,
        "median": half,
        "95 %": most,
        "longest": max(lengths),
        "limit": limit,
        "cut": float(np.mean(np.array(lengths) > limit)),
        "field": field,
    }


def warnings(splits: dict[str, list[dict[str, Any]]]) -> list[str]:
    """A sentence for each limit that cuts more than 5 % of a column, and what to raise it to."""
    found: dict[str, list[str]] = {}
    needed: dict[str, int] = {}
    for split, figures in splits.items():
        for one in figures:
            if one["cut"] > WARN_ABOVE:
                found.setdefault(one["field"], []).append(f"{one['cut']:.0%} of {one['column']} ({split})")
                room = one["95 %"] - one["limit"]
                needed[one["field"]] = max(needed.get(one["field"], 0), room)
    return [
        f"data.{field} cuts {', '.join(cuts)}: raise it by {needed[field]} to cut 5 % or less."
        for field, cuts in found.items()
    ]
