"""Batched sampling, scoring and log-probabilities of any number of rows, with programs of a fixed batch size."""

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int, PRNGKeyArray, PyTree

from rlhf_jax import processes
from rlhf_jax.core import kl, logprobs, masking
from rlhf_jax.core.row_sharding import ROWS, row_devices, split_rows
from rlhf_jax.core.slices import by_row, strided
from rlhf_jax.data.batching import Fit
from rlhf_jax.data.ragged import RaggedSequences, Table, sequence_table
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.scalars import ScalarNetwork
from rlhf_jax.sampling.buckets import bucketed, trim_prompts
from rlhf_jax.sampling.choice import Sampling, stated_temperature
from rlhf_jax.sampling.compiled import compiled, mesh_of, row_devices_of
from rlhf_jax.sampling.continuous import default_refill, generate_queue
from rlhf_jax.sampling.generate import generate
from rlhf_jax.types import A, PromptBatch, Rollout, Sequences, TokenBatch


class Divergences(NamedTuple):
    """Estimates of KL(pi || pi_ref) per response, summed over its tokens, in nats: float32[N] each."""

    k1: np.ndarray  # unbiased, can be negative
    k3: np.ndarray  # unbiased, lower variance, never negative


Rows = TypeVar("Rows")
"""Pytree of arrays whose first axis is the rows."""

Batch = TypeVar("Batch", bound=tuple)


def map_batches(function: Callable[[Rows], PyTree], arrays: Rows, batch_size: int, *, each: int = 1) -> PyTree:
    """Apply a function to all rows in batches of `batch_size` and concatenate the results as NumPy arrays.

    The last batch is padded with copies of the last row.

    Args: each is the number of output rows per input row.
    """
    count = len(jax.tree.leaves(arrays)[0])
    parts = []
    for start in range(0, count, batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), count - 1)
        parts.append(processes.on_host(function(jax.tree.map(lambda leaf, rows=rows: leaf[rows], arrays))))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[: count * each], *parts)


QUEUE = 32
"""Maximum number of rows queued in one program, in multiples of the slots; limits device memory."""


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
) -> Rollout[np.ndarray]:
    """Sample `samples` responses to each of N left-padded prompts (tokens and mask): a Rollout of N * samples rows.

    Row i * samples + j is sample j of prompt i. Its random key is that of row (first + i) * samples + j, independent of
    the batch size. The samples of a prompt share its prefill if they fit into a batch. Batches hold prompts of similar
    length, the longest first, and are padded to the bucket of their longest prompt. Devices share the rows of a batch.

    The response lengths of the first batch determine how the remaining rows are sampled. If they vary much, continuous
    batching with `batch_size` slots avoids waiting for the longest response of each batch; otherwise plain batches are
    used, which cost less per token. Both give the same rows up to rounding.

    Batches are plain on devices that split the weights.

    Args: limits (maximum tokens per prompt, int32[N]) and stop_strings as in `generate`.
    """
    devices = row_devices_of(params)
    shared = samples if samples <= batch_size and batch_size // samples % devices == 0 else 1
    tokens, mask = (np.repeat(array, samples // shared, axis=0) for array in prompts)
    rows = PromptBatch(tokens, mask, np.arange(len(tokens), dtype=np.int32) + first * (samples // shared))
    most = np.full(len(prompts[0]), sampling.max_new_tokens) if limits is None else limits
    order = np.argsort(-mask.sum(axis=1), kind="stable")
    requests = _rows((rows, np.repeat(most.astype(np.int32), samples // shared)), order)
    responses = _sample_in_order(policy, params, requests, key, sampling, shared, batch_size, stop_strings)
    drawn = (order[:, None] * shared + np.arange(shared)).reshape(-1)
    return Rollout(
        *(np.repeat(array, samples, axis=0) for array in prompts),
        *(_rows(array, np.argsort(drawn)) for array in responses),
    )


def _sample_in_order(
    policy: PolicyNetwork,
    params: PyTree,
    requests: tuple[PromptBatch[np.ndarray], np.ndarray],
    key: PRNGKeyArray,
    sampling: Sampling,
    samples: int,
    batch_size: int,
    stop_strings: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Sample responses to prompts with limits, in the order of the prompts: tokens and mask of the responses."""
    prompts_per_batch = batch_size // samples

    def of_batch(part: tuple[PromptBatch[np.ndarray], np.ndarray]) -> tuple[jax.Array, jax.Array]:
        prompts, limits = part
        return generate_batch(policy, params, trim_prompts(prompts), limits, key, sampling, samples, stop_strings)

    first_batch = map_batches(of_batch, _rows(requests, slice(prompts_per_batch)), prompts_per_batch, each=samples)
    rest = _rows(requests, slice(prompts_per_batch, None))
    if not len(rest[1]):
        return first_batch
    mesh = mesh_of(params)
    if not _uneven(first_batch[1]) or (mesh is not None and mesh.shape["data"] < mesh.size):
        return _concatenate([first_batch, map_batches(of_batch, rest, prompts_per_batch, each=samples)])
    parts = [first_batch]
    slots, devices = prompts_per_batch * samples, row_devices_of(params)
    power = 1 << (-(-len(rest[1]) // devices) - 1).bit_length()  # powers of two: few programs
    size = min(prompts_per_batch * QUEUE, devices * power)
    for start in range(0, len(rest[1]), size):
        part, most = _rows(rest, slice(start, start + size))
        count = len(most)
        filled = trim_prompts(_rows(part, np.minimum(np.arange(size), count - 1)))
        most = np.pad(most, (0, size - count))  # limit 0: no tokens are sampled
        responses = sample_queue(policy, params, filled, most, key, sampling, samples, stop_strings, slots)
        parts.append(_rows(processes.on_host(responses), slice(count * samples)))
    return _concatenate(parts)


def _uneven(mask: np.ndarray) -> bool:
    """Return whether continuous batching pays, by mean / maximum length; on two CPU cores it does below about 0.7."""
    lengths = mask.sum(axis=1)
    return bool(lengths.mean() < 2 / 3 * lengths.max())


def _rows(arrays: Rows, which: slice | np.ndarray) -> Rows:
    return jax.tree.map(lambda leaf: leaf[which], arrays)


def _concatenate(parts: list[Rows]) -> Rows:
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def map_table(function: Callable[[Batch], PyTree], table: Table[Batch], batch_size: int, fit: Fit) -> PyTree:
    """Apply a function to all rows in batches of similar length, padded to the widths that `fit` returns.

    The last batch is padded with copies of its last row. Returns NumPy arrays in the order of the table.
    """
    order = np.argsort(table.lengths, kind="stable")
    found = map_batches(lambda rows: function(table.padded(rows, fit(table.needed(rows)))), order, batch_size)
    return _rows(found, np.argsort(order))


def score_all(network: ScalarNetwork, params: PyTree, rollout: Rollout[np.ndarray], batch_size: int) -> np.ndarray:
    """Score every row with a reward model: float32[N]."""
    return score_sequences(network, params, RaggedSequences.of_rollout(rollout), batch_size)


def score_sequences(network: ScalarNetwork, params: PyTree, sequences: RaggedSequences, batch_size: int) -> np.ndarray:
    """Score every row with a reward model: float32[N]."""
    table = sequence_table(sequences)
    return map_table(lambda batch: score_batch(network, params, batch), table, batch_size, bucketed)


def sequence_kl(
    policy: PolicyNetwork,
    params: PyTree,
    reference: tuple[PolicyNetwork, PyTree],
    rollout: Rollout[np.ndarray],
    *,
    batch_size: int,
    temperature: float,
) -> np.ndarray:
    """k1 estimate log pi(y|x) - log pi_ref(y|x) of every row, in nats, EOS included: float32[N].

    Args: temperature is the sampling temperature. Both policies use it, or 1 for greedy rows (temperature 0; see
    `stated_temperature`). The mean over greedy rows is not an unbiased estimate of a KL divergence.
    """
    return sequence_divergences(policy, params, reference, rollout, batch_size=batch_size, temperature=temperature).k1


def sequence_divergences(
    policy: PolicyNetwork,
    params: PyTree,
    reference: tuple[PolicyNetwork, PyTree],
    rollout: Rollout[np.ndarray],
    *,
    batch_size: int,
    temperature: float,
) -> Divergences:
    """Compute the k1 estimates of `sequence_kl` and the k3 estimates from the same forward passes."""
    temperature = stated_temperature(temperature)

    def of_batch(batch: Sequences[np.ndarray]) -> Divergences:
        own = logprobs_of(policy, params, batch, temperature)
        ref = logprobs_of(*reference, batch, temperature)
        mask = batch.response_mask
        return Divergences(_summed_k1(own, ref, mask), _summed_k3(own, ref, mask))

    return map_table(of_batch, sequence_table(RaggedSequences.of_rollout(rollout)), batch_size, bucketed)


def response_logprobs_all(
    policy: PolicyNetwork, params: PyTree, rollout: Rollout[np.ndarray], batch_size: int, *, temperature: float = 1.0
) -> np.ndarray:
    """Log-probability of every response token in nats: float32[N, T], 0 at padding."""
    sequences = RaggedSequences.of_rollout(rollout)
    return logprobs_of_sequences(
        policy, params, sequences, batch_size, width=rollout.response.shape[1], temperature=temperature
    )


def logprobs_of_sequences(
    policy: PolicyNetwork,
    params: PyTree,
    sequences: RaggedSequences,
    batch_size: int,
    *,
    width: int,
    temperature: float = 1.0,
) -> np.ndarray:
    """Log-probability of every response token in nats: float32[N, width], 0 at padding."""

    def of_batch(batch: Sequences[np.ndarray]) -> np.ndarray:
        logprobs = processes.on_host(logprobs_of(policy, params, batch, temperature))
        found = np.where(batch.response_mask, logprobs, 0)[:, :width]
        return np.pad(found, ((0, 0), (0, width - found.shape[1])))

    return map_table(of_batch, sequence_table(sequences), batch_size, bucketed)


class SequenceSums(NamedTuple, Generic[A]):
    """Sums over the trained tokens of each sequence."""

    nll: Float[A, "N"]  # nats
    correct: Int[A, "N"]  # tokens that are the most likely ones
    tokens: Int[A, "N"]


def sequence_sums(
    policy: PolicyNetwork, params: PyTree, table: Table[TokenBatch[np.ndarray]], batch_size: int, fit: Fit = bucketed
) -> SequenceSums[np.ndarray]:
    """Sum negative log-likelihoods and correct predictions over the trained tokens of every sequence."""
    return map_table(lambda batch: _sequence_sums(policy, params, batch), table, batch_size, fit)


@compiled(0, 5, 6)
def generate_batch(policy, params, prompts, limits, key, sampling, samples, stop_strings):
    """Sample tokens and mask of the responses to one batch of prompts, in one compiled program."""
    prompts, limits = split_rows((prompts, limits))
    found = generate(policy, params, prompts, key, sampling, samples=samples, limits=limits, stop_strings=stop_strings)
    return found.rollout.response, found.rollout.response_mask


@compiled(0, 5, 6, 8)
def sample_queue(policy, params, prompts, limits, key, sampling, samples, stop_strings, slots):
    """Sample tokens and mask of responses by continuous batching, in one compiled program.

    Every device has its share of the slots and of the prompts, and takes prompts until its own are used up.
    """
    devices = row_devices()
    slots //= devices
    refill = default_refill(slots, samples)

    def sample(params, requests, key, stop_strings):
        prompts, limits = requests
        options = {"slots": slots, "refill": refill, "samples": samples, "limits": limits}
        found, _ = generate_queue(policy, params, prompts, key, sampling, **options, stop_strings=stop_strings)
        return found.rollout.response, found.rollout.response_mask

    if devices == 1:
        return sample(params, (prompts, limits), key, stop_strings)
    # With a stride, every device has prompts of similar length, and those without a response last.
    shares = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), strided((prompts, limits), devices))
    on_devices = jax.shard_map(sample, in_specs=(P(), ROWS, P(), P()), out_specs=ROWS, check_vma=False)
    return by_row(on_devices(params, shares, key, stop_strings), devices, each=samples)


@compiled(0)
def score_batch(network, params, sequences):
    """Scores of one batch, in one compiled program."""
    return network.scores(params, sequences)


@compiled(0, 3)
def logprobs_of(policy, params, sequences, temperature):
    """Log-probabilities of the response tokens of one batch, in one compiled program."""
    return policy.response_stats(params, sequences, temperature=temperature).logprobs


@jax.jit
def _summed_k1(own, reference, mask):
    return logprobs.sequence_logprobs(kl.k1(own, reference), mask)


@jax.jit
def _summed_k3(own, reference, mask):
    return logprobs.sequence_logprobs(kl.k3(own, reference), mask)


@compiled(0)
def _sequence_sums(policy, params, batch):
    stats, trained = policy.sequence_stats(params, batch), batch.loss_mask[:, 1:]
    correct = masking.lengths(stats.correct & trained)
    return SequenceSums(-logprobs.sequence_logprobs(stats.logprobs, trained), correct, masking.lengths(trained))
