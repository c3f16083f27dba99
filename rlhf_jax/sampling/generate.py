"""Responses to a batch of prompts: prefill, then one token a step until every row has ended."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.transformer import KVCache
from rlhf_jax.sampling.choice import choose, row_uniforms
from rlhf_jax.types import PromptBatch, Rollout


class _Decoding(NamedTuple):
    t: Array  # int32: response tokens written so far
    response: Array  # int32[B, T]
    response_mask: Array  # bool[B, T]
    ended: Array  # bool[B]
    cache: KVCache


def generate(
    policy: PolicyNetwork,
    params: PyTree,
    prompts: PromptBatch,
    key: PRNGKeyArray,
    *,
    max_new_tokens: int,
    temperature: float,
    eos_id: int,
    loop_axes: tuple[str, ...],
) -> Rollout:
    """Samples one response to each prompt, up to and including EOS or the limit.

    Args: loop_axes names the `vmap` axes around this call. The loop's predicate is reduced over them: it must be one
    boolean, or the loop would become a select over the whole cache at every token.

    Returns: the prompts with their responses, padded on the right with token 0 and a False mask.
    """
    batch, prompt_length = prompts.tokens.shape
    uniforms = row_uniforms(key, prompts.rows, max_new_tokens)

    def append(decoding: _Decoding, logits: Array) -> _Decoding:
        token = choose(logits, uniforms[:, decoding.t], temperature=temperature)
        token = jnp.where(decoding.ended, 0, token)
        return decoding._replace(
            t=decoding.t + 1,
            response=decoding.response.at[:, decoding.t].set(token),
            response_mask=decoding.response_mask.at[:, decoding.t].set(~decoding.ended),
            ended=decoding.ended | (token == eos_id),
        )

    def unfinished(decoding: _Decoding) -> Array:
        some_left = jnp.any(~decoding.ended)
        if loop_axes:
            some_left = jax.lax.pmax(some_left.astype(jnp.int32), loop_axes) > 0
        return (decoding.t < max_new_tokens) & some_left

    def advance(decoding: _Decoding) -> _Decoding:
        last = decoding.response[:, decoding.t - 1]
        logits, cache = policy.step(params, last, decoding.cache, prompt_length + decoding.t - 1)
        return append(decoding._replace(cache=cache), logits)

    logits, cache = policy.start(params, prompts.tokens, prompts.mask, prompt_length + max_new_tokens)
    blank = jnp.zeros((batch, max_new_tokens), jnp.int32)
    decoding = _Decoding(jnp.int32(0), blank, blank.astype(bool), jnp.zeros(batch, bool), cache)
    decoding = jax.lax.while_loop(unfinished, advance, append(decoding, logits))
    return Rollout(prompts.tokens, prompts.mask, decoding.response, decoding.response_mask)
