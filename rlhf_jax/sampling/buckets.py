"""Length buckets, so that few compiled programs serve all lengths."""

LEAST = 32
"""Smallest bucket. For shorter ones, compiling another program would cost more than computing on padding."""


def bucket(length: int) -> int:
    """Round a length up to a power of two, at least `LEAST`."""
    return max(LEAST, 1 << max(length - 1, 0).bit_length())
