"""The reference that preference losses compare a policy with: one that follows it, and one that is asked only once."""

import dataclasses
import functools
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from rlhf_jax.config import Count, Range, check_ranges
from rlhf_jax.data.fetch import data_dir
from rlhf_jax.methods.preference import PairStats, PreferenceLossConfig, pair_stats
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.sampling.batches import map_batches
from rlhf_jax.types import AnyArray, PreferenceBatch, RlhfError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceUpdate:
    """TR-DPO: every so many steps the reference moves to the policy, by the share alpha of the way (1: all of it)."""

    # Share of the way that the reference moves to the policy; 1: all of it.
    alpha: Annotated[float, Range(above=0, at_most=1)]
    every: Count  # steps between updates

    def __post_init__(self) -> None:
        check_ranges(self)


class ReferencedBatch(NamedTuple):
    """A PreferenceBatch and what the reference says of its pairs."""

    prompt: AnyArray  # int32[B, P]
    prompt_mask: AnyArray  # bool[B, P]
    chosen: AnyArray  # int32[B, T]
    chosen_mask: AnyArray  # bool[B, T]
    rejected: AnyArray  # int32[B, T]
    rejected_mask: AnyArray  # bool[B, T]
    ref_chosen: AnyArray  # float32[B], nats
    ref_rejected: AnyArray  # float32[B]


def sync_reference(update: ReferenceUpdate, reference: PyTree, policy: PyTree, step: Int[Array, ""]) -> PyTree:
    r"""The reference after `step` steps: $\alpha \pi + (1 - \alpha) \pi_{ref}$ of the parameters where one is due.

    Gorbatovski et al. 2024 (TR-DPO, arXiv:2404.09656): the soft update, and the hard one with alpha = 1. The parameters
    are those that are trained. Of an adapter's A and B each goes its share of the way; they begin as the policy's, and
    a hard update makes the two models one. After a soft one their product is not the mean of the two products, which
    an adapter of this rank need not be able to hold.
    """
    due = step % update.every == 0

    def mixed(theirs: Array, own: Array) -> Array:
        mean = update.alpha * own.astype(jnp.float32) + (1 - update.alpha) * theirs.astype(jnp.float32)
        return jnp.where(due, mean.astype(theirs.dtype), theirs)

    return jax.tree.map(mixed, reference, policy)


def stats_all(
    config: PreferenceLossConfig, network: PolicyNetwork, params: PyTree, data: PreferenceBatch, batch_size: int
) -> PairStats:
    """`pair_stats` of any number of pairs, in NumPy."""
    return map_batches(lambda batch: _stats(config, network, params, batch), data, batch_size)


def precomputed_ref_logps(
    config: PreferenceLossConfig, network: PolicyNetwork, params: PyTree, data: PreferenceBatch, batch_size: int
) -> PairStats:
    """What a reference says of all pairs: computed once, and read from the disk whenever it is asked for again.

    Raises RlhfError where the file cannot be written, or is not what was written.
    """
    place = kept_at(config, network, params, data)
    computed = None if place.exists() else stats_all(config, network, params, data, batch_size)
    try:
        if computed is not None:
            _write(place, computed)
        found = np.load(place)
    except (OSError, ValueError) as error:
        raise RlhfError(
            f"{place} cannot be written or read ({error}): remove it or make room, set RLHF_JAX_DATA to another "
            "directory, or set cached_reference = False"
        ) from error
    return PairStats(*found)


def kept_at(config: PreferenceLossConfig, network: PolicyNetwork, params: PyTree, data: PreferenceBatch) -> Path:
    """The file, named by a hash of all that the log-probabilities depend on.

    These are the network, its parameters, the tokens of every pair, which the rows, the tokenizer, its template and the
    lengths that they are cut to have made, and LD-DPO's alpha.
    """
    digest = hashlib.sha256(repr((dataclasses.replace(network, lora=None), config.ld_alpha)).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path({"params": params, "data": data}):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return data_dir() / "reference_logprobs" / f"{digest.hexdigest()[:32]}.npy"


def _write(place: Path, stats: PairStats) -> None:
    """Whole or not at all, also where several processes write the same."""
    place.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=".partial-", dir=place.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.save(file, np.stack([stats.chosen, stats.rejected]))
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, place)
    except BaseException:
        os.unlink(name)
        raise


@functools.partial(jax.jit, static_argnums=(0, 1))
def _stats(config, network, params, batch):
    return pair_stats(config, network, params, batch)
