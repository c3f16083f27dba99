"""Random keys by purpose."""

import zlib

import jax
from jaxtyping import PRNGKeyArray


def derive(key: PRNGKeyArray, tag: str) -> PRNGKeyArray:
    """Derive the key for one purpose by folding the CRC-32 of `tag` into `key`.

    `jax.random.split(key)[i]` equals `jax.random.fold_in(key, i)`, so splitting a key for one purpose and folding
    numbers into it for another gives both the same random numbers. Use a shared key only to derive keys with distinct
    tags, and use each derived key in one way: fold in numbers (steps, rows), split it, or draw from it.
    """
    return jax.random.fold_in(key, zlib.crc32(tag.encode()))
