"""Lengths in few buckets, so that few programs serve many lengths."""

LEAST = 32
"""The smallest bucket: below it another program costs more to compile than the padding costs to compute."""


def bucket(length: int) -> int:
    """The smallest power of two, from 32, that holds so many tokens."""
    return max(LEAST, 1 << max(length - 1, 0).bit_length())
