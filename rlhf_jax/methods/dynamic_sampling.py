"""Dynamic sampling: sample rounds of new prompts until the batch is full of groups whose scores differ.

Section 3.2 of Yu et al. 2025 (DAPO, arXiv:2503.14476): a group whose responses all have the same score has no gradient,
and is dropped. The comparison uses the reward's scores before scaling, clipping and penalties, because eq. 11 of the
paper and verl's filter compare correctness. A round samples as many groups as the batch holds. The paper does not bound
the number of rounds; here a batch that is not full after the last round is filled up with groups of equal scores, which
are masked out of the losses.

Array shapes do not depend on the number of rounds used, and a round's prompts and random numbers are a function of the
seed, the step and the round. When several seeds train at once, rounds continue until all batches are full, but a full
batch no longer changes: each seed's batch and metrics are those of a run of that seed alone.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax.core import masking
from rlhf_jax.core.advantages import informative_groups
from rlhf_jax.core.row_sharding import split_rows
from rlhf_jax.data.prompts import at_round
from rlhf_jax.methods.policy_parts import OnlineBatch, Responses, Sampled
from rlhf_jax.runtime.two_programs import Rounds
from rlhf_jax.types import Rollout, TokenBatch

DIFFERS, ALIKE, EMPTY = 0, 1, 2
"""Row status, best first: response of a group whose scores differ, of a group with equal scores, no response yet."""

Draw = Callable[[OnlineBatch], tuple[Sampled, Array]]
"""Function that samples and scores responses to a round's prompts."""


class Kept(NamedTuple):
    """The responses kept so far."""

    rollout: Rollout
    logprobs: Array  # [B, T], as computed by the sampler
    scores: Array  # [B]
    rank: Array  # int[B]


class PartialBatch(NamedTuple):
    """A batch between two rounds. Rows are the first axis of every leaf, so that devices share all leaves alike."""

    kept: Kept
    rounds: Array  # int[B], number of rounds used so far, the same in all rows
    # For all responses sampled in the rounds used, kept or not:
    all_scores: Array  # [B, rounds]
    all_lengths: Array  # int[B, rounds], tokens
    all_differ: Array  # bool[B, rounds], True if the scores of the row's group differ
    demonstrations: TokenBatch | None = None

    def is_full(self, axes: tuple[str, ...]) -> Bool[Array, ""]:
        """True if every row belongs to a group whose scores differ."""
        return masking.count(self.kept.rank == DIFFERS, axes) == masking.rows(self.kept.rank, axes)


@dataclasses.dataclass(frozen=True)
class DynamicSampling:
    """Maximum number of rounds, and the sizes of a group and of a batch in responses."""

    rounds: int
    num_generations: int
    batch_size: int

    def empty(self, sampled: Sampled) -> PartialBatch:
        """Make an empty batch. Args: sampled holds a round's arrays, or their shapes."""
        rollout, logprobs = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (sampled.rollout, sampled.logprobs)
        )
        blank = jnp.zeros(len(logprobs), jnp.int32)
        of_rounds = jnp.zeros((len(logprobs), self.rounds), jnp.float32)
        return PartialBatch(
            kept=Kept(rollout, logprobs, scores=of_rounds[:, 0], rank=blank + EMPTY),
            rounds=blank,
            all_scores=of_rounds,
            all_lengths=of_rounds.astype(jnp.int32),
            all_differ=of_rounds.astype(bool),
        )

    def collect(
        self, partial: PartialBatch, sampled: Sampled, scores: Float[Array, "B"], axes: tuple[str, ...]
    ) -> PartialBatch:
        """Add a round: keep the first groups whose scores differ, and fill up with other groups if they are too few.

        A full batch does not change.
        """
        size, groups = self.num_generations, self.batch_size // self.num_generations
        full = partial.is_full(axes)
        differ = informative_groups(scores, num_generations=size).repeat(size)
        new = Kept(sampled.rollout, sampled.logprobs, scores, jnp.where(differ, DIFFERS, ALIKE))
        rows = jax.tree.map(
            lambda *leaves: jnp.concatenate(leaves), *(masking.gather_rows(part, axes) for part in (partial.kept, new))
        )
        first = jnp.argsort(rows.rank[::size], stable=True)[:groups]
        own = (masking.local_rows(first, axes)[:, None] * size + jnp.arange(size)[None, :]).reshape(-1)

        here = (jnp.arange(self.rounds)[None, :] == partial.rounds[:, None]) & ~full
        lengths = masking.lengths(sampled.rollout.response_mask)
        return PartialBatch(
            kept=split_rows(jax.tree.map(lambda leaf: leaf[own], rows)),
            rounds=jnp.where(full, partial.rounds, partial.rounds + 1),
            all_scores=jnp.where(here, scores[:, None], partial.all_scores),
            all_lengths=jnp.where(here, lengths[:, None], partial.all_lengths),
            all_differ=jnp.where(here, differ[:, None], partial.all_differ),
            demonstrations=sampled.demonstrations,
        )

    def fill(self, draw: Draw, batch: OnlineBatch, axes: tuple[str, ...], loop_axes: tuple[str, ...]) -> PartialBatch:
        """Run rounds within one program until every seed's batch is full, or all rounds are used.

        Args: batch has the prompts of all rounds, [B, rounds, P]; rows are split over the mapped axes `axes`, and seeds
        over `loop_axes`.
        """

        def draw_round(number: int | Array) -> tuple[Sampled, Array]:
            return draw(OnlineBatch(at_round(batch.prompts, number)))

        def unfinished(carry: tuple[Array, Array, PartialBatch]) -> Array:
            number, lacking, _ = carry
            if loop_axes:
                lacking = jax.lax.pmax(lacking.astype(jnp.int32), loop_axes) > 0
            return (number < self.rounds) & lacking

        def another(carry: tuple[Array, Array, PartialBatch]) -> tuple[Array, Array, PartialBatch]:
            number, _, partial = carry
            partial = self.collect(partial, *draw_round(number), axes)
            return number + 1, ~partial.is_full(axes), partial

        sampled, _ = jax.eval_shape(draw_round, 0)
        start = (jnp.int32(0), jnp.bool(True), self.empty(sampled))
        _, _, partial = jax.lax.while_loop(unfinished, another, start)
        return partial._replace(demonstrations=batch.demonstrations)

    def on_host(self) -> Rounds:
        """Make the rounds of an iteration whose responses the host scores, between its two programs."""

        def split(batch: OnlineBatch) -> Iterator[OnlineBatch]:
            for number in range(self.rounds):
                yield batch._replace(prompts=at_round(batch.prompts, number))

        def collect(before: PartialBatch | None, new: tuple[Sampled, Array]) -> tuple[PartialBatch, Array]:
            partial = self.collect(self.empty(new[0]) if before is None else before, *new, ())
            return partial, partial.is_full(())

        return Rounds(split, collect)

    def responses(self, partial: PartialBatch, axes: tuple[str, ...]) -> Responses:
        """Return the batch after its last round, with the mask of responses to train on and metrics of the rounds.

        `reward`, `reward_std` and `num_tokens` cover all sampled responses; `dynamic_sampling/informative_groups` is
        the share of sampled groups whose scores differ, `dynamic_sampling/groups_missing` the number of the batch's
        groups that are masked.
        """
        useful = partial.kept.rank == DIFFERS
        seen = jnp.arange(self.rounds)[None, :] < partial.rounds[:, None]
        differ = partial.all_differ.astype(jnp.float32)
        metrics = {
            "reward": masking.masked_mean(partial.all_scores, seen, axes),
            "reward_std": jnp.sqrt(masking.masked_variance(partial.all_scores, seen, axes)),
            "num_tokens": masking.total(partial.all_lengths, axes),
            "dynamic_sampling/rounds": partial.rounds[0],
            "dynamic_sampling/informative_groups": masking.masked_mean(differ, seen, axes),
            "dynamic_sampling/groups_missing": masking.count(~useful, axes) // self.num_generations,
        }
        sampled = Sampled(partial.kept.rollout, partial.kept.logprobs, partial.demonstrations)
        return Responses(sampled, partial.kept.scores, useful, metrics)
