"""Shared parts of the policy-gradient methods: their config, `Method`, and the batches between an iteration's halves.

`Method` holds what differs between methods. `stages/ppo.py` and `stages/group_rl.py` make it from their configs, and
`methods/policy_gradient.py` runs it.
"""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

import jax
from jaxtyping import Array, Float, PyTree

from rlhf_jax.config import Count, Finite, NonNegative, Positive, Range
from rlhf_jax.loading.trainable import full_params
from rlhf_jax.methods.online import OnlineConfig
from rlhf_jax.models import value_head
from rlhf_jax.models.head import TokenStats, token_stats
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.scalars import ScalarNetwork
from rlhf_jax.rewards.sources import RewardSource
from rlhf_jax.runtime.optimizers import OptimizerConfig
from rlhf_jax.types import Rollout, TokenBatch

Estimator = Literal["k1", "k2", "k3", "k3+", "k3_weighted"]
"""Estimator of the divergence from the reference (`core/kl.py`); its effect depends on `kl_in`.

Cosine between the exact gradient of each estimator and that of the divergence, for a softmax over 20 tokens and
on-policy samples: mean (5th to 95th percentile) over 200 pairs of policy and reference, at two divergences in nats per
token. Computed by tests/core/test_kl.py.

| kl_estimator, kl_in   | KL = 0.05             | KL = 2.1              |
|-----------------------|-----------------------|-----------------------|
| k1, reward            | 1.00 (1.00 to 1.00)   | 1.00 (1.00 to 1.00)   |
| k2, reward            | 0.24 (-0.53 to 0.82)  | 0.86 (0.73 to 0.96)   |
| k3, reward            | 0.10 (-0.63 to 0.76)  | 0.55 (-0.06 to 0.94)  |
| k1, loss              | no gradient           | no gradient           |
| k2, loss              | 1.00 (1.00 to 1.00)   | 1.00 (1.00 to 1.00)   |
| k3, loss              | 0.98 (0.96 to 1.00)   | 0.65 (0.21 to 0.93)   |
| k3+, loss             | 1.00 (1.00 to 1.00)   | 1.00 (1.00 to 1.00)   |
| k3_weighted, loss     | 1.00 (1.00 to 1.00)   | 1.00 (1.00 to 1.00)   |

`k1` in the reward is PPO's and RLOO's; `k3` in the loss is GRPO's. `k2` and `k3` in the reward are another objective,
and warn. `k1` in the loss is refused. Of a response of several tokens, only `k1` in the reward has the gradient of the
whole divergence; the loss leaves out what a token does to later ones (`core/kl.py`). Once the policy has left the one
that sampled, only `k3_weighted` stays exact. The metric `objective/kl` is the estimator's value: that of `k3` for all
three.
"""
Place = Literal["reward", "loss"]
"""Place of the KL penalty: in the token rewards, or as a term of the loss."""
ImportanceMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
"""Weights of tokens or of whole responses; a weight beyond a bound becomes the bound (truncate) or 0 (mask)."""
OverlongBuffer = Annotated[float, Range(at_least=0, below=1)]
"""The last share of the longest response, over which the score falls by 1 (`overlong_penalty`); 0 for none."""
SharedTrunk = Literal["shared"]


@dataclasses.dataclass(frozen=True)
class AdaptiveKL:
    """The controller of Ziegler et al. 2019: the coefficient is changed until the divergence is the target."""

    target: Positive  # KL to reach, in nats per response
    horizon: Positive  # episodes over which the coefficient adapts


@dataclasses.dataclass(frozen=True)
class PretrainingMix:
    """PPO-ptx, eq. 2 of Ouyang et al. 2022 (arXiv:2203.02155): maximum likelihood on demonstrations in every update."""

    coef: Positive  # weight of the likelihood (gamma in the paper)
    batch_size: Count  # demonstrations in an iteration, from the experiment's data


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyGradientConfig(OnlineConfig):
    """Fields of every policy gradient: the reward model, the shaping of its scores, and terms of the loss."""

    reward_model: RewardSource  # reward that scores responses
    # Score of every response that was cut off (-1 in Huang et al. 2024); None: its own.
    missing_eos_score: Finite | None = None
    score_scale: Positive = 1.0  # factor of the scores, before clipping
    score_clip: Positive | None = None  # largest absolute score; None: no bound
    reject_truncated: bool = False  # leave responses that were cut off out of the losses
    kl_controller: AdaptiveKL | None = None  # adapt the KL coefficient to a target; None: constant
    entropy_coef: NonNegative = 0.0  # weight of a bonus on the entropy, in nats per token
    # Old log-probabilities recomputed by the learner, or as the sampler gave them.
    old_logprobs: Literal["learner", "sampler"] = "learner"
    # Largest ratio of the learner's probability to the sampler's (core/importance.py; 3 in TRL); None: no weights.
    importance_cap: Positive | None = None
    importance_floor: NonNegative | None = None  # smallest ratio; None: 0
    # Ratios of tokens or responses, truncated or masked at the bounds; None: token_truncate.
    importance_mode: ImportanceMode | None = None
    ptx: PretrainingMix | None = None  # add maximum likelihood on demonstrations (PPO-ptx); None: leave it out

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tuning.lora is not None and self.tuning.lora.dropout:
            raise ValueError("tuning.lora.dropout must be 0: with dropout the first ratio would not be 1")
        if self.missing_eos_score is not None and self.missing_eos_penalty:
            raise ValueError(
                f"missing_eos_score = {self.missing_eos_score} takes the place of a score, from which "
                f"missing_eos_penalty = {self.missing_eos_penalty} would be taken: set one of the two"
            )
        if self.old_logprobs == "sampler" and self.importance_cap is not None:
            raise ValueError(
                f"importance_cap = {self.importance_cap} bounds the learner's over the sampler's probabilities, which "
                "old_logprobs = 'sampler' has in the ratio itself: leave one of the two out"
            )
        for name in ("importance_floor", "importance_mode"):
            if getattr(self, name) is not None and self.importance_cap is None:
                raise ValueError(f"{name} = {getattr(self, name)!r} is read with importance_cap alone: set that too")
        if self.importance_cap is not None and (self.importance_floor or 0) >= self.importance_cap:
            raise ValueError(
                f"importance_floor = {self.importance_floor} must be below importance_cap = {self.importance_cap}"
            )
        if self.ptx is not None and self.ptx.batch_size % self.minibatches:
            raise ValueError(
                f"ptx.batch_size = {self.ptx.batch_size} does not divide into {self.minibatches} minibatches"
            )


def check_penalty(config: PolicyGradientConfig, kl_coef: float, estimator: Estimator, place: Place) -> None:
    """Raises ValueError for a penalty that would not do what it says, and warns of one whose gradient is another's."""
    if kl_coef and place == "loss" and estimator == "k1":
        raise ValueError(
            "kl_estimator = 'k1' in the loss has a gradient of mean 0: set kl_estimator to 'k2' or 'k3+', whose "
            "gradient is the divergence's, or kl_in to 'reward'"
        )
    if kl_coef and place == "reward" and estimator in ("k3+", "k3_weighted"):
        raise ValueError(
            f"kl_estimator = {estimator!r} differs from 'k3' in its gradient, which a reward does not have: set kl_in "
            "to 'loss', or kl_estimator to 'k1'"
        )
    if kl_coef and place == "reward" and estimator != "k1":
        warnings.warn(
            f"kl_estimator = {estimator!r} in the reward does not have the divergence's gradient, and may point away "
            "from it: set kl_estimator to 'k1', or kl_in to 'loss'",
            stacklevel=4,
        )
    if config.kl_controller is not None and kl_coef <= 0:
        raise ValueError(f"kl_controller multiplies kl_coef = {kl_coef}, which would stay what it is: set it above 0")


def check_dual_clip(dual_clip: float, clip_ratio_high: float) -> None:
    """Raises ValueError unless the second bound is above the first one."""
    if dual_clip <= 1 + clip_ratio_high:
        raise ValueError(
            f"dual_clip = {dual_clip} bounds ratios that the clip at 1 + clip_ratio_high = {1 + clip_ratio_high} "
            "leaves alone: set it above that, or to None for no bound"
        )


class Advantages(NamedTuple):
    """Advantages, and the targets of the value function."""

    advantages: jax.Array  # [B, T]
    returns: jax.Array | None  # [B, T], what values are fitted to, where there are some


@dataclasses.dataclass(frozen=True)
class Method:
    """Parts specific to one method: policy loss, value loss, KL penalty, and advantages."""

    policy_loss: str  # of core.policy_losses.POLICY_LOSSES
    bounds: dict[str, float]  # that the loss reads
    aggregation: str  # of core.policy_losses.AGGREGATIONS
    kl_coef: float
    kl_estimator: Estimator
    kl_in: Place
    # Of token rewards, values, the response mask and that of the losses.
    estimate: Callable[[Array, Array | None, Array, Array, tuple[str, ...]], Advantages]
    num_generations: int = 1  # responses to a prompt
    dynamic_sampling_rounds: int = 0  # of sampling, at most, until a batch is full of groups that teach; 0: all do
    overlong_buffer: float = 0.0  # the share of the longest response over which its score falls by 1
    vf_coef: float = 0.0
    value_clip: float = 0.0
    value_warmup: int = 0  # iterations in which the policy stays as it is
    value_optimizer: OptimizerConfig | None = None  # None: policy and values share one


@dataclasses.dataclass(frozen=True)
class Networks:
    """The networks' functions. Parameters: state has `policy` and `value`, frozen has `reference` and `reward`.

    Where the policy and the value are adapters, their bases are frozen's `reference` and `value_base`. "shared" is a
    value head on the policy's own trunk; None, no value function.
    """

    policy: PolicyNetwork
    value: ScalarNetwork | SharedTrunk | None
    reward: ScalarNetwork | None  # None where responses are scored on the host
    stop_ids: tuple[int, ...]
    max_new_tokens: int

    def full_params(self, params: dict[str, PyTree], frozen: dict[str, PyTree]) -> dict[str, PyTree]:
        """Parameters of policy and value, combined from trained and frozen ones."""
        policy = {"policy": full_params(self.policy, params["policy"], frozen, "reference")}
        if self.value is None:
            return policy
        if self.value == "shared":
            return {**policy, "value": params["value"]}
        return {**policy, "value": full_params(self.value, params["value"], frozen, "value_base")}

    def forward(
        self,
        params: dict[str, PyTree],
        rollout: Rollout,
        *,
        temperature: float,
        of_logits: Callable[..., TokenStats] = token_stats,
    ) -> tuple[TokenStats, Float[Array, "B T"] | None]:
        """Statistics of the response tokens under the policy, and the values before them where there are some."""
        hidden = self.policy.response_hidden(params["policy"], rollout)
        stats = self.policy.hidden_stats(
            params["policy"], hidden, rollout.response, temperature=temperature, of_logits=of_logits
        )
        if self.value == "shared":
            return stats, value_head.values(params["value"], hidden)
        return stats, self.values(params, rollout)

    def values(self, params: dict[str, PyTree], rollout: Rollout) -> Float[Array, "B T"] | None:
        """The values before the response tokens, where there are some."""
        if self.value is None:
            return None
        if self.value == "shared":
            return value_head.values(params["value"], self.policy.response_hidden(params["policy"], rollout))
        return self.value.values(params["value"], rollout)


class Sampled(NamedTuple):
    """Responses from the first half of an iteration, for the second."""

    rollout: Rollout
    logprobs: jax.Array  # [B, T], by the sampler's own forward passes
    demonstrations: TokenBatch | None  # of the pretraining mix


class Experience(NamedTuple):
    """A scored rollout with advantages, on which every epoch trains."""

    rollout: Rollout
    logprobs: jax.Array  # [B, T], of the policy that sampled, by the learner's own forward pass or the sampler's
    advantages: jax.Array  # [B, T]
    loss_mask: jax.Array  # [B, T]: the response tokens that are trained on
    values: jax.Array | None  # [B, T]
    returns: jax.Array | None  # [B, T]
    ref_logprobs: jax.Array | None  # [B, T], where the penalty is in the loss
    weights: jax.Array | None  # [B, T], of the importance of tokens


class Samples(NamedTuple):
    """Responses of an iteration for `samples.jsonl`."""

    rollout: Rollout
    scores: jax.Array  # [B]
    kl: jax.Array  # [B], nats, by k1
