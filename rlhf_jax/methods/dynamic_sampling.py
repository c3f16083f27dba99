"""Dynamic sampling: round after round of new prompts, until a batch is full of groups that teach something.

Section 3.2 of Yu et al. 2025 (DAPO, arXiv:2503.14476): a group whose responses all have the same score is left out. The
score is the reward's own, before it is scaled, clipped or lowered for length or a missing EOS: eq. 11 of the paper, and
verl's filter, are on correctness. A round samples as many groups as a batch has. There rounds have no end; here a batch
that still lacks groups after the last one is filled up with others, which are masked out of the losses.

Every array has one shape whatever the number of rounds, and a round's prompts and random numbers are a function of the
seed, the step and the round. Several seeds go on until all are full, and each keeps its own first groups: what it
trains on, and what it says of its rounds, is what it would be alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax.core import masking
from rlhf_jax.core.advantages import groups_that_differ
from rlhf_jax.data.prompts import at_round
from rlhf_jax.methods.policy_method import Method, PolicyGradientConfig, Sampled
from rlhf_jax.types import PromptBatch, Rollout

DIFFERS, ALIKE, EMPTY = 0, 1, 2
"""Row status, best first: a response of a group whose scores differ, one of another group, no response yet."""


class PartialBatch(NamedTuple):
    """A batch between two rounds. Every leaf has rows first, so that devices share it as they share the rows."""

    rollout: Rollout
    logprobs: Array  # [B, T], by the sampler
    scores: Array  # [B]
    rank: Array  # int[B]
    rounds: Array  # int[B]: how many were needed so far, the same in all rows
    # Of every round that was needed, whatever was kept of it:
    all_scores: Array  # [B, rounds]
    all_lengths: Array  # int[B, rounds], tokens
    all_differ: Array  # bool[B, rounds], of a row's group


def empty(sampled: Sampled, rounds: int) -> PartialBatch:
    """Room for the rows of a round. Args: sampled has arrays, or their shapes; rounds is how many there can be."""
    rollout, logprobs = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), sampled[:2])
    blank = jnp.zeros(len(logprobs), jnp.int32)
    of_rounds = jnp.zeros((len(logprobs), rounds), jnp.float32)
    return PartialBatch(
        rollout=rollout,
        logprobs=logprobs,
        scores=of_rounds[:, 0],
        rank=blank + EMPTY,
        rounds=blank,
        all_scores=of_rounds,
        all_lengths=of_rounds.astype(jnp.int32),
        all_differ=of_rounds.astype(bool),
    )


def is_full(filling: PartialBatch, axes: tuple[str, ...]) -> Bool[Array, ""]:
    """True if every row is of a group whose scores differ."""
    return masking.count(filling.rank == DIFFERS, axes) == masking.rows(filling.rank, axes)


def collect(
    config: PolicyGradientConfig,
    method: Method,
    filling: PartialBatch,
    sampled: Sampled,
    scores: Float[Array, "B"],
    axes: tuple[str, ...],
) -> PartialBatch:
    """Add a round: keep the first groups whose scores differ, and others where these are too few.

    A batch that is full stays what it is.
    """
    size, groups = method.num_generations, config.batch_size // method.num_generations
    full = is_full(filling, axes)
    differ = groups_that_differ(scores, num_generations=size).repeat(size)
    new = (sampled.rollout, sampled.logprobs, scores, jnp.where(differ, DIFFERS, ALIKE))
    rows = jax.tree.map(
        lambda *leaves: jnp.concatenate(leaves), *(masking.gather_rows(part, axes) for part in (filling[:4], new))
    )
    first = jnp.argsort(rows[3][::size], stable=True)[:groups]
    own = (masking.own_rows(first, axes)[:, None] * size + jnp.arange(size)[None, :]).reshape(-1)
    rollout, logprobs, scores_kept, rank = jax.tree.map(lambda leaf: leaf[own], rows)

    here = (jnp.arange(filling.all_scores.shape[1])[None, :] == filling.rounds[:, None]) & ~full
    return PartialBatch(
        rollout=rollout,
        logprobs=logprobs,
        scores=scores_kept,
        rank=rank,
        rounds=jnp.where(full, filling.rounds, filling.rounds + 1),
        all_scores=jnp.where(here, scores[:, None], filling.all_scores),
        all_lengths=jnp.where(here, masking.lengths(sampled.rollout.response_mask)[:, None], filling.all_lengths),
        all_differ=jnp.where(here, differ[:, None], filling.all_differ),
    )


def fill(
    config: PolicyGradientConfig,
    method: Method,
    draw: Callable[[PromptBatch], tuple[Sampled, Array]],
    prompts: PromptBatch,
    axes: tuple[str, ...],
    loop_axes: tuple[str, ...],
) -> PartialBatch:
    """Rounds within one program, until every seed's batch is full or the prompts are used up.

    Args: draw samples and scores a round's prompts; prompts are those of all rounds, [B, rounds, P]. axes are the
    mapped axes that rows are split over; loop_axes those of the seeds around this call.
    """
    rounds = method.dynamic_sampling_rounds

    def unfinished(carry: tuple[Array, Array, PartialBatch]) -> Array:
        number, lacking, _ = carry
        if loop_axes:
            lacking = jax.lax.pmax(lacking.astype(jnp.int32), loop_axes) > 0
        return (number < rounds) & lacking

    def another(carry: tuple[Array, Array, PartialBatch]) -> tuple[Array, Array, PartialBatch]:
        number, _, filling = carry
        filling = collect(config, method, filling, *draw(at_round(prompts, number)), axes)
        return number + 1, ~is_full(filling, axes), filling

    sampled, _ = jax.eval_shape(draw, at_round(prompts, 0))
    start = (jnp.int32(0), jnp.bool(True), empty(sampled, rounds))
    return jax.lax.while_loop(unfinished, another, start)[2]


def filled(
    method: Method, filling: PartialBatch, demonstrations: Any, axes: tuple[str, ...]
) -> tuple[Sampled, Float[Array, "B"], Bool[Array, "B"], dict[str, Array]]:
    """The batch after its last round, its scores, the mask of the responses to train on, and metrics of the rounds.

    `reward` and `num_tokens` are of all responses that were sampled; `dynamic_sampling/groups_that_differ` is a share
    of their groups, `dynamic_sampling/groups_missing` how many of the batch's groups are masked.
    """
    useful = filling.rank == DIFFERS
    seen = jnp.arange(filling.all_scores.shape[1])[None, :] < filling.rounds[:, None]
    metrics = {
        "reward": masking.masked_mean(filling.all_scores, seen, axes),
        "reward_std": jnp.sqrt(masking.masked_variance(filling.all_scores, seen, axes)),
        "num_tokens": masking.total(filling.all_lengths, axes),
        "dynamic_sampling/rounds": filling.rounds[0],
        "dynamic_sampling/groups_that_differ": masking.masked_mean(filling.all_differ.astype(jnp.float32), seen, axes),
        "dynamic_sampling/groups_missing": masking.count(~useful, axes) // method.num_generations,
    }
    return Sampled(filling.rollout, filling.logprobs, demonstrations), filling.scores, useful, metrics
