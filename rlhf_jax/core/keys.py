"""Random keys by purpose."""

import zlib

import jax
from jaxtyping import PRNGKeyArray


def derive(key: PRNGKeyArray, tag: str) -> PRNGKeyArray:
    """Return the key for one purpose: the CRC-32 of `tag`, folded into `key`.

    `jax.random.split(key)[i]` equals `jax.random.fold_in(key, i)`, so that a key which is split for one purpose and
    folded with numbers for another gives both the same random numbers. A key that serves several purposes is therefore
    only ever derived from, by tags that differ; what a tag gives is folded with numbers (steps, rows), or split, or
    drawn from, and only one of these.
    """
    return jax.random.fold_in(key, zlib.crc32(tag.encode()))
