"""Networks of an online iteration, the batches passed between its steps, and score shaping.

The steps are in `policy_gradient.py`.
"""

import dataclasses
from collections.abc import Callable
from typing import Generic, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from rlhf_jax.core.advantages import clip_scores, overlong_penalty
from rlhf_jax.core.metrics import Metric
from rlhf_jax.core.sequences import by_response
from rlhf_jax.core.slices import in_slices, slice_count
from rlhf_jax.loading.trainable import full_params
from rlhf_jax.methods.online_config import OnlineConfig
from rlhf_jax.models import value_head
from rlhf_jax.models.head import TokenStats, token_stats
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.scalars import ScalarNetwork
from rlhf_jax.sampling.generate import is_stop
from rlhf_jax.types import A, PromptBatch, Rollout, Sequences, TokenBatch

SharedTrunk = Literal["shared"]
ValueNetwork = ScalarNetwork | SharedTrunk | None
"""A separate network, a head on the policy's trunk (`shared`), or no value function."""
Metrics = dict[str, Metric]
Numbers = dict[str, jax.Array]
Params = dict[str, PyTree]
Coefficient = float | Float[Array, ""]
"""A constant, or the current value of an adaptive controller."""


class OnlineBatch(NamedTuple, Generic[A]):
    """Inputs of an iteration."""

    prompts: PromptBatch[A]  # with dynamic sampling the prompts of all rounds, [B, rounds, P]
    demonstrations: TokenBatch[A] | None = None  # for the pretraining mix


class Sampled(NamedTuple):
    """Responses before they are scored."""

    rollout: Rollout
    logprobs: jax.Array  # [B, T], as computed by the sampler
    demonstrations: TokenBatch | None


class Responses(NamedTuple):
    """Responses with the reward's scores, before shaping."""

    sampled: Sampled
    scores: jax.Array  # [B]
    useful: jax.Array | None  # bool[B], responses to train on; None: all
    metrics: Numbers  # of the scores


class OldPolicy(NamedTuple):
    """Statistics of the responses before the first update."""

    logprobs: jax.Array  # [B, T]
    entropy: jax.Array  # [B, T], nats per token
    values: jax.Array | None  # [B, T]
    weights: jax.Array | None  # [B, T], importance weights
    metrics: Metrics


class Evaluated(NamedTuple):
    """Responses with all inputs of the token rewards."""

    sequences: Sequences
    scores: jax.Array  # [B], shaped
    ended: jax.Array  # bool[B], True if the response has a stop token
    useful: jax.Array | None  # as in Responses
    old: OldPolicy
    ref_logprobs: jax.Array | None  # [B, T]; None: the divergence is not measured
    kl: jax.Array | None  # [B, T], by the method's estimator


class Advantages(NamedTuple):
    """Advantages, and the value function's targets, None without one."""

    advantages: jax.Array  # [B, T]
    returns: jax.Array | None  # [B, T]


class ValueTargets(NamedTuple):
    """Inputs of the value loss."""

    old: jax.Array  # [B, T], values before the first update
    returns: jax.Array  # [B, T]


class Experience(NamedTuple):
    """Responses with advantages: the batch that every epoch trains on."""

    sequences: Sequences
    logprobs: jax.Array  # [B, T], under the old policy
    advantages: jax.Array  # [B, T]
    loss_mask: jax.Array  # [B, T], response tokens to train on
    values: ValueTargets | None
    ref_logprobs: jax.Array | None  # [B, T]; None unless the KL penalty is in the loss
    weights: jax.Array | None  # [B, T], importance weights


class Samples(NamedTuple):
    """Responses of an iteration, for `samples.jsonl`."""

    rollout: Rollout
    scores: jax.Array  # [B]
    kl: jax.Array  # [B], nats, by k1; NaN if it was not measured
    tokens: Numbers  # values of the tokens of the first samples, by name, [rows, T]


@dataclasses.dataclass(frozen=True)
class Networks:
    """Policy and value networks, without their parameters.

    Trained parameters are `policy` and `value`, frozen ones `reference` and `reward`. For adapters, the frozen base is
    `reference` for the policy and `value_base` for the value function.
    """

    policy: PolicyNetwork
    value: ValueNetwork
    stop_ids: tuple[int, ...]
    max_new_tokens: int

    def full_params(self, params: Params, frozen: Params) -> Params:
        """Combine trained and frozen parameters of policy and value."""
        policy = {"policy": full_params(self.policy, params["policy"], frozen, "reference")}
        if self.value is None:
            return policy
        if self.value == "shared":
            return {**policy, "value": params["value"]}
        return {**policy, "value": full_params(self.value, params["value"], frozen, "value_base")}

    def forward(
        self,
        params: Params,
        sequences: Sequences,
        *,
        temperature: float,
        stats_fn: Callable[..., TokenStats] = token_stats,
    ) -> tuple[TokenStats, Float[Array, "B T"] | None]:
        """Compute the policy's statistics of the response tokens, and the values (None without a value function)."""
        hidden = self.policy.response_hidden(params["policy"], sequences)
        stats = self.policy.stats_of_responses(
            params["policy"], hidden, sequences, temperature=temperature, stats_fn=stats_fn
        )
        if self.value == "shared":
            return stats, by_response(value_head.values(params["value"], hidden), sequences)
        return stats, self.values(params, sequences)

    def values(self, params: Params, sequences: Sequences) -> Float[Array, "B T"] | None:
        """Compute the value of the state before each response token; None without a value function."""
        if self.value is None:
            return None
        if self.value == "shared":
            hidden = self.policy.response_hidden(params["policy"], sequences)
            return by_response(value_head.values(params["value"], hidden), sequences)
        return self.value.values(params["value"], sequences)

    def has_ended(self, sequences: Sequences) -> Bool[Array, "B"]:
        """Mark the responses that contain a stop token; the others were cut off."""
        return jnp.any(is_stop(sequences.response, self.stop_ids) & sequences.response_mask, axis=1)


@dataclasses.dataclass(frozen=True)
class Setting:
    """Networks, the config shared by all online methods, and the axes that an iteration is mapped over."""

    networks: Networks
    config: OnlineConfig
    axes: tuple[str, ...]  # axes that rows are split over
    loop_axes: tuple[str, ...]  # axes of the seeds, outside the iteration

    def forward_slices(self, responses: int, devices: int) -> int:
        """Return the number of slices in which the forward passes without a gradient read all devices' responses."""
        return slice_count(responses, self.config.forward_batch, devices, field="forward_batch")

    def by_slices(
        self, function: Callable[[PyTree], PyTree], rows: PyTree, *, responses: int = 1, each: int = 1
    ) -> PyTree:
        """Apply a forward pass to slices of `forward_batch` responses, one after the other.

        Args: responses is the number of responses per row, and each the number of rows of the result per row.
        """
        devices = jax.lax.axis_size(self.axes) if self.axes else 1
        count = len(jax.tree.leaves(rows)[0]) * responses * devices
        return in_slices(function, rows, self.forward_slices(count, devices), each=each)

    def scores(self, reward: ScalarNetwork, params: PyTree, sequences: Sequences) -> Float[Array, "B"]:
        """Score responses with a reward network that reads the policy's tokens."""
        return self.by_slices(lambda rows: reward.scores(params, rows), sequences)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shaping:
    """Changes to scores before the KL penalty, applied in the order of the fields.

    A response without EOS gets a fixed score (`missing_eos_score`; -1 in Huang et al. 2024), or a penalty as in TRL
    (`missing_eos_penalty`).
    """

    scale: float = 1.0
    clip: float | None = None  # largest absolute score
    overlong_buffer: float = 0.0  # share of the maximum length over which the score falls by 1
    missing_eos_score: float | None = None  # replaces the score of a response without EOS
    missing_eos_penalty: float = 0.0

    def __call__(
        self, scores: Float[Array, "B"], lengths: Int[Array, "B"], ended: Bool[Array, "B"], *, max_tokens: int
    ) -> Float[Array, "B"]:
        """Scale and clip scores, and penalise responses that are too long or have no EOS."""
        if self.scale != 1:
            scores = scores * self.scale
        scores = clip_scores(scores, clip=self.clip)
        if self.overlong_buffer:
            buffer = self.overlong_buffer * max_tokens
            scores = scores + overlong_penalty(lengths, max_tokens=max_tokens, buffer=buffer)
        if self.missing_eos_score is not None:
            return jnp.where(ended, scores, self.missing_eos_score)
        return scores - self.missing_eos_penalty * ~ended
