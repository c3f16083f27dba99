"""Continuous batching: a fixed number of decoding slots; a free slot takes the next prompt from the queue.

The KV cache is a ring. All slots write the keys and values of their next token at the same ring index, the step count
modulo the ring's length, as if all had started together; a new prompt is written to the indices just before it. No
sequence is longer than the ring, so none overwrites itself, and attention depends only on the positions of tokens.
Decoding steps are therefore the same as without a queue.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.transformer import EMPTY, KVCache, empty_cache
from rlhf_jax.sampling.choice import Sampling, draw, uniform_at
from rlhf_jax.sampling.generate import Generation, cast_weights, ends_response, sample_numbers
from rlhf_jax.types import PromptBatch, Rollout


class _Slots(NamedTuple):
    """State of the slots and of all responses.

    A slot without a prompt writes to its own out-of-bounds row, which is dropped. All indices are then unique, and
    scatters need not be serialised, which matters on GPUs and most of all in deterministic programs.
    """

    time: Array  # int32: the next token's ring index is `time` modulo the ring's length
    queue: Array  # int32: number of prompts taken so far
    row: Array  # int32[slots]: index of the response; N if the slot is free
    last: Array  # int32[slots]: last token
    length: Array  # int32[slots]: number of response tokens written
    progress: Array  # int32[slots]: state of the stop-string automaton
    cache: KVCache
    response: Array  # int32[N, T]
    response_mask: Array  # bool[N, T]
    logprobs: Array  # float32[N, T]
    model_logprobs: Array  # float32[N, T]
    steps: Array  # int32: number of decoding steps, for measurements


def default_refill(slots: int, samples: int = 1) -> int:
    """Number of prompts per prefill: small, so that few slots are idle, but large enough for an efficient batch."""
    return max(1, max(2, slots // 8) // samples)


def generate_queue(
    policy: PolicyNetwork,
    params: PyTree,
    prompts: PromptBatch,
    key: PRNGKeyArray,
    sampling: Sampling,
    *,
    slots: int,
    refill: int,
    samples: int = 1,
    limits: Int[Array, "B"] | None = None,
    stop_strings: Int[Array, "Q V"] | None = None,
) -> tuple[Generation, Int[Array, ""]]:
    """Generate the same responses as `generate` with at most `slots` rows in memory at a time.

    Args: refill is the number of prompts per prefill, which starts as soon as enough slots are free for their samples
    (or for those of all remaining prompts); limits are maximum tokens per prompt. Prompts with limit 0 get no
    response and cost nothing; they must come last, and pad the queue so that one program serves several lengths of it.
    Do not use this under `vmap`, where every step would execute both branches of a refill.
    Returns: the responses in the order of the prompts, and the number of decoding steps.
    Raises ValueError if there are fewer slots than samples per prompt, which share a prefill.
    """
    if slots < samples:
        raise ValueError(
            f"slots = {slots} must be at least samples = {samples}: the samples of a prompt start together"
        )
    params = cast_weights(params, policy.config.compute_dtype)
    (n_prompts, prompt_length), ring = prompts.tokens.shape, prompts.tokens.shape[1] + sampling.max_new_tokens
    count = n_prompts * samples
    slots = min(slots, count)
    refill = min(refill, slots // samples)
    ends = jnp.full(n_prompts, sampling.max_new_tokens, jnp.int32) if limits is None else limits
    total = jnp.sum(ends > 0, dtype=jnp.int32)
    ends = jnp.append(jnp.repeat(ends, samples), 0)
    numbers = jnp.append(sample_numbers(prompts, samples), 0)
    blank = jnp.zeros((count, sampling.max_new_tokens), jnp.int32)
    nothing = jnp.zeros(blank.shape, jnp.float32)

    def put(whole: Array, index: Array | tuple, part: Array | int) -> Array:
        return whole.at[index].set(part, mode="drop", unique_indices=True)

    def write(state: _Slots, rows: Array, slot: Array, length: Array, progress: Array, logits: Array) -> _Slots:
        """Draw the next token of some slots from logits; `rows` are the indices of their responses."""
        uniforms = jax.vmap(lambda number, t: uniform_at(key, number, t))(numbers[rows], length)
        token, logprob, model_logprob = draw(logits, uniforms, sampling)
        going = rows < count
        stopped, progress = ends_response(token, progress, sampling, stop_strings)
        ended = stopped | (length + 1 >= ends[rows])
        place = (jnp.where(going, rows, count + jnp.arange(rows.size, dtype=jnp.int32)), length)
        return state._replace(
            response=put(state.response, place, token),
            response_mask=put(state.response_mask, place, going),
            logprobs=put(state.logprobs, place, logprob),
            model_logprobs=put(state.model_logprobs, place, model_logprob),
            row=put(state.row, slot, jnp.where(ended, count, rows)),
            last=put(state.last, slot, token),
            length=put(state.length, slot, jnp.where(going, length + 1, 0)),
            progress=put(state.progress, slot, progress),
        )

    def take(state: _Slots) -> _Slots:
        """Prefill free slots with the next prompts."""
        free = state.row == count
        begun = jnp.minimum(jnp.minimum(jnp.sum(free, dtype=jnp.int32) // samples, refill), total - state.queue)
        offset = jnp.arange(refill * samples, dtype=jnp.int32)
        usable = offset < begun * samples
        rows = jnp.where(usable, state.queue * samples + offset, count)
        chosen = jnp.argsort(~free, stable=True)[: refill * samples].astype(jnp.int32)
        slot = jnp.where(usable, chosen, slots + offset)  # out of bounds: dropped
        source = jnp.minimum(state.queue + jnp.arange(refill, dtype=jnp.int32), n_prompts - 1)
        logits, filled = policy.start(params, prompts.tokens[source], prompts.mask[source], prompt_length, ring)
        if samples > 1:
            logits, filled = jax.tree.map(lambda leaf: jnp.repeat(leaf, samples, axis=0), (logits, filled))
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
        fresh = jnp.zeros(refill * samples, jnp.int32)
        return write(state._replace(cache=cache, queue=state.queue + begun), rows, slot, fresh, fresh, logits)

    def decode(state: _Slots) -> _Slots:
        """Decode one token in every busy slot; free slots do not advance, which could exceed the model's positions."""
        going = state.row < count
        logits, cache = policy.step(params, state.last, state.cache, state.time % ring, going)
        state = state._replace(cache=cache, time=state.time + 1, steps=state.steps + 1)
        everything, length = jnp.arange(slots, dtype=jnp.int32), jnp.where(going, state.length, 0)
        return write(state, state.row, everything, length, state.progress, logits)

    def worthwhile(state: _Slots) -> Array:
        """Return whether enough slots are free for a prefill."""
        free, left = jnp.sum(state.row == count, dtype=jnp.int32), total - state.queue
        return (left > 0) & (free >= samples * jnp.minimum(refill, left))

    def advance(state: _Slots) -> _Slots:
        state = jax.lax.while_loop(worthwhile, take, state)
        return jax.lax.cond(jnp.any(state.row < count), decode, lambda state: state, state)

    state = _Slots(
        time=jnp.int32(prompt_length),
        queue=jnp.int32(0),
        row=jnp.full(slots, count, jnp.int32),
        last=jnp.zeros(slots, jnp.int32),
        length=jnp.zeros(slots, jnp.int32),
        progress=jnp.zeros(slots, jnp.int32),
        cache=empty_cache(policy.config, slots, ring),
        response=blank,
        response_mask=blank.astype(bool),
        logprobs=nothing,
        model_logprobs=nothing,
        steps=jnp.int32(0),
    )
    state = jax.lax.while_loop(lambda state: (state.queue < total) | jnp.any(state.row < count), advance, state)
    prompt, mask = (jnp.repeat(leaf, samples, axis=0) for leaf in (prompts.tokens, prompts.mask))
    rollout = Rollout(prompt, mask, state.response, state.response_mask)
    return Generation(rollout, state.logprobs, state.model_logprobs), state.steps
