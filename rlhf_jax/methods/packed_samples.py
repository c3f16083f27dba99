"""Packed rows of an iteration's samples: one packing of the whole batch, and one of each minibatch that differs.

The host knows which rows share a minibatch, because their order depends on a random key alone.
"""

import functools
from typing import Generic, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from rlhf_jax import processes
from rlhf_jax.data.layouts import LEAST_GAIN, Groups, Layout, PackedSize, layout_of, packed_width, size_of
from rlhf_jax.methods.minibatches import shuffled
from rlhf_jax.methods.policy_gradient import Iteration
from rlhf_jax.runtime.optimizers import micro_batches
from rlhf_jax.runtime.programs import check_divides
from rlhf_jax.runtime.two_programs import Plan, Widths
from rlhf_jax.sampling.buckets import share_of
from rlhf_jax.types import A, Packing, Rollout

SIZES_PER_DOUBLING = 3
"""Numbers of packed rows that programs are compiled for: each is about a quarter larger than the one before.

There are few, because the programs of iterations compile slowly.
"""

Counts = Int[np.ndarray, "*lead B"]


class Packings(NamedTuple, Generic[A]):
    """Packings for the second step of an iteration."""

    whole: Packing[A]
    # [G, updates, ...]: groups first, as devices have their own; None: every minibatch is packed as the whole batch
    minibatches: Packing[A] | None

    def by_update(self, epochs: int) -> Packing:
        """Arrange the packings of a device's minibatches by update, [updates, G, ...]."""
        if self.minibatches is None:
            return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (epochs, *leaf.shape)), self.whole)
        return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), self.minibatches)


def lengths(rollout: Rollout) -> tuple[Counts, Counts]:
    """Numbers of tokens of each row and of its response, on the host. A row has at least one token of the prompt."""
    rows, responses = processes.on_host(_lengths(rollout.prompt_mask, rollout.response_mask))
    return rows, responses


@jax.jit
def _lengths(prompt_mask: Array, response_mask: Array) -> tuple[Array, Array]:
    prompts, responses = (jnp.sum(mask, axis=-1, dtype=jnp.int32) for mask in (prompt_mask, response_mask))
    return jnp.maximum(prompts, 1) + responses, responses


def longest(rollout: Rollout, rows: Counts, responses: Counts) -> Widths:
    """Round the longest row and the longest response up: at most four widths of rows, and two of responses."""
    prompt, response = rollout.prompt.shape[-1], rollout.response.shape[-1]
    row = share_of(prompt + response, int(rows.max()), parts=4)
    return Widths(row, share_of(response, int(responses.max()), parts=2))


def plan_packing(iteration: Iteration, devices: int, rollout: Rollout, step: int, run_key: Array) -> Plan:
    """Pack the rows, or leave them padded if their lengths hardly differ."""
    rows, responses = lengths(rollout)
    widths = longest(rollout, rows, responses)
    if rows.mean() > LEAST_GAIN * widths.row:
        return Plan(widths, None)
    lead, count = rows.shape[:-1], rows.shape[-1]
    keys = run_key.reshape(-1)
    of_runs = list(zip(rows.reshape(-1, count), responses.reshape(-1, count), strict=True))
    forward = Groups(devices, iteration.forward_slices(count, devices))
    groups = _groups(iteration, devices, count)
    least = min(forward.rows_of(count), groups.rows_of(count // iteration.config.minibatches))
    width = packed_width(widths.row, least)
    lay_out = functools.partial(_layout, width=width, response_width=widths.response)
    whole = [lay_out(*each, groups=forward) for each in of_runs]
    size = size_of(whole, width, per_doubling=SIZES_PER_DOUBLING)
    packing = _arranged([each.packing(size, width) for each in whole], lead)
    if iteration.config.minibatches == 1 and groups == forward:
        return Plan(widths._replace(packed=tuple(size)), Packings(packing, None))
    minibatches = [
        [lay_out(lengths[chosen], tokens[chosen], groups=groups) for chosen in _order(iteration, key, step, count)]
        for key, (lengths, tokens) in zip(keys, of_runs, strict=True)
    ]
    size_of_minibatch = size_of(
        [layout for each in minibatches for layout in each], width, per_doubling=SIZES_PER_DOUBLING
    )
    of_updates = _arranged([_of_updates(each, size_of_minibatch, width) for each in minibatches], lead)
    return Plan(widths._replace(packed=(*size, *size_of_minibatch)), Packings(packing, of_updates))


def _groups(iteration: Iteration, devices: int, rows: int) -> Groups:
    size = rows // iteration.config.minibatches
    check_divides(size, devices)
    return Groups(devices, micro_batches(size, iteration.config.optimizer.micro_batch, devices))


def _order(iteration: Iteration, key: Array, step: int, rows: int) -> Int[np.ndarray, "updates M"]:
    config = iteration.config
    updates = config.epochs * config.minibatches
    found = shuffled(iteration.key(key, step, "order"), np.arange(rows), epochs=config.epochs, updates=updates)
    return np.tile(np.arange(rows), (updates, 1)) if found is None else np.asarray(found)


def _layout(
    rows: Int[np.ndarray, "M"], responses: Int[np.ndarray, "M"], *, width: int, response_width: int, groups: Groups
) -> Layout:
    return layout_of(rows, np.arange(response_width) < responses[:, None], groups, width)


def _of_updates(layouts: list[Layout], size: PackedSize, width: int) -> Packing[np.ndarray]:
    packings = [layout.packing(size, width) for layout in layouts]
    return jax.tree.map(lambda *leaves: np.stack(leaves, axis=1), *packings)


def _arranged(packings: list[Packing[np.ndarray]], lead: tuple[int, ...]) -> Packing[np.ndarray]:
    """Stack the packings of all runs, with the leading axes of the batch."""
    return jax.tree.map(lambda *leaves: np.stack(leaves).reshape(*lead, *leaves[0].shape), *packings)
