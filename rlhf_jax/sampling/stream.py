"""Responses a token at a time, for someone who reads along and may stop them."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from rlhf_jax.data.padding import pad_right
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.transformer import EMPTY, KVCache, empty_cache
from rlhf_jax.sampling.buckets import bucket
from rlhf_jax.sampling.choice import Sampling, draw, uniform_at


class Stream:
    """One response after another, each to a prompt that may go on from the one before, as in a conversation.

    Keys and values of what a prompt has in common with the tokens before it, those of the response included, are not
    computed again; unless the two need caches of different sizes. Those are powers of two: while it grows, a
    conversation is read about twice in all.

    A program is compiled for each bucket of tokens to be read and of caches, not for each length, and the choice of a
    token is one of its own, so that another temperature compiles only that.
    """

    def __init__(self, policy: PolicyNetwork, params: PyTree) -> None:
        """Computes nothing yet."""
        self._policy, self._params = policy, params
        self._ids: list[int] = []  # the tokens in the cache, each in the slot of its position
        self._cache: KVCache | None = None

    def respond(self, prompt: Sequence[int], key: PRNGKeyArray, sampling: Sampling, *, row: int) -> Iterator[int]:
        """The tokens that `generate` gives for the row of that number, one by one, a stop token included.

        To leave off asking for them ends the response.
        """
        logits = self._read(prompt, bucket(len(prompt) + sampling.max_new_tokens))
        distribution = dataclasses.replace(sampling, max_new_tokens=1, stop_ids=())  # what choosing depends on
        for t in range(sampling.max_new_tokens):
            token = choose_token(logits, key, np.array([row], np.int32), np.int32(t), distribution)
            yield (chosen := int(token[0]))
            if chosen in sampling.stop_ids:
                return
            if t + 1 < sampling.max_new_tokens:
                logits = self._decode(token, chosen)

    def _read(self, prompt: Sequence[int], slots: int) -> jax.Array:
        """Logits of the token after a prompt, of which a part may be in the cache."""
        if self._cache is None or self._cache.positions.shape[1] != slots:
            self._ids, self._cache = [], empty_cache(self._policy.config, 1, slots)
        pairs = zip(self._ids, prompt[:-1], strict=False)  # logits come from reading: one token at least
        kept = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
        width = bucket(len(prompt) - kept)
        kept = min(kept, slots - width)  # where the padding would not fit, more is read again
        tokens, mask = pad_right([prompt[kept:]], width)
        logits, self._cache = extend(self._policy, self._params, tokens, mask, self._cache, np.int32(kept))
        self._ids = list(prompt)
        return logits

    def _decode(self, token: jax.Array, chosen: int) -> jax.Array:
        cache, self._cache = self._cache, None  # it is given away, and there again if all goes well
        logits, self._cache = decode_token(self._policy, self._params, token, cache, np.int32(len(self._ids)))
        self._ids.append(chosen)
        return logits


@functools.partial(jax.jit, static_argnums=0)
def extend(policy, params, tokens, mask, cache, kept):
    """Read tokens after the first `kept` ones in the cache, and forget what followed those."""
    known = jnp.arange(cache.positions.shape[1], dtype=jnp.int32)[None, :] < kept
    return policy.extend(params, tokens, mask, cache._replace(positions=jnp.where(known, cache.positions, EMPTY)), kept)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def decode_token(policy, params, tokens, cache, slot):
    """Logits of the token after one more, which goes into the cache at `slot`."""
    return policy.step(params, tokens, cache, slot)


@functools.partial(jax.jit, static_argnums=4)
def choose_token(logits, key, rows, t, sampling):
    """Draw one token a row."""
    uniforms = jax.vmap(lambda row: uniform_at(key, row, t))(jnp.asarray(rows))
    return draw(logits, uniforms, sampling)[0]
