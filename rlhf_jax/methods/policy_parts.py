"""Networks of an online iteration, the batches that its steps pass on, and the shaping of scores.

`policy_gradient.py` has the steps.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from rlhf_jax.core.advantages import clip_scores, overlong_penalty
from rlhf_jax.core.metrics import Metric
from rlhf_jax.loading.trainable import full_params
from rlhf_jax.methods.online_config import OnlineConfig
from rlhf_jax.models import value_head
from rlhf_jax.models.head import TokenStats, token_stats
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.scalars import ScalarNetwork
from rlhf_jax.sampling.generate import is_stop
from rlhf_jax.types import PromptBatch, Rollout, TokenBatch

SharedTrunk = Literal["shared"]
ValueNetwork = ScalarNetwork | SharedTrunk | None
"""A network of its own, a head on the policy's own trunk, or no value function."""
Metrics = dict[str, Metric]
Numbers = dict[str, jax.Array]
Params = dict[str, PyTree]
Coefficient = float | Float[Array, ""]
"""A number, or the state of a controller."""


class OnlineBatch(NamedTuple):
    """Inputs of an iteration."""

    prompts: PromptBatch  # with dynamic sampling those of all rounds, [B, rounds, P]
    demonstrations: TokenBatch | None = None  # of the pretraining mix


class Sampled(NamedTuple):
    """Responses before they are scored."""

    rollout: Rollout
    logprobs: jax.Array  # [B, T], by the sampler's own forward passes
    demonstrations: TokenBatch | None


class Responses(NamedTuple):
    """Responses with the scores of the reward itself."""

    sampled: Sampled
    scores: jax.Array  # [B]
    useful: jax.Array | None  # bool[B], the responses to train on; None: all of them
    metrics: Numbers  # of the scores


class OldPolicy(NamedTuple):
    """Statistics of the responses before the first update."""

    logprobs: jax.Array  # [B, T]
    entropy: jax.Array  # [B, T], nats per token
    values: jax.Array | None  # [B, T]
    weights: jax.Array | None  # [B, T], importance weights
    metrics: Metrics


class Evaluated(NamedTuple):
    """Responses with everything that token rewards are made of."""

    rollout: Rollout
    scores: jax.Array  # [B], shaped
    ended: jax.Array  # bool[B], has a stop token; the others were cut off
    useful: jax.Array | None  # as in Responses
    old: OldPolicy
    ref_logprobs: jax.Array  # [B, T]
    kl: jax.Array  # [B, T], by the method's estimator


class Advantages(NamedTuple):
    """Advantages, and the targets of the value function where there is one."""

    advantages: jax.Array  # [B, T]
    returns: jax.Array | None  # [B, T]


class ValueTargets(NamedTuple):
    """Inputs of the value loss."""

    old: jax.Array  # [B, T], the values before the first update
    returns: jax.Array  # [B, T]


class Experience(NamedTuple):
    """A scored rollout with advantages, on which every epoch trains."""

    rollout: Rollout
    logprobs: jax.Array  # [B, T], of the old policy
    advantages: jax.Array  # [B, T]
    loss_mask: jax.Array  # [B, T]: the response tokens that are trained on
    values: ValueTargets | None
    ref_logprobs: jax.Array | None  # [B, T], where the penalty is in the loss
    weights: jax.Array | None  # [B, T], importance weights


class Samples(NamedTuple):
    """Responses of an iteration for `samples.jsonl`."""

    rollout: Rollout
    scores: jax.Array  # [B]
    kl: jax.Array  # [B], nats, by k1


@dataclasses.dataclass(frozen=True)
class Networks:
    """The networks' functions. Parameters: state has `policy` and `value`, frozen has `reference` and `reward`.

    Where the policy and the value are adapters, their bases are frozen's `reference` and `value_base`.
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
        rollout: Rollout,
        *,
        temperature: float,
        of_logits: Callable[..., TokenStats] = token_stats,
    ) -> tuple[TokenStats, Float[Array, "B T"] | None]:
        """Compute statistics of the response tokens under the policy, and the values before them if there are any."""
        hidden = self.policy.response_hidden(params["policy"], rollout)
        stats = self.policy.hidden_stats(
            params["policy"], hidden, rollout.response, temperature=temperature, of_logits=of_logits
        )
        if self.value == "shared":
            return stats, value_head.values(params["value"], hidden)
        return stats, self.values(params, rollout)

    def values(self, params: Params, rollout: Rollout) -> Float[Array, "B T"] | None:
        """Compute the values before the response tokens; None without a value function."""
        if self.value is None:
            return None
        if self.value == "shared":
            return value_head.values(params["value"], self.policy.response_hidden(params["policy"], rollout))
        return self.value.values(params["value"], rollout)

    def has_ended(self, rollout: Rollout) -> Bool[Array, "B"]:
        """Mark the responses with a stop token: the others were cut off."""
        return jnp.any(is_stop(rollout.response, self.stop_ids) & rollout.response_mask, axis=1)


@dataclasses.dataclass(frozen=True)
class Setting:
    """Networks, the config that every online method has, and the axes that an iteration is mapped over."""

    networks: Networks
    config: OnlineConfig
    axes: tuple[str, ...]  # that rows are split over
    loop_axes: tuple[str, ...]  # of the seeds around the iteration


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shaping:
    """Changes to scores before the KL penalty, in the order of the fields.

    The EOS trick is N+'s `missing_eos_score` (-1 there), or TRL's `missing_eos_penalty`.
    """

    scale: float = 1.0
    clip: float | None = None  # scores are held within plus and minus this
    overlong_buffer: float = 0.0  # the last share of the longest response, over which the score falls by 1
    missing_eos_score: float | None = None  # score of a response that was cut off, in the place of its own
    missing_eos_penalty: float = 0.0

    def __call__(
        self, scores: Float[Array, "B"], lengths: Int[Array, "B"], ended: Bool[Array, "B"], *, max_tokens: int
    ) -> Float[Array, "B"]:
        """Scale and clip scores, and lower those of responses that are too long or were cut off."""
        if self.scale != 1:
            scores = scores * self.scale
        scores = clip_scores(scores, clip=self.clip)
        if self.overlong_buffer:
            buffer = self.overlong_buffer * max_tokens
            scores = scores + overlong_penalty(lengths, max_tokens=max_tokens, buffer=buffer)
        if self.missing_eos_score is not None:
            return jnp.where(ended, scores, self.missing_eos_score)
        return scores - self.missing_eos_penalty * ~ended
