"""Token lengths of a split's rows, and the share of rows that are truncated."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax.data import chat, pipeline
from rlhf_jax.data.pipeline import Content, DataConfig, Row
from rlhf_jax.text.tokenizer import Tokenizer

MOST_ROWS = 5000
"""Maximum number of rows measured per split, evenly spaced."""

WARN_ABOVE = 0.05
"""Share of truncated rows above which a warning is given."""

Pairs = tuple[Sequence[Content], Sequence[Content]]
"""Prompts and their answers; the prompts of plain texts are None."""


def answer_pairs(rows: list[Row]) -> dict[str, Pairs]:
    """Prompts paired with each column of answers; the answers of ranked rows are one column.

    The last answers of `messages`, and plain texts, are called `completion`.
    """
    if "completions" in rows[0]:
        answers = [(row["prompt"], answer) for row in rows for answer in row["completions"]]
        return {"completions": ([prompt for prompt, _ in answers], [answer for _, answer in answers])}
    columns = [column for column in ("chosen", "rejected") if column in rows[0]] or ["completion"]
    if columns[0] not in rows[0]:
        return {"completion": pipeline.demonstration_pairs(rows)}
    return {column: ([row["prompt"] for row in rows], [row[column] for row in rows]) for column in columns}


def answer_lengths(pairs: Mapping[str, Pairs], tokenizer: Tokenizer, config: DataConfig) -> list[dict[str, Any]]:
    """Length statistics of prompts and answers, one `length_statistics` per column.

    Lengths are those of `encode_pairs`: prompts include BOS, answers EOS or the template's end of turn. Plain texts
    have one entry, `text`, limited by the sum of both maximum lengths.
    """
    uncut = dataclasses.replace(config, max_prompt_tokens=2**30, max_response_tokens=2**30)
    prompt_lengths: list[int] = []
    figures = []
    for name, (prompts, answers) in pairs.items():
        count = len(answers)
        measured = range(0, count, math.ceil(count / MOST_ROWS))
        prompts, answers = [prompts[row] for row in measured], [answers[row] for row in measured]
        examples, _ = pipeline.encode_pairs(prompts, answers, tokenizer, uncut)
        if prompts[0] is None:
            lengths = [len(example.prompt) + len(example.response) for example in examples]
            limit = config.max_prompt_tokens + config.max_response_tokens
            return [length_statistics("text", lengths, limit, "max_response_tokens", count)]
        prompt_lengths = prompt_lengths or [len(example.prompt) for example in examples]
        lengths = [len(example.response) for example in examples]
        figures.append(length_statistics(name, lengths, config.max_response_tokens, "max_response_tokens", count))
    return [length_statistics("prompt", prompt_lengths, config.max_prompt_tokens, "max_prompt_tokens", count), *figures]


def prompt_lengths(rows: list[Row], tokenizer: Tokenizer, config: DataConfig) -> list[dict[str, Any]]:
    """Length statistics of prompts; empty for plain texts, whose prompts have lengths set by the config."""
    measured = _measured(rows)
    if _are_texts(rows):
        return []
    contents: list[Any] = [row["prompt"] if "prompt" in row else chat.question(row["messages"]) for row in measured]
    if isinstance(contents[0], list):
        lengths = [len(ids) for ids in tokenizer.encode_all(chat.render_prompts(contents, tokenizer))]
    else:
        lengths = [len(tokenizer.begin(ids)) for ids in tokenizer.encode_all(contents)]
    return [length_statistics("prompt", lengths, config.max_prompt_tokens, "max_prompt_tokens", len(rows))]


def share_without_prompt(rows: list[Row], tokenizer: Tokenizer, config: DataConfig) -> float:
    """Share of plain texts that give no prompt; 0 for other rows."""
    if not _are_texts(rows):
        return 0.0
    prompts = pipeline.text_prompts([row["text"] for row in _measured(rows)], tokenizer, config)
    return prompts.count(None) / len(prompts)


def _measured(rows: list[Row]) -> list[Row]:
    return rows[:: math.ceil(len(rows) / MOST_ROWS)]


def _are_texts(rows: list[Row]) -> bool:
    return "prompt" not in rows[0] and "messages" not in rows[0]


def length_statistics(column: str, lengths: Sequence[int], limit: int, field: str, rows: int) -> dict[str, Any]:
    """Percentiles of lengths in tokens, and the share longer than `limit`, the value of `field` in `data`."""
    median, high = np.percentile(lengths, [50, 95], method="higher").tolist()
    return {
        "column": column,
        "rows": rows,
        "median": median,
        "95 %": high,
        "longest": max(lengths),
        "limit": limit,
        "cut": float(np.mean(np.array(lengths) > limit)),
        "field": field,
    }


def warnings(splits: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    """Warning for each limit that truncates more than 5 % of a column, with the increase that would avoid it."""
    truncated: dict[str, list[str]] = {}
    needed: dict[str, int] = {}
    for split, figures in splits.items():
        for column in figures:
            if column["cut"] > WARN_ABOVE:
                share = f"{column['cut']:.0%} of {column['column']} ({split})"
                truncated.setdefault(column["field"], []).append(share)
                missing = column["95 %"] - column["limit"]
                needed[column["field"]] = max(needed.get(column["field"], 0), missing)
    return [
        f"data.{field} cuts {', '.join(shares)}: raise it by {needed[field]} to cut 5 % or less."
        for field, shares in truncated.items()
    ]
