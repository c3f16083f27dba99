"""Any number of rows through a compiled function of a fixed batch: sampling, scoring and log-probabilities at scale."""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from rlhf_jax.core import kl, logprobs
from rlhf_jax.models.head import TokenStats
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.scalars import ScalarNetwork
from rlhf_jax.sampling.choice import Sampling, stated_temperature
from rlhf_jax.sampling.continuous import default_refill, generate_queue
from rlhf_jax.sampling.generate import generate
from rlhf_jax.types import PromptBatch, Rollout, TokenBatch


class Divergences(NamedTuple):
    """Estimates of KL(pi || pi_ref) from each response, sums of its tokens' in nats: float32[N] each."""

    k1: np.ndarray  # unbiased, of either sign
    k3: np.ndarray  # unbiased, of lower variance, never negative


Rows = TypeVar("Rows")
"""A pytree of arrays whose first axis is that of rows."""


def map_batches(function: Callable[[Rows], PyTree], arrays: Rows, batch_size: int, *, each: int = 1) -> PyTree:
    """A function of all rows, `batch_size` at a time, in NumPy. The last batch is filled up with its last row.

    Args: each is how many rows the function gives for one.
    """
    count = len(jax.tree.leaves(arrays)[0])
    parts = []
    for start in range(0, count, batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), count - 1)
        parts.append(function(jax.tree.map(lambda leaf, rows=rows: leaf[rows], arrays)))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[: count * each], *parts)


QUEUE = 32
"""The most rows that go through the slots in one program, in multiples of the slots: what the device has to hold."""


def sample_all(
    policy: PolicyNetwork,
    params: PyTree,
    prompts: tuple[np.ndarray, np.ndarray],
    key: PRNGKeyArray,
    sampling: Sampling,
    *,
    samples: int,
    batch_size: int,
    first: int = 0,
    limits: np.ndarray | None = None,
    stop_strings: np.ndarray | None = None,
) -> Rollout:
    """`samples` responses to each of N prompts (tokens and mask, left-padded): a Rollout of N * samples rows, grouped.

    Row i * samples + j is sample j of prompt i, and is drawn with the number of that row where `first` prompts stand
    before: the batch size changes nothing. Samples of a prompt share its prefill where they fit into a batch.

    Where rows are left after the first batch, its lengths say how those are sampled. Where they are uneven, through
    `batch_size` slots, each of which takes the next prompt as soon as it is free: then nobody waits for the longest of
    a batch. Where most have nearly the same length, batch by batch, which costs less a token. Which it is changes no
    row, but by the rounding of the last bits.

    Args: limits (tokens a prompt, int32[N]) and stop_strings as in `generate`.
    """
    shared = samples if samples <= batch_size else 1
    tokens, mask = (np.repeat(array, samples // shared, axis=0) for array in prompts)
    rows = PromptBatch(tokens, mask, np.arange(len(tokens), dtype=np.int32) + first * (samples // shared))
    most = np.full(len(prompts[0]), sampling.max_new_tokens) if limits is None else limits
    asked = (rows, np.repeat(most.astype(np.int32), samples // shared))
    at_once = batch_size // shared

    def of_batch(part: tuple[PromptBatch, np.ndarray]) -> Rollout:
        return _generate(policy, params, *part, key, sampling, shared, stop_strings)

    begun = map_batches(of_batch, _rows(asked, slice(at_once)), at_once, each=shared)
    rest = _rows(asked, slice(at_once, None))
    if not len(rest[1]):
        return begun
    if not _uneven(begun):
        return _joined([begun, map_batches(of_batch, rest, at_once, each=shared)])
    parts = [begun]
    size = min(at_once * QUEUE, 1 << (len(rest[1]) - 1).bit_length())  # few programs for many numbers of prompts
    for start in range(0, len(rest[1]), size):
        part, most = _rows(rest, slice(start, start + size))
        count = len(most)
        filled = _rows(part, np.minimum(np.arange(size), count - 1))
        most = np.pad(most, (0, size - count))  # at a limit of 0 nothing is sampled
        found = sample_queue(policy, params, filled, most, key, sampling, shared, stop_strings, at_once * shared)
        parts.append(_rows(jax.device_get(found), slice(count * shared)))
    return _joined(parts)


def _uneven(rollout: Rollout) -> bool:
    """Whether rows wait so long for the longest that a queue pays: on two CPU cores, from about 0.7 of its length."""
    lengths = rollout.response_mask.sum(axis=1)
    return bool(lengths.mean() < 2 / 3 * lengths.max())


def _rows(arrays: Rows, which: slice | np.ndarray) -> Rows:
    return jax.tree.map(lambda leaf: leaf[which], arrays)


def _joined(parts: list[Rollout]) -> Rollout:
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def score_all(network: ScalarNetwork, params: PyTree, rollout: Rollout, batch_size: int) -> np.ndarray:
    """A reward model's score of every row: float32[N]."""
    return map_batches(lambda batch: _scores(network, params, batch), rollout, batch_size)


def sequence_kl(
    policy: PolicyNetwork,
    params: PyTree,
    reference: tuple[PolicyNetwork, PyTree],
    rollout: Rollout,
    *,
    batch_size: int,
    temperature: float,
) -> np.ndarray:
    """The k1 estimate log pi(y|x) - log pi_ref(y|x) of every row, in nats, EOS included: float32[N].

    Args: temperature at which the rows were sampled. Both policies are taken at this temperature, and at 1 for greedy
    rows (temperature 0; see `stated_temperature`). The mean of greedy rows is no unbiased estimate of a KL.
    """
    temperature = stated_temperature(temperature)

    def of_batch(batch: Rollout) -> jax.Array:
        own = logprobs_of(policy, params, batch, temperature)
        return _summed_k1(own, logprobs_of(*reference, batch, temperature), batch.response_mask)

    return map_batches(of_batch, rollout, batch_size)


def sequence_divergences(
    policy: PolicyNetwork,
    params: PyTree,
    reference: tuple[PolicyNetwork, PyTree],
    rollout: Rollout,
    *,
    batch_size: int,
    temperature: float,
) -> Divergences:
    """What `sequence_kl` gives, with the k3 estimate beside it, from the same forward passes."""
    temperature = stated_temperature(temperature)

    def of_batch(batch: Rollout) -> Divergences:
        own = logprobs_of(policy, params, batch, temperature)
        theirs = logprobs_of(*reference, batch, temperature)
        mask = batch.response_mask
        return Divergences(_summed_k1(own, theirs, mask), _summed_k3(own, theirs, mask))

    return map_batches(of_batch, rollout, batch_size)


def response_logprobs_all(
    policy: PolicyNetwork, params: PyTree, rollout: Rollout, batch_size: int, *, temperature: float = 1.0
) -> np.ndarray:
    """Log-probability of every response token, in nats, by default the model's own: float32[N, T].

    Those at padding have no meaning.
    """
    return map_batches(lambda batch: logprobs_of(policy, params, batch, temperature), rollout, batch_size)


def sequence_stats_all(policy: PolicyNetwork, params: PyTree, data: TokenBatch, batch_size: int) -> TokenStats:
    """Statistics of every predicted token of every sequence: arrays [N, S-1]."""
    return map_batches(lambda batch: _sequence_stats(policy, params, batch), data, batch_size)


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def _generate(policy, params, prompts, limits, key, sampling, samples, stop_strings):
    found = generate(policy, params, prompts, key, sampling, samples=samples, limits=limits, stop_strings=stop_strings)
    return found.rollout


@functools.partial(jax.jit, static_argnums=(0, 5, 6, 8))
def sample_queue(policy, params, prompts, limits, key, sampling, samples, stop_strings, slots):
    """Sample by continuous batching, in one compiled program."""
    found, _ = generate_queue(
        policy,
        params,
        prompts,
        key,
        sampling,
        slots=slots,
        refill=default_refill(slots, samples),
        samples=samples,
        limits=limits,
        stop_strings=stop_strings,
    )
    return found.rollout


@functools.partial(jax.jit, static_argnums=0)
def _scores(network, params, rollout):
    return network.scores(params, rollout)


@functools.partial(jax.jit, static_argnums=(0, 3))
def logprobs_of(policy, params, rollout, temperature):
    """Log-probabilities of the response tokens, of one batch in one compiled program."""
    return policy.response_stats(params, rollout, temperature=temperature).logprobs


@jax.jit
def _summed_k1(own, reference, mask):
    return logprobs.sequence_logprobs(kl.k1(own, reference), mask)


@jax.jit
def _summed_k3(own, reference, mask):
    return logprobs.sequence_logprobs(kl.k3(own, reference), mask)


@functools.partial(jax.jit, static_argnums=0)
def _sequence_stats(policy, params, batch):
    return policy.sequence_stats(params, batch)
