"""Counts of a split's rows: repeated rows, pairs with equal answers, and rows that the training split also has."""

import json
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

from rlhf_jax.data import chat, formats
from rlhf_jax.data.pipeline import Content, Row

CONTENT = ("prompt", "chosen", "rejected", "completion", "completions", "label", "messages", "text")
"""Columns of texts, chats and labels that stages read."""


class Shared(NamedTuple):
    """Rows of a split whose prompt the training split also has, or whose content, if they have no prompts."""

    rows: int
    compared: str  # "prompt" or "content"


def repeated(rows: Sequence[Row]) -> int:
    """Count the rows whose content is that of an earlier row."""
    return len(rows) - len({_content(row) for row in rows})


def equal_answers(rows: Sequence[Row]) -> int | None:
    """Count the pairs whose chosen and rejected answers are equal; None for rows that are not pairs."""
    if not {"chosen", "rejected"} <= rows[0].keys():
        return None
    return sum(row["chosen"] == row["rejected"] for row in rows)


def shared(rows: Sequence[Row], training: Sequence[Row]) -> Shared:
    """Count the rows whose prompt is also in the training split.

    Plain texts, and rows without a prompt in either split, are compared by their whole content.
    """
    prompts, known = ([_prompt(row) for row in split] for split in (rows, training))
    if all(map(_is_empty, prompts)) or all(map(_is_empty, known)):
        contents = {_content(row) for row in training}
        return Shared(sum(_content(row) in contents for row in rows), "content")
    return Shared(_count_in(prompts, known), "prompt")


def _count_in(prompts: Iterable[Content], known: Iterable[Content]) -> int:
    found = {_hashable(prompt) for prompt in known if not _is_empty(prompt)}
    return sum(_hashable(prompt) in found for prompt in prompts if not _is_empty(prompt))


def _prompt(row: Row) -> Content:
    return row["prompt"] if "prompt" in row else chat.question(row["messages"]) if "messages" in row else None


def _is_empty(prompt: Content) -> bool:
    return prompt is None or formats.is_blank(prompt)


def _content(row: Row) -> tuple[Hashable, ...]:
    return tuple(_hashable(row[column]) if column in row else None for column in CONTENT)


def _hashable(value: Any) -> Hashable:
    return json.dumps(value, sort_keys=True) if isinstance(value, list) else value
