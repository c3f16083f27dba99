"""Dimension letters, the batches that all packages share, and the error for bad input.

Dimension letters, used in every jaxtyping annotation:

    B  rows of a batch                V  vocabulary
    P  prompt tokens (left-padded)    D  model width
    T  response tokens (right-padded) H  attention heads
    S  sequence tokens, S = P + T     K  width of one head

Masks are boolean and positive: True marks a token that counts. Batches are NamedTuples of arrays whose first axis is B.
"""

from typing import Any, NamedTuple, TypeAlias

AnyArray: TypeAlias = Any
"""A `np.ndarray` on the host or a `jax.Array` on the device: batches are made on the host and used on the device."""

Json: TypeAlias = Any
"""A value of a JSON file, of any form."""

Row: TypeAlias = dict[str, Json]
"""A row of a table (data, metrics or samples): values by column name."""


class RlhfError(Exception):
    """Error for bad input: the message says what is wrong, where, and what to do. Printed without a traceback."""


class TokenBatch(NamedTuple):
    """Right-padded sequences for next-token training."""

    tokens: AnyArray  # int32[B, S]
    mask: AnyArray  # bool[B, S]: a token, not padding
    loss_mask: AnyArray  # bool[B, S]: a token whose prediction is trained (never the first)


class PromptBatch(NamedTuple):
    """Left-padded prompts; `rows` numbers them within the global batch, so that each row has its own random key."""

    tokens: AnyArray  # int32[B, P]
    mask: AnyArray  # bool[B, P]
    rows: AnyArray  # int32[B]


class Rollout(NamedTuple):
    """Prompts with one sampled response each. The response mask is a prefix and includes EOS if it was sampled."""

    prompt: AnyArray  # int32[B, P]
    prompt_mask: AnyArray  # bool[B, P]
    response: AnyArray  # int32[B, T]
    response_mask: AnyArray  # bool[B, T]


class PreferenceBatch(NamedTuple):
    """Prompts with two responses each, of which `chosen` is preferred."""

    prompt: AnyArray  # int32[B, P]
    prompt_mask: AnyArray  # bool[B, P]
    chosen: AnyArray  # int32[B, T]
    chosen_mask: AnyArray  # bool[B, T]
    rejected: AnyArray  # int32[B, T]
    rejected_mask: AnyArray  # bool[B, T]


class UnpairedBatch(NamedTuple):
    """Prompts with one response each, labelled desirable (True) or undesirable."""

    prompt: AnyArray  # int32[B, P]
    prompt_mask: AnyArray  # bool[B, P]
    response: AnyArray  # int32[B, T]
    response_mask: AnyArray  # bool[B, T]
    label: AnyArray  # bool[B]


class LabelledPairs(NamedTuple):
    """Preference pairs, with margins and the votes of raters."""

    pairs: PreferenceBatch
    margin: AnyArray  # float32[B]: by how much the chosen response should win
    votes: AnyArray  # float32[B, 2]: numbers of raters who prefer the chosen and the rejected response


class ComparisonBatch(NamedTuple):
    """Prompts with up to K responses each (missing ones have empty masks), and all preferences among them."""

    prompt: AnyArray  # int32[B, P]
    prompt_mask: AnyArray  # bool[B, P]
    responses: AnyArray  # int32[B, K, T]
    response_mask: AnyArray  # bool[B, K, T]
    wins: AnyArray  # bool[B, K, K]: wins[b, i, j] if response i is preferred to response j
