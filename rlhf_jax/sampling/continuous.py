"""Continuous batching: a fixed number of slots on the device, each of which takes the next prompt when it is free.

The cache is a ring. Every slot of the device writes its next token's keys and values at the same place, `t` modulo the
ring's length, as if all had begun together; a new prompt is put into the places just before it. No sequence is longer
than the ring, so that it never overwrites itself, and what it sees is decided by its tokens' positions alone. The step
of decoding is therefore the same as without a queue.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.transformer import EMPTY, KVCache, empty_cache
from rlhf_jax.sampling.choice import Sampling, draw, uniform_at
from rlhf_jax.sampling.generate import Generation, cast_weights, is_stop
from rlhf_jax.types import PromptBatch, Rollout


class _Slots(NamedTuple):
    """What the slots hold, and what has come out of them.

    What a slot without a prompt would write goes to a row of its own beyond the last one, and is dropped: all indices
    then differ, and a scatter need not take one after the other (on GPUs, and above all in a deterministic program).
    """

    time: Array  # int32: steps taken; the ring's place of the next token is `time` modulo its length
    queue: Array  # int32: prompts taken so far
    prompt: Array  # int32[slots]: which prompt, or N
    last: Array  # int32[slots]: its last token
    length: Array  # int32[slots]: response tokens written
    cache: KVCache
    response: Array  # int32[N, T]
    response_mask: Array  # bool[N, T]
    logprobs: Array  # float32[N, T]
    model_logprobs: Array  # float32[N, T]
    steps: Array  # int32: decoding steps, for those who measure


def default_refill(slots: int) -> int:
    """How many slots fall free before a prefill: few, so that little idles, but so many that a prefill is a batch."""
    return max(2, slots // 8)


def generate_queue(
    policy: PolicyNetwork,
    params: PyTree,
    prompts: PromptBatch,
    key: PRNGKeyArray,
    sampling: Sampling,
    *,
    slots: int,
    refill: int,
    limits: Int[Array, "N"] | None = None,
) -> tuple[Generation, Int[Array, ""]]:
    """One response to each of N prompts, by `slots` rows at a time: what `generate` gives for the same rows and key.

    Args: a prefill of `refill` prompts is made as soon as so many slots are free, or fewer prompts are left; limits are
    tokens a prompt. Not for use under `vmap`, where both branches of a refill would be run at every step.
    Returns: the responses in the order of the prompts, and the number of decoding steps taken.
    """
    params = cast_weights(params, policy.config.compute_dtype)
    count, prompt_length = prompts.tokens.shape
    ring = prompt_length + sampling.max_new_tokens
    slots, refill = min(slots, count), min(refill, slots, count)
    ends = jnp.full(count, sampling.max_new_tokens, jnp.int32) if limits is None else limits
    ends = jnp.append(ends, 0)
    numbers = jnp.append(prompts.rows, 0)
    blank = jnp.zeros((count, sampling.max_new_tokens), jnp.int32)
    nothing = jnp.zeros(blank.shape, jnp.float32)

    def put(whole: Array, index: Array | tuple, part: Array | int) -> Array:
        return whole.at[index].set(part, mode="drop", unique_indices=True)

    def write(state: _Slots, rows: Array, slot: Array, length: Array, logits: Array) -> _Slots:
        """The next token of some slots, given its logits; `rows` are their prompts."""
        uniforms = jax.vmap(lambda number, t: uniform_at(key, number, t))(numbers[rows], length)
        token, logprob, model_logprob = draw(logits, uniforms, sampling)
        going = rows < count
        ended = is_stop(token, sampling.stop_ids) | (length + 1 >= ends[rows])
        place = (jnp.where(going, rows, count + jnp.arange(rows.size, dtype=jnp.int32)), length)
        return state._replace(
            response=put(state.response, place, token),
            response_mask=put(state.response_mask, place, going),
            logprobs=put(state.logprobs, place, logprob),
            model_logprobs=put(state.model_logprobs, place, model_logprob),
            prompt=put(state.prompt, slot, jnp.where(ended, count, rows)),
            last=put(state.last, slot, token),
            length=put(state.length, slot, jnp.where(going, length + 1, 0)),
        )

    def take(state: _Slots) -> _Slots:
        """Prefill of the next prompts into slots that are free."""
        free = state.prompt == count
        chosen = jnp.argsort(~free, stable=True)[:refill].astype(jnp.int32)
        rows = state.queue + jnp.cumsum(free[chosen], dtype=jnp.int32) - 1
        usable = free[chosen] & (rows < count)
        rows = jnp.where(usable, rows, count)
        slot = jnp.where(usable, chosen, slots + jnp.arange(refill, dtype=jnp.int32))  # out of bounds: dropped
        source = jnp.minimum(rows, count - 1)
        logits, filled = policy.start(params, prompts.tokens[source], prompts.mask[source], prompt_length, ring)
        places = (state.time - prompt_length + jnp.arange(prompt_length, dtype=jnp.int32)) % ring
        index = (slot[:, None], slice(None), places[None, :])

        def fill(whole: Array, part: Array) -> Array:
            return put(whole, index, jnp.swapaxes(part, 1, 2))

        positions = put(state.cache.positions, slot, EMPTY)
        cache = KVCache(
            tuple(map(fill, state.cache.keys, filled.keys)),
            tuple(map(fill, state.cache.values, filled.values)),
            put(positions, (slot[:, None], places[None, :]), filled.positions),
        )
        state = state._replace(cache=cache, queue=state.queue + jnp.sum(usable, dtype=jnp.int32))
        return write(state, rows, slot, jnp.zeros(refill, jnp.int32), logits)

    def decode(state: _Slots) -> _Slots:
        """One more token of every slot."""
        logits, cache = policy.step(params, state.last, state.cache, state.time % ring)
        state = state._replace(cache=cache, time=state.time + 1, steps=state.steps + 1)
        everything = jnp.arange(slots, dtype=jnp.int32)
        return write(state, state.prompt, everything, jnp.where(state.prompt < count, state.length, 0), logits)

    def worthwhile(state: _Slots) -> Array:
        """Whether enough slots are free for a prefill."""
        free, left = jnp.sum(state.prompt == count, dtype=jnp.int32), count - state.queue
        return (left > 0) & (free >= jnp.minimum(refill, left))

    def advance(state: _Slots) -> _Slots:
        state = jax.lax.while_loop(worthwhile, take, state)
        return jax.lax.cond(jnp.any(state.prompt < count), decode, lambda state: state, state)

    state = _Slots(
        time=jnp.int32(prompt_length),
        queue=jnp.int32(0),
        prompt=jnp.full(slots, count, jnp.int32),
        last=jnp.zeros(slots, jnp.int32),
        length=jnp.zeros(slots, jnp.int32),
        cache=empty_cache(policy.config, slots, ring),
        response=blank,
        response_mask=blank.astype(bool),
        logprobs=nothing,
        model_logprobs=nothing,
        steps=jnp.int32(0),
    )
    state = jax.lax.while_loop(lambda state: (state.queue < count) | jnp.any(state.prompt < count), advance, state)
    rollout = Rollout(prompts.tokens, prompts.mask, state.response, state.response_mask)
    return Generation(rollout, state.logprobs, state.model_logprobs), state.steps
