"""Disk cache of the log-probabilities of pairs under a fixed reference."""

import dataclasses
import hashlib
import os
import tempfile
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree

from rlhf_jax import processes
from rlhf_jax.data.fetch import data_dir
from rlhf_jax.data.ragged import RaggedPairs
from rlhf_jax.methods.dpo import PairLogps, pair_logps_all
from rlhf_jax.methods.preference_table import PreferenceLossConfig
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.types import RlhfError


def precomputed_ref_logps(
    config: PreferenceLossConfig,
    network: PolicyNetwork,
    params: PyTree,
    data: RaggedPairs,
    batch_size: int,
) -> PairLogps[np.ndarray]:
    """Read the reference's log-probabilities of all pairs from disk; compute and write them if the file is missing.

    Raises RlhfError if the file cannot be written or read.
    """
    path = cache_path(config, network, params, data)
    known = bool(processes.from_first(lambda: np.array(path.exists())))
    computed = None if known else pair_logps_all(config, network, params, data, batch_size)

    def written_and_read() -> np.ndarray:
        try:
            if computed is not None:
                _write(path, computed)
            return np.load(path)
        except (OSError, ValueError) as error:
            raise RlhfError(
                f"{path} cannot be written or read ({error}): remove it or make room, set RLHF_JAX_DATA to another "
                "directory, or set cached_reference = False"
            ) from error

    chosen, rejected, full_chosen, full_rejected = processes.from_first(written_and_read)
    return PairLogps(chosen, rejected, full_chosen, full_rejected)


def cache_path(config: PreferenceLossConfig, network: PolicyNetwork, params: PyTree, data: RaggedPairs) -> Path:
    """Return the file's path, named by a hash of everything that the log-probabilities depend on.

    The hash covers the network, its parameters, LD-DPO's alpha, and the tokens of every pair, and thereby the rows, the
    tokenizer, its template and the length limits.
    """
    digest = hashlib.sha256(
        repr((PairLogps._fields, dataclasses.replace(network, lora=None), config.ld_alpha)).encode()
    )
    rows = {side: dataclasses.asdict(getattr(data, side)) for side in data._fields}
    for path, leaf in jax.tree_util.tree_leaves_with_path({"params": params, "data": rows}):
        array = np.asarray(processes.on_host(leaf))
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return data_dir() / "reference_logprobs" / f"{digest.hexdigest()[:32]}.npy"


def _write(path: Path, logps: PairLogps[np.ndarray]) -> None:
    """Write the file atomically, even if several processes write it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=".partial-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.save(file, np.stack([logps.chosen, logps.rejected, logps.full_chosen, logps.full_rejected]))
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
