"""Config fields and checks that PPO and the group methods share."""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Annotated, Literal

from rlhf_jax.config import Finite, NonNegative, Positive, Range
from rlhf_jax.core.importance import WEIGHTS
from rlhf_jax.core.kl import ESTIMATORS
from rlhf_jax.methods.dynamic_sampling import DynamicSampling
from rlhf_jax.methods.kl_controller import AdaptiveKL
from rlhf_jax.methods.online_config import OnlineConfig
from rlhf_jax.methods.policy_gradient import PolicyGradient
from rlhf_jax.methods.policy_method import OnlineMethod
from rlhf_jax.methods.policy_parts import Experience, Shaping
from rlhf_jax.methods.pretraining_mix import PretrainingMix
from rlhf_jax.rewards.sources import RewardSource
from rlhf_jax.runtime.optimizers import OptimizerConfig

Estimator = Literal["k1", "k2", "k3", "k3+", "k3_weighted"]
"""Estimator of the KL divergence from the reference, from `core/kl.py`; its gradient depends on `kl_in`.

The table shows the cosine between each estimator's expected gradient and the gradient of the divergence, for a softmax
over 20 tokens sampled from the policy itself: mean (5th to 95th percentile) over 200 pairs of policy and reference, at
two divergences in nats per token. tests/core/test_kl.py computes it.

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

PPO and RLOO use `k1` in the reward, GRPO `k3` in the loss. `k2` and `k3` in the reward optimise another objective and
give a warning. `k1` in the loss is an error. For responses of several tokens, only `k1` in the reward has the gradient
of the whole divergence; in the loss, an estimate ignores the effect of a token on later ones (`core/kl.py`). After the
first update of an iteration, only `k3_weighted` remains exact in the loss. The metric `objective/kl` is the value of
the estimator, which is the same for `k3`, `k3+` and `k3_weighted`.
"""
Place = Literal["reward", "loss"]
"""Place of the KL penalty: in the token rewards, or as a term of the loss."""
ImportanceMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
"""Importance weights per token or per response; a weight beyond a bound becomes the bound (truncate) or 0 (mask)."""
OverlongBuffer = Annotated[float, Range(at_least=0, below=1)]
"""Share of the maximum length, at its end, over which the score falls by 1 (`overlong_penalty`); 0: no penalty."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyGradientConfig(OnlineConfig):
    """Fields of PPO and the group methods: the reward model, score shaping, and terms of the loss."""

    reward_model: RewardSource  # reward that scores responses
    # Score that replaces the reward's for truncated responses (-1 in Huang et al. 2024); None: keep the reward's.
    missing_eos_score: Finite | None = None
    score_scale: Positive = 1.0  # scores are multiplied by this, before clipping
    score_clip: Positive | None = None  # scores are clipped to +- this; None: no clipping
    reject_truncated: bool = False  # exclude truncated responses from the losses
    kl_controller: AdaptiveKL | None = None  # adapt the KL coefficient to a target; None: constant
    # Measure the KL divergence from the initial policy also if kl_coef is 0; False: the initial policy is neither kept
    # nor run then, and metrics and samples have null.
    measure_kl: bool = True
    entropy_coef: NonNegative = 0.0  # coefficient of an entropy bonus, in nats per token
    # Source of the old log-probabilities: recomputed by the learner, or the sampler's.
    old_logprobs: Literal["learner", "sampler"] = "learner"
    # Upper bound of importance weights, the learner's probability over the sampler's (core/importance.py; 3 in TRL);
    # None: no weights.
    importance_cap: Positive | None = None
    importance_floor: NonNegative | None = None  # lower bound of importance weights; None: 0
    # Weights of tokens or of responses, truncated or masked at the bounds; None: token_truncate.
    importance_mode: ImportanceMode | None = None
    ptx: PretrainingMix | None = None  # add maximum likelihood on demonstrations (PPO-ptx); None: no mix

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tuning.lora is not None and self.tuning.lora.dropout:
            raise ValueError("tuning.lora.dropout must be 0: with dropout the first ratio would not be 1")
        if self.missing_eos_score is not None and self.missing_eos_penalty:
            raise ValueError(
                f"missing_eos_score = {self.missing_eos_score} replaces the score that missing_eos_penalty = "
                f"{self.missing_eos_penalty} would lower: set only one of the two"
            )
        if self.old_logprobs == "sampler" and self.importance_cap is not None:
            raise ValueError(
                f"importance_cap = {self.importance_cap} corrects for the sampler, as the ratio of the loss does with "
                "old_logprobs = 'sampler': set only one of the two"
            )
        for name in ("importance_floor", "importance_mode"):
            if getattr(self, name) is not None and self.importance_cap is None:
                raise ValueError(f"{name} = {getattr(self, name)!r} needs importance_cap: set it too")
        if self.importance_cap is not None and (self.importance_floor or 0) >= self.importance_cap:
            raise ValueError(
                f"importance_floor = {self.importance_floor} must be below importance_cap = {self.importance_cap}"
            )
        if self.ptx is not None and self.ptx.batch_size % self.minibatches:
            raise ValueError(
                f"ptx.batch_size = {self.ptx.batch_size} is not a multiple of minibatches = {self.minibatches}"
            )


def check_penalty(config: PolicyGradientConfig, kl_coef: float, estimator: Estimator, place: Place) -> None:
    """Raise ValueError for a KL penalty without the intended effect, and warn if its gradient is not that of KL."""
    if kl_coef and place == "loss" and estimator == "k1":
        raise ValueError(
            "kl_estimator = 'k1' in the loss has an expected gradient of 0: set kl_estimator to 'k2' or 'k3+', which "
            "have the gradient of the divergence, or kl_in to 'reward'"
        )
    if kl_coef and place == "reward" and estimator in ("k3+", "k3_weighted"):
        raise ValueError(
            f"kl_estimator = {estimator!r} differs from 'k3' only in its gradient, which is not used in a reward: set "
            "kl_in to 'loss', or kl_estimator to 'k1'"
        )
    if kl_coef and place == "reward" and estimator != "k1":
        warnings.warn(
            f"kl_estimator = {estimator!r} in the reward does not have the gradient of the divergence, and may "
            "point the other way: set kl_estimator to 'k1', or kl_in to 'loss'",
            stacklevel=4,
        )
    if kl_coef and not config.measure_kl:
        raise ValueError(f"measure_kl = False, but kl_coef = {kl_coef} penalises the divergence: set one of the two")
    if config.kl_controller is not None and kl_coef <= 0:
        raise ValueError(f"kl_controller multiplies kl_coef = {kl_coef}, which would stay 0: set it above 0")


def check_dual_clip(dual_clip: float, clip_ratio_high: float) -> None:
    """Raise ValueError unless `dual_clip` is above the upper bound of the clip."""
    if dual_clip <= 1 + clip_ratio_high:
        raise ValueError(
            f"dual_clip = {dual_clip} must be above 1 + clip_ratio_high = {1 + clip_ratio_high}: raise it, or set "
            "None for no bound"
        )


def make_method(
    config: PolicyGradientConfig,
    learner: Callable[..., PolicyGradient],
    *,
    kl_coef: float,
    kl_estimator: Estimator,
    kl_in: Place,
    overlong_buffer: float,
    num_generations: int = 1,
    dynamic_sampling: DynamicSampling | None = None,
    value_warmup: int = 0,
    value_optimizer: OptimizerConfig | None = None,
) -> OnlineMethod[Experience]:
    """Make a method from a config.

    Args: learner is a partial PolicyGradient with the policy loss, the advantage function and their coefficients.
    """
    estimator, from_sampler = ESTIMATORS[kl_estimator], config.old_logprobs == "sampler"
    importance = None
    if config.importance_cap is not None:
        floor = 0.0 if config.importance_floor is None else config.importance_floor
        weigh = WEIGHTS[config.importance_mode or "token_truncate"]
        importance = functools.partial(weigh, cap=config.importance_cap, floor=floor)
    return OnlineMethod(
        learner=learner(
            loss_penalty=estimator if kl_in == "loss" and kl_coef > 0 else None,
            use_sampler_logprobs=from_sampler,
            entropy_coef=config.entropy_coef,
            reject_truncated=config.reject_truncated,
        ),
        kl_coef=kl_coef,
        kl_estimator=estimator,
        shaping=Shaping(
            scale=config.score_scale,
            clip=config.score_clip,
            overlong_buffer=overlong_buffer,
            missing_eos_score=config.missing_eos_score,
            missing_eos_penalty=config.missing_eos_penalty,
        ),
        num_generations=num_generations,
        use_sampler_logprobs=from_sampler,
        importance=importance,
        dynamic_sampling=dynamic_sampling,
        kl_controller=config.kl_controller,
        measures_kl=config.measure_kl,
        ptx=config.ptx,
        value_warmup=value_warmup,
        value_optimizer=value_optimizer,
    )
