"""The dimension letters, the batches that travel between rooms, and the one error a user sees.

Dimension letters, used in every jaxtyping annotation:

    B  rows of a batch                V  vocabulary
    P  prompt tokens (left-padded)    D  model width
    T  response tokens (right-padded) H  attention heads
    S  sequence tokens, S = P + T     K  width of one head

Masks are boolean and positive: True counts. Batches are NamedTuples of arrays whose first axis is B.
"""

from typing import Any, NamedTuple, TypeAlias

AnyArray: TypeAlias = Any
"""A `np.ndarray` on the host or a `jax.Array` on the device: batches are made on the one and used on the other."""

Json: TypeAlias = Any
"""A value of a JSON file; its reader knows its form."""

Row: TypeAlias = dict[str, Json]
"""A row of a table of data, metrics or samples, by column."""


class RlhfError(Exception):
    """Bad input: the message says what is wrong, where, and what to do. Printed without a traceback."""


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
    """Prompts with one sampled response each. The response mask is a prefix and includes EOS where there is one."""

    prompt: AnyArray  # int32[B, P]
    prompt_mask: AnyArray  # bool[B, P]
    response: AnyArray  # int32[B, T]
    response_mask: AnyArray  # bool[B, T]


class PreferenceBatch(NamedTuple):
    """Two responses to one prompt, the first preferred."""

    prompt: AnyArray  # int32[B, P]
    prompt_mask: AnyArray  # bool[B, P]
    chosen: AnyArray  # int32[B, T]
    chosen_mask: AnyArray  # bool[B, T]
    rejected: AnyArray  # int32[B, T]
    rejected_mask: AnyArray  # bool[B, T]


class UnpairedBatch(NamedTuple):
    """Prompts with one response each, and whether it is a desirable one."""

    prompt: AnyArray  # int32[B, P]
    prompt_mask: AnyArray  # bool[B, P]
    response: AnyArray  # int32[B, T]
    response_mask: AnyArray  # bool[B, T]
    label: AnyArray  # bool[B]


class LabelledPairs(NamedTuple):
    """Pairs as in PreferenceBatch, and what is known of each beside its order."""

    prompt: AnyArray  # int32[B, P]
    prompt_mask: AnyArray  # bool[B, P]
    chosen: AnyArray  # int32[B, T]
    chosen_mask: AnyArray  # bool[B, T]
    rejected: AnyArray  # int32[B, T]
    rejected_mask: AnyArray  # bool[B, T]
    margin: AnyArray  # float32[B]: by how much the chosen response should win
    votes: AnyArray  # float32[B, 2]: raters who prefer the chosen response, and the rejected one


class ComparisonBatch(NamedTuple):
    """K responses to one prompt, those that it lacks having empty masks, and which of them is preferred to which."""

    prompt: AnyArray  # int32[B, P]
    prompt_mask: AnyArray  # bool[B, P]
    responses: AnyArray  # int32[B, K, T]
    response_mask: AnyArray  # bool[B, K, T]
    wins: AnyArray  # bool[B, K, K]: the first is preferred to the second
