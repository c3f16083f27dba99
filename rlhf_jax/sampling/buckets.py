"""Lengths in few buckets, so that few programs serve many lengths."""

LEAST = 32
"""The smallest bucket: below it another program costs more to compile than the padding costs to compute."""


def bucket(length: int) -> int:
    """The smallest power of two, from 32, that holds so many tokens."""
    return max(LEAST, 1 << max(length - 1, 0).bit_length())


def prompt_and_slots(longest: int, new_tokens: int) -> tuple[int, int]:
    """The width to pad prompts to, and the slots of a cache that holds them and so many new tokens.

    The prompt's bucket is cut to what the new tokens leave of the cache's, rather than taking the next larger cache.
    """
    slots = bucket(longest + new_tokens)
    return min(bucket(longest), slots - new_tokens), slots
