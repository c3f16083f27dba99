"""Responses to a batch of prompts: prefill, then one token a step until every row has ended."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray, PyTree

from rlhf_jax.models.config import DType
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.transformer import KVCache
from rlhf_jax.sampling.choice import Sampling, draw, row_uniforms
from rlhf_jax.types import PromptBatch, Rollout


class Generation(NamedTuple):
    """Responses, with the log-probability of each token in nats; 0 at padding."""

    rollout: Rollout
    logprobs: Array  # float32[B, T], under the distribution that the tokens were drawn from
    model_logprobs: Array  # float32[B, T], under the model's own, at temperature 1


class Decoding(NamedTuple):
    """Responses on their way: what one more step needs."""

    t: Array  # int32: response tokens written so far
    response: Array  # int32[B, T]
    response_mask: Array  # bool[B, T]
    logprobs: Array  # float32[B, T]
    model_logprobs: Array  # float32[B, T]
    ended: Array  # bool[B]
    cache: KVCache


def generate(
    policy: PolicyNetwork,
    params: PyTree,
    prompts: PromptBatch,
    key: PRNGKeyArray,
    sampling: Sampling,
    *,
    samples: int = 1,
    limits: Int[Array, "B"] | None = None,
    loop_axes: tuple[str, ...] = (),
) -> Generation:
    """Samples responses to each prompt, each up to and including a stop token or its limit.

    Args: samples of one prompt stand one after the other, share its prefill, and are numbered `row * samples + i`;
    limits are tokens a prompt, at most `max_new_tokens`, which is what None means. loop_axes names the `vmap` axes
    around this call: the loop's predicate is reduced over them, and must be one boolean, or the loop would become a
    select over the whole cache at every token.

    Returns: the prompts with their responses, padded on the right with token 0 and a False mask.
    """
    params = cast_weights(params, policy.config.compute_dtype)
    rows = _numbers(prompts, samples)
    uniforms = row_uniforms(key, rows, sampling.max_new_tokens)
    most = sampling.max_new_tokens
    ends = jnp.full(rows.shape, most, jnp.int32) if limits is None else jnp.repeat(limits, samples)

    def unfinished(decoding: Decoding) -> Array:
        some_left = jnp.any(~decoding.ended)
        if loop_axes:
            some_left = jax.lax.pmax(some_left.astype(jnp.int32), loop_axes) > 0
        return (decoding.t < most) & some_left

    def advance(decoding: Decoding) -> Decoding:
        return step(policy, params, decoding, prompts.tokens.shape[1], uniforms, ends, sampling)

    decoding = start(policy, params, prompts, uniforms, ends, sampling, samples=samples)
    decoding = jax.lax.while_loop(unfinished, advance, decoding)
    prompt, mask = (jnp.repeat(leaf, samples, axis=0) for leaf in (prompts.tokens, prompts.mask))
    rollout = Rollout(prompt, mask, decoding.response, decoding.response_mask)
    return Generation(rollout, decoding.logprobs, decoding.model_logprobs)


def cast_weights(params: PyTree, dtype: DType) -> PyTree:
    """Matrices in the dtype that they are multiplied in, to which every step would otherwise cast them all.

    The compiler need not move the cast out of the loop. Norms and adapters are computed in float32, and stay so.
    """

    def cast(path: tuple, leaf: Array) -> Array:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        return leaf.astype(dtype) if name in ("kernel", "embedding", "head") else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


def start(
    policy: PolicyNetwork,
    params: PyTree,
    prompts: PromptBatch,
    uniforms: Array,
    ends: Array,
    sampling: Sampling,
    *,
    samples: int = 1,
) -> Decoding:
    """Prefill, and the first token of every response."""
    most = sampling.max_new_tokens
    logits, cache = policy.start(params, prompts.tokens, prompts.mask, prompts.tokens.shape[1] + most)
    if samples > 1:
        logits, cache = jax.tree.map(lambda leaf: jnp.repeat(leaf, samples, axis=0), (logits, cache))
    blank = jnp.zeros((logits.shape[0], most), jnp.int32)
    none = jnp.zeros(blank.shape, jnp.float32)
    ended = jnp.zeros(blank.shape[0], bool)
    decoding = Decoding(jnp.int32(0), blank, blank.astype(bool), none, none, ended, cache)
    return _append(decoding, logits, uniforms, ends, sampling)


def step(
    policy: PolicyNetwork,
    params: PyTree,
    decoding: Decoding,
    prompt_length: int,
    uniforms: Array,
    ends: Array,
    sampling: Sampling,
) -> Decoding:
    """One more token of every response that has not ended."""
    last = decoding.response[:, decoding.t - 1]
    logits, cache = policy.step(params, last, decoding.cache, prompt_length + decoding.t - 1)
    return _append(decoding._replace(cache=cache), logits, uniforms, ends, sampling)


def is_stop(tokens: Int[Array, "*rows"], stop_ids: tuple[int, ...]) -> Bool[Array, "*rows"]:
    """Which tokens end a response."""
    found = jnp.zeros(tokens.shape, bool)
    for stop in stop_ids:
        found |= tokens == stop
    return found


def _numbers(prompts: PromptBatch, samples: int) -> Int[Array, "B"]:
    return (prompts.rows[:, None] * samples + jnp.arange(samples, dtype=jnp.int32)[None, :]).reshape(-1)


def _append(decoding: Decoding, logits: Array, uniforms: Array, ends: Array, sampling: Sampling) -> Decoding:
    t, going = decoding.t, ~decoding.ended
    token, *logprobs = draw(logits, uniforms[:, t], sampling)
    token = jnp.where(going, token, 0)
    logprob, model_logprob = (jnp.where(going, value, 0) for value in logprobs)
    return decoding._replace(
        t=t + 1,
        response=decoding.response.at[:, t].set(token),
        response_mask=decoding.response_mask.at[:, t].set(going),
        logprobs=decoding.logprobs.at[:, t].set(logprob),
        model_logprobs=decoding.model_logprobs.at[:, t].set(model_logprob),
        ended=decoding.ended | is_stop(token, sampling.stop_ids) & going | (t + 1 >= ends),
    )
