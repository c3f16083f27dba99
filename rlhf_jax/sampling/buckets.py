"""Length buckets, so that few compiled programs serve all lengths."""

import numpy as np

from rlhf_jax.types import PromptBatch

LEAST = 32
"""Smallest bucket. For shorter ones, compiling another program would cost more than computing on padding."""


def bucket(length: int) -> int:
    """Round a length up to a power of two, at least `LEAST`."""
    return max(LEAST, 1 << max(length - 1, 0).bit_length())


def trim_prompts(prompts: PromptBatch[np.ndarray]) -> PromptBatch[np.ndarray]:
    """Cut the left padding of prompts, [..., P], to the bucket of the longest one, or leave them as they are."""
    surplus = prompts.mask.shape[-1] - bucket(int(prompts.mask.sum(axis=-1).max()))
    cut = (..., slice(max(0, surplus), None))
    return prompts._replace(tokens=prompts.tokens[cut], mask=prompts.mask[cut])
