"""Generation for a batch of prompts: prefill, then one token per step until every response has ended."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray, PyTree

from rlhf_jax.models.model_config import DType
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.transformer import KVCache
from rlhf_jax.sampling.choice import Sampling, draw, row_uniforms
from rlhf_jax.text.stop_strings import FOUND
from rlhf_jax.types import PromptBatch, Rollout


class Generation(NamedTuple):
    """Responses with the log-probability of each token in nats; 0 at padding."""

    rollout: Rollout
    logprobs: Array  # float32[B, T], under the sampling distribution
    model_logprobs: Array  # float32[B, T], under the model at temperature 1, without filters


class Decoding(NamedTuple):
    """State of the decode loop."""

    t: Array  # int32: number of response tokens written so far
    response: Array  # int32[B, T]
    response_mask: Array  # bool[B, T]
    logprobs: Array  # float32[B, T]
    model_logprobs: Array  # float32[B, T]
    ended: Array  # bool[B]
    progress: Array  # int32[B]: state of the stop-string automaton
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
    stop_strings: Int[Array, "Q V"] | None = None,
    loop_axes: tuple[str, ...] = (),
) -> Generation:
    """Sample responses to each prompt, up to and including a stop token, the end of a stop string, or the limit.

    Args:
        samples: responses per prompt. They are adjacent rows, share a prefill, and have indices `row * samples + i`.
        limits: maximum tokens per prompt, at most `max_new_tokens` (the default).
        stop_strings: a `stop_table`; the token that completes a stop string is the last of its response.
        loop_axes: names of the `vmap` axes around this call. The loop's predicate is reduced over them: a batched
            predicate would turn the loop into a select over the whole cache at every token.

    Returns: the prompts with their responses, padded on the right with token 0 and a False mask.
    """
    params = cast_weights(params, policy.config.compute_dtype)
    rows = sample_numbers(prompts, samples)
    uniforms = row_uniforms(key, rows, sampling.max_new_tokens)
    most = sampling.max_new_tokens
    ends = jnp.full(rows.shape, most, jnp.int32) if limits is None else jnp.repeat(limits, samples)

    def unfinished(decoding: Decoding) -> Array:
        some_left = jnp.any(~decoding.ended)
        if loop_axes:
            some_left = jax.lax.pmax(some_left.astype(jnp.int32), loop_axes) > 0
        return (decoding.t < most) & some_left

    def append(decoding: Decoding, logits: Array) -> Decoding:
        return _append(decoding, logits, uniforms, ends, sampling, stop_strings)

    def advance(decoding: Decoding) -> Decoding:
        """Decode one more token of every response that has not ended."""
        last = decoding.response[:, decoding.t - 1]
        logits, cache = policy.step(params, last, decoding.cache, prompts.tokens.shape[1] + decoding.t - 1)
        return append(decoding._replace(cache=cache), logits)

    decoding = append(*_prefill(policy, params, prompts, most, samples))
    decoding = jax.lax.while_loop(unfinished, advance, decoding)
    prompt, mask = (jnp.repeat(leaf, samples, axis=0) for leaf in (prompts.tokens, prompts.mask))
    rollout = Rollout(prompt, mask, decoding.response, decoding.response_mask)
    return Generation(rollout, decoding.logprobs, decoding.model_logprobs)


def cast_weights(params: PyTree, dtype: DType) -> PyTree:
    """Cast weight matrices to the compute dtype once, because the compiler may not hoist the cast out of the loop.

    Norms and adapters are computed in float32 and are not cast.
    """

    def cast(path: tuple, leaf: Array) -> Array:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        return leaf.astype(dtype) if name in ("kernel", "embedding", "head") else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


def _prefill(
    policy: PolicyNetwork, params: PyTree, prompts: PromptBatch, most: int, samples: int
) -> tuple[Decoding, Array]:
    """Prefill the cache; return the initial state and the logits of the first token."""
    logits, cache = policy.start(params, prompts.tokens, prompts.mask, prompts.tokens.shape[1] + most)
    if samples > 1:
        logits, cache = jax.tree.map(lambda leaf: jnp.repeat(leaf, samples, axis=0), (logits, cache))
    blank = jnp.zeros((logits.shape[0], most), jnp.int32)
    none = jnp.zeros(blank.shape, jnp.float32)
    nothing = jnp.zeros(blank.shape[0], jnp.int32)
    return Decoding(jnp.int32(0), blank, blank.astype(bool), none, none, nothing.astype(bool), nothing, cache), logits


def is_stop(tokens: Int[Array, "*rows"], stop_ids: tuple[int, ...]) -> Bool[Array, "*rows"]:
    """Mark the tokens that are stop tokens."""
    stops = jnp.zeros(tokens.shape, bool)
    for stop in stop_ids:
        stops |= tokens == stop
    return stops


def ends_response(
    tokens: Int[Array, "B"], progress: Int[Array, "B"], sampling: Sampling, stop_strings: Int[Array, "Q V"] | None
) -> tuple[Bool[Array, "B"], Int[Array, "B"]]:
    """Mark the tokens that end a response by themselves or by completing a stop string; also advance `progress`."""
    stopped = is_stop(tokens, sampling.stop_ids)
    if stop_strings is None:
        return stopped, progress
    progress = stop_strings[progress, tokens]
    return stopped | (progress == FOUND), progress


def sample_numbers(prompts: PromptBatch, samples: int) -> Int[Array, "N"]:
    """Global index of each of the N = B * samples responses; its random key is derived from it."""
    return (prompts.rows[:, None] * samples + jnp.arange(samples, dtype=jnp.int32)[None, :]).reshape(-1)


def _append(
    decoding: Decoding,
    logits: Array,
    uniforms: Array,
    ends: Array,
    sampling: Sampling,
    stop_strings: Array | None,
) -> Decoding:
    t, going = decoding.t, ~decoding.ended
    token, *logprobs = draw(logits, uniforms[:, t], sampling)
    token = jnp.where(going, token, 0)
    logprob, model_logprob = (jnp.where(going, value, 0) for value in logprobs)
    stopped, progress = ends_response(token, decoding.progress, sampling, stop_strings)
    return decoding._replace(
        t=t + 1,
        response=decoding.response.at[:, t].set(token),
        response_mask=decoding.response_mask.at[:, t].set(going),
        logprobs=decoding.logprobs.at[:, t].set(logprob),
        model_logprobs=decoding.model_logprobs.at[:, t].set(model_logprob),
        ended=decoding.ended | stopped & going | (t + 1 >= ends),
        progress=progress,
    )
