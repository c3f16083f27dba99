"""An iteration in two steps, sampling and learning: between them the host reads lengths, and may score the samples.

The networks of the second step read rows without the padding before prompts, as wide as the longest row of the batch,
rounded up to a bucket, or packed (`packed_samples.py`). Losses, gradients and metrics are those of the iteration in one
program up to rounding.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Array, PRNGKeyArray

from rlhf_jax.core.sequences import compacted
from rlhf_jax.methods.dynamic_sampling import DynamicSampling, PartialBatch
from rlhf_jax.methods.packed_samples import Packings, lengths, longest, plan_packing
from rlhf_jax.methods.policy_gradient import Iteration, Learned
from rlhf_jax.methods.policy_parts import Numbers, OnlineBatch, Params, Responses, Sampled
from rlhf_jax.models.scalars import ScalarNetwork
from rlhf_jax.rewards.scorers import HostScorer
from rlhf_jax.runtime.checkpoints import TrainState
from rlhf_jax.runtime.programs import Step
from rlhf_jax.runtime.two_programs import HostScoring, Plan, TwoSteps, Widths
from rlhf_jax.sampling.buckets import bucket
from rlhf_jax.types import Rollout, Sequences

Found = TypeVar("Found", Sampled, tuple[Sampled, Array], PartialBatch)
"""Samples, samples with scores, or those that dynamic sampling kept."""


class Fit(NamedTuple):
    """Choice of the shapes for a batch, with any leading axes."""

    prompts: Callable[[np.ndarray], int]  # mask of the prompts -> their width
    rows: Callable[[Rollout, int, Array], Plan]  # samples, number of the iteration, run key -> plan


def _longest_prompts(mask: np.ndarray) -> int:
    return min(bucket(int(mask.sum(axis=-1).max())), mask.shape[-1])


def _longest_rows(rollout: Rollout, step: int, run_key: Array) -> Plan:
    del step, run_key
    return Plan(longest(rollout, *lengths(rollout)), None)


def _all_positions(rollout: Rollout, step: int, run_key: Array) -> Plan:
    del step, run_key
    prompt, response = rollout.prompt.shape[-1], rollout.response.shape[-1]
    return Plan(Widths(prompt + response, response), None)


LONGEST = Fit(_longest_prompts, _longest_rows)
"""The bucket of the longest prompt, and at most four widths of rows and two of responses: few programs to compile."""
MAXIMUM = Fit(lambda mask: mask.shape[-1], _all_positions)
"""The maximum lengths of the config."""


def fit_of(iteration: Iteration, devices: int) -> Fit:
    """Choose the bucket of the longest prompt, and pack the rows if their lengths differ and the learner can.

    Args: devices is the number of those that the rows are split over.
    """
    if iteration.method.learner.packed is None:
        return LONGEST
    return Fit(_longest_prompts, functools.partial(plan_packing, iteration, devices))


def scored_by_network(iteration: Iteration, reward: ScalarNetwork, fit: Fit) -> TwoSteps:
    """Make the steps with a reward network that reads the policy's tokens.

    The second step scores the responses; the first does with dynamic sampling, whose rounds depend on the scores.
    """
    rounds = iteration.method.dynamic_sampling
    if rounds is None:

        def score(sampled: Sampled, frozen: Params, sequences: Sequences) -> Responses:
            return iteration.scored(sampled, iteration.scores(reward, frozen["reward"], sequences))

        return _two_steps(iteration, fit, _sample_at(iteration), lambda sampled: sampled.rollout, score)

    def fill_at(width: int) -> Step:
        def fill(
            state: TrainState, frozen: Params, batch: OnlineBatch, run_key: PRNGKeyArray
        ) -> tuple[TrainState, Numbers, PartialBatch]:
            draw = functools.partial(iteration.draw, reward, state, frozen, run_key, width)
            return state, {}, rounds.fill(draw, batch, iteration.axes, iteration.loop_axes)

        return fill

    return _two_steps(iteration, fit, fill_at, lambda partial: partial.kept.rollout, _kept(iteration, rounds))


def scored_on_host(iteration: Iteration, score: HostScorer, fit: Fit) -> TwoSteps:
    """Make the steps with scores from a function on the host."""
    rounds, sample_at = iteration.method.dynamic_sampling, _sample_at(iteration)
    if rounds is None:

        def given(found: tuple[Sampled, Array], frozen: Params, sequences: Sequences) -> Responses:
            del frozen, sequences
            return iteration.scored(*found)

        steps, of_host = _two_steps(iteration, fit, sample_at, lambda found: found[0].rollout, given), None
    else:
        kept, of_host = _kept(iteration, rounds), rounds.on_host()
        steps = _two_steps(iteration, fit, sample_at, lambda partial: partial.kept.rollout, kept)
    return steps._replace(host=HostScoring(lambda sampled: score(sampled.rollout), of_host))


def _kept(iteration: Iteration, rounds: DynamicSampling) -> Callable[[PartialBatch, Params, Sequences], Responses]:
    def kept(partial: PartialBatch, frozen: Params, sequences: Sequences) -> Responses:
        del frozen, sequences
        return rounds.responses(partial, iteration.axes)

    return kept


def _sample_at(iteration: Iteration) -> Callable[[int], Step]:
    def sample_at(width: int) -> Step:
        def sample(
            state: TrainState, frozen: Params, batch: OnlineBatch, run_key: PRNGKeyArray
        ) -> tuple[TrainState, Numbers, Sampled]:
            return state, {}, iteration.sample(state, frozen, batch, run_key, width)

        return sample

    return sample_at


def _two_steps(
    iteration: Iteration,
    fit: Fit,
    sample_at: Callable[[int], Step],
    rollout: Callable[[Found], Rollout],
    responses: Callable[[Found, Params, Sequences], Responses],
) -> TwoSteps:
    """Args: rollout and responses are functions of what the first step found, scored on the host or not."""

    def learn_at(widths: Widths) -> Step:
        def learn(
            state: TrainState, frozen: Params, batch: tuple[Found, Packings | None], run_key: PRNGKeyArray
        ) -> Learned:
            found, packings = batch
            sequences = compacted(rollout(found), width=widths.row, response_width=widths.response)
            of_minibatches = None
            if packings is not None:
                sequences = sequences._replace(packing=packings.whole)
                of_minibatches = packings.by_update(iteration.config.epochs)
            given = responses(found, frozen, sequences)
            return iteration.learn(state, frozen, given, sequences, run_key, of_minibatches)

        return learn

    return TwoSteps(
        sample_at,
        learn_at,
        lambda batch: fit.prompts(batch.prompts.mask),
        lambda found, step, run_key: fit.rows(rollout(found), step, run_key),
    )
