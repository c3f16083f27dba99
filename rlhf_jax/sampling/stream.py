"""Responses a token at a time, for someone who reads along and may stop them."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from rlhf_jax.data.pipeline import pad_left
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.sampling.buckets import prompt_and_slots
from rlhf_jax.sampling.choice import Sampling, draw, uniform_at


class Stream:
    """One response to each of a few prompts: the tokens that `generate` gives for the same rows, key and sampling.

    Iterating gives, step by step, the next token of every row, or None for a row that has ended: by a stop token, which
    is its last, at `max_new_tokens`, or because it was told to. To leave the loop stops them all.

    A program is compiled for each bucket of prompts and of caches, not for each length, and the choice of a token is
    one of its own, so that another temperature compiles only that.
    """

    def __init__(
        self,
        policy: PolicyNetwork,
        params: PyTree,
        prompts: Sequence[Sequence[int]],
        key: PRNGKeyArray,
        sampling: Sampling,
        *,
        rows: Sequence[int] | None = None,
    ) -> None:
        """Computes nothing yet.

        Args: prompts are tokens, without padding; rows number them, so that each has its own random numbers: 0, 1, ...
        if they are not given.
        """
        self._policy, self._params, self._prompts = policy, params, prompts
        self._key, self._sampling = key, sampling
        self._rows = np.arange(len(prompts), dtype=np.int32) if rows is None else np.asarray(rows, np.int32)
        self._ended = [False] * len(prompts)

    def end(self, row: int) -> None:
        """Ends the response to the row-th of the prompts before its next token."""
        self._ended[row] = True

    def __iter__(self) -> Iterator[list[int | None]]:
        width, slots = prompt_and_slots(max(map(len, self._prompts)), self._sampling.max_new_tokens)
        tokens, mask = pad_left(self._prompts, width)
        logits, cache = _prefill(self._policy, self._params, tokens, mask, slots)
        distribution = dataclasses.replace(self._sampling, max_new_tokens=1, stop_ids=())  # what choosing depends on
        for t in range(self._sampling.max_new_tokens):
            token = _choose(logits, self._key, self._rows, np.int32(t), distribution)
            chosen = np.asarray(token).tolist()
            yield [None if ended else token for token, ended in zip(chosen, self._ended, strict=True)]
            for row, last in enumerate(chosen):
                self._ended[row] |= last in self._sampling.stop_ids
            if all(self._ended):
                return
            if t + 1 < self._sampling.max_new_tokens:
                logits, cache = _decode(self._policy, self._params, token, cache, np.int32(width + t))


@functools.partial(jax.jit, static_argnums=(0, 4))
def _prefill(policy, params, tokens, mask, slots):
    return policy.start(params, tokens, mask, slots)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _decode(policy, params, tokens, cache, slot):
    return policy.step(params, tokens, cache, slot)


@functools.partial(jax.jit, static_argnums=4)
def _choose(logits, key, rows, t, sampling):
    uniforms = jax.vmap(lambda row: uniform_at(key, row, t))(jnp.asarray(rows))
    return draw(logits, uniforms, sampling)[0]
