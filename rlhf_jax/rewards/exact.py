"""Verifiable rewards: answers that are compared with the known one, such as those of GSM8K.

--config.grpo.reward_model.functions=rlhf_jax.rewards.exact:exact_answer
"""

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from rlhf_jax.types import RlhfError

FINAL = re.compile(r"#### *\$?(-?[\d,]*\.?\d+)\s*$")
"""Last line of a solution in GSM8K."""


def exact_answer(completions: Sequence[Any], answer: Sequence[Any]) -> list[float]:
    """Score a completion (a text, or a chat) 1 if it ends in `#### N` and N is the row's `answer`, else 0.

    The answer is a number, or a solution that ends in `#### N`. Raises RlhfError for any other answer.
    """
    return [
        float(
            final_number(completion if isinstance(completion, str) else completion[-1]["content"]) == reference(known)
        )
        for completion, known in zip(completions, answer, strict=True)
    ]


def final_number(solution: str) -> Decimal | None:
    """Find the number after `####` at the end of a solution, without separators; None if it does not end in one."""
    found = FINAL.search(solution)
    return Decimal(found[1].replace(",", "")) if found else None


def reference(answer: Any) -> Decimal:
    """Read a known answer: a number, or a solution. Raises RlhfError if it is neither."""
    number = final_number(str(answer))
    try:
        return Decimal(str(answer).replace(",", "")) if number is None else number
    except InvalidOperation:
        raise RlhfError(
            f"the column answer has {answer!r:.100}: give a number, or a solution that ends in #### N"
        ) from None
