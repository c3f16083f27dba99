"""Any number of rows through a compiled function of a fixed batch: sampling, scoring and log-probabilities at scale."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from rlhf_jax.core import kl, logprobs
from rlhf_jax.models.head import TokenStats
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.scalars import ScalarNetwork
from rlhf_jax.sampling.choice import Sampling
from rlhf_jax.sampling.generate import generate
from rlhf_jax.types import PromptBatch, Rollout, TokenBatch


class Divergences(NamedTuple):
    """Estimates of KL(pi || pi_ref) from each response, sums of its tokens' in nats: float32[N] each."""

    k1: np.ndarray  # unbiased, of either sign
    k3: np.ndarray  # unbiased, of lower variance, never negative


def map_batches(function: Callable[[Any], Any], arrays: Any, batch_size: int) -> Any:
    """A function of all rows, `batch_size` at a time, in NumPy. The last batch is filled up with its last row."""
    count = len(jax.tree.leaves(arrays)[0])
    parts = []
    for start in range(0, count, batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), count - 1)
        parts.append(function(jax.tree.map(lambda leaf, rows=rows: leaf[rows], arrays)))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *parts)


def sample_all(
    policy: PolicyNetwork,
    params: PyTree,
    prompts: tuple[np.ndarray, np.ndarray],
    key: PRNGKeyArray,
    sampling: Sampling,
    *,
    samples: int,
    batch_size: int,
) -> Rollout:
    """`samples` responses to each of N prompts (tokens and mask, left-padded): a Rollout of N * samples rows, grouped.

    Row i * samples + j is sample j of prompt i, and is drawn with that number's key: the batch size changes nothing.
    """
    tokens, mask = (np.repeat(array, samples, axis=0) for array in prompts)
    rows = PromptBatch(tokens, mask, np.arange(len(tokens), dtype=np.int32))
    return map_batches(lambda batch: _generate(policy, params, batch, key, sampling).rollout, rows, batch_size)


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
    """The k1 estimate log pi(y|x) - log pi_ref(y|x) of every row, in nats, EOS included: float32[N]."""

    def of_batch(batch: Rollout) -> jax.Array:
        own = _logprobs(policy, params, batch, temperature)
        return _summed_k1(own, _logprobs(*reference, batch, temperature), batch.response_mask)

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

    def of_batch(batch: Rollout) -> Divergences:
        own = _logprobs(policy, params, batch, temperature)
        theirs = _logprobs(*reference, batch, temperature)
        mask = batch.response_mask
        return Divergences(_summed_k1(own, theirs, mask), _summed_k3(own, theirs, mask))

    return map_batches(of_batch, rollout, batch_size)


def response_logprobs_all(
    policy: PolicyNetwork, params: PyTree, rollout: Rollout, batch_size: int, *, temperature: float = 1.0
) -> np.ndarray:
    """Log-probability of every response token, in nats, by default the model's own: float32[N, T].

    Those at padding have no meaning.
    """
    return map_batches(lambda batch: _logprobs(policy, params, batch, temperature), rollout, batch_size)


def sequence_stats_all(policy: PolicyNetwork, params: PyTree, data: TokenBatch, batch_size: int) -> TokenStats:
    """Statistics of every predicted token of every sequence: arrays [N, S-1]."""
    return map_batches(lambda batch: _sequence_stats(policy, params, batch), data, batch_size)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _generate(policy, params, prompts, key, sampling):
    return generate(policy, params, prompts, key, sampling)


@functools.partial(jax.jit, static_argnums=0)
def _scores(network, params, rollout):
    return network.scores(params, rollout)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _logprobs(policy, params, rollout, temperature):
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
