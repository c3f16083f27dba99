"""Length buckets, so that few compiled programs serve all lengths."""

import jax
import numpy as np

from rlhf_jax.data.batching import LEAST, halved
from rlhf_jax.data.ragged import RowWidths
from rlhf_jax.types import A, PromptBatch


def bucket(length: int) -> int:
    """Round a length up to a power of two, at least `LEAST`."""
    return max(LEAST, 1 << max(length - 1, 0).bit_length())


def share_of(limit: int, length: int, *, parts: int) -> int:
    """Round a length up to a multiple of `limit` / `parts`, at most `limit`: there are at most `parts` widths.

    This is for programs that take long to compile.
    """
    step = max(LEAST, -(-limit // parts))
    return min(limit, -(-max(length, 1) // step) * step)


def last_tokens(prompts: PromptBatch[A], width: int) -> PromptBatch[A]:
    """Take the last `width` positions of left-padded prompts, [..., P]."""
    last = (..., slice(prompts.tokens.shape[-1] - width, None))
    tokens, mask = jax.tree.map(lambda leaf: leaf[last], (prompts.tokens, prompts.mask))
    return prompts._replace(tokens=tokens, mask=mask)


def bucketed(needed: RowWidths) -> RowWidths:
    """Round the widths of a batch up: the sequence to 2^k or 3 * 2^(k-1), the response to one of its halves."""
    sequence = bucket(needed.sequence)
    if needed.sequence <= 3 * sequence // 4 and sequence > LEAST:
        sequence = 3 * sequence // 4
    return RowWidths(sequence, halved(sequence, needed.response))


def trim_prompts(prompts: PromptBatch[np.ndarray]) -> PromptBatch[np.ndarray]:
    """Cut the left padding of prompts, [..., P], to the bucket of the longest one, or leave them as they are."""
    return last_tokens(prompts, min(bucket(int(prompts.mask.sum(axis=-1).max())), prompts.mask.shape[-1]))
