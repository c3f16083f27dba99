"""Streaming generation: one response at a time, token by token, with a KV cache kept between prompts."""

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
    """Token stream of successive responses, as in a conversation.

    Keys and values of the common prefix of a prompt and the preceding tokens (earlier responses included) are reused,
    unless the required cache size changes. Cache sizes are powers of two, so that each token of a growing conversation
    is processed about twice in total.

    Programs are compiled per bucket of prompt and cache lengths. Drawing a token is a separate program, the only
    one that a new temperature recompiles.
    """

    def __init__(self, policy: PolicyNetwork, params: PyTree) -> None:
        """Create a stream with an empty cache."""
        self._policy, self._params = policy, params
        self._ids: list[int] = []  # tokens in the cache; slot i holds the token at position i
        self._cache: KVCache | None = None

    def respond(self, prompt: Sequence[int], key: PRNGKeyArray, sampling: Sampling, *, row: int) -> Iterator[int]:
        """Yield the tokens that `generate` samples for the row with this index, including the stop token.

        The response ends early if the caller stops iterating.
        """
        logits = self._read(prompt, bucket(len(prompt) + sampling.max_new_tokens))
        distribution = dataclasses.replace(sampling, max_new_tokens=1, stop_ids=())  # the fields that drawing uses
        for t in range(sampling.max_new_tokens):
            token = choose_token(logits, key, np.array([row], np.int32), np.int32(t), distribution)
            yield (chosen := int(token[0]))
            if chosen in sampling.stop_ids:
                return
            if t + 1 < sampling.max_new_tokens:
                logits = self._decode(token, chosen)

    def _read(self, prompt: Sequence[int], slots: int) -> jax.Array:
        """Logits of the token after a prompt, reusing the cached prefix."""
        if self._cache is None or self._cache.positions.shape[1] != slots:
            self._ids, self._cache = [], empty_cache(self._policy.config, 1, slots)
        pairs = zip(self._ids, prompt[:-1], strict=False)  # at least one token must be processed for its logits
        kept = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
        width = bucket(len(prompt) - kept)
        kept = min(kept, slots - width)  # process more tokens again if the padding would not fit
        tokens, mask = pad_right([prompt[kept:]], width)
        logits, self._cache = extend(self._policy, self._params, tokens, mask, self._cache, np.int32(kept))
        self._ids = list(prompt)
        return logits

    def _decode(self, token: jax.Array, chosen: int) -> jax.Array:
        cache, self._cache = self._cache, None  # donated to the program
        logits, self._cache = decode_token(self._policy, self._params, token, cache, np.int32(len(self._ids)))
        self._ids.append(chosen)
        return logits


@functools.partial(jax.jit, static_argnums=0)
def extend(policy, params, tokens, mask, cache, kept):
    """Write tokens to the cache after its first `kept` tokens, and discard the tokens that followed those."""
    known = jnp.arange(cache.positions.shape[1], dtype=jnp.int32)[None, :] < kept
    return policy.extend(params, tokens, mask, cache._replace(positions=jnp.where(known, cache.positions, EMPTY)), kept)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def decode_token(policy, params, tokens, cache, slot):
    """Write one token to the cache at `slot`, and return the logits of the next one."""
    return policy.step(params, tokens, cache, slot)


@functools.partial(jax.jit, static_argnums=4)
def choose_token(logits, key, rows, t, sampling):
    """Draw one token per row."""
    uniforms = jax.vmap(lambda row: uniform_at(key, row, t))(jnp.asarray(rows))
    return draw(logits, uniforms, sampling)[0]
