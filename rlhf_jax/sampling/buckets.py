"""Length buckets, so that few compiled programs serve all lengths."""

LEAST = 32
"""Smallest bucket; for shorter ones, compiling another program costs more than computing the padding."""


def bucket(length: int) -> int:
    """Round a length up to a power of two, at least 32."""
    return max(LEAST, 1 << max(length - 1, 0).bit_length())
