"""ppo: maximise a reward model's scores with a clipped surrogate, a value function and a KL penalty.

The algorithm of Ziegler et al. 2019 (arXiv:1909.08593) and Stiennon et al. 2020 (arXiv:2009.01325), with the details of
Huang et al. 2024 (arXiv:2403.17031): no dropout, the score on the last response token, a penalty for responses
without EOS, whitened advantages, a value function initialised from the reward model, clipped values, Adam's epsilon of
1e-5.

This file has the PPO-specific parts: the value function, its initialisation, GAE, and the choice of the loss. The
iteration is in `methods/policy_gradient.py`.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
from jaxtyping import Array, PRNGKeyArray

from rlhf_jax.config import CountOrZero, NonNegative, Positive, Share
from rlhf_jax.core import masking
from rlhf_jax.core.advantages import gae, whiten_rewards
from rlhf_jax.core.keys import derive
from rlhf_jax.core.policy_losses import AGGREGATIONS, ppo_clip
from rlhf_jax.loading.context import Context
from rlhf_jax.loading.models import Policy, RewardModel, as_reward_model
from rlhf_jax.methods.policy_config import (
    Estimator,
    OverlongBuffer,
    Place,
    PolicyGradientConfig,
    check_dual_clip,
    check_penalty,
    make_method,
)
from rlhf_jax.methods.policy_gradient import PolicyGradient
from rlhf_jax.methods.policy_method import OnlineMethod
from rlhf_jax.methods.policy_optimizer import check_value_optimizer
from rlhf_jax.methods.policy_parts import Advantages, Experience
from rlhf_jax.methods.policy_training import ValueStart, train_policy
from rlhf_jax.models import value_head
from rlhf_jax.runtime.optimizers import OptimizerConfig
from rlhf_jax.types import RlhfError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOConfig(PolicyGradientConfig):
    """Config of PPO."""

    kind: Literal["ppo"]
    kl_coef: NonNegative  # coefficient of the KL penalty
    gamma: Share  # discount of a token
    gae_lambda: Share  # lambda of GAE (Schulman et al. 2016, arXiv:1506.02438)
    # Epsilon: ratios are clipped to 1 - epsilon and 1 + epsilon (eq. 7 of Schulman et al. 2017, arXiv:1707.06347).
    clip_ratio: Positive
    value_clip: Positive | None  # values are clipped to this distance from the old ones; None: no clipping
    vf_coef: NonNegative  # weight of the value loss
    clip_ratio_high: Positive | None = None  # upper epsilon; None: clip_ratio
    dual_clip: Positive | None = None  # upper bound of ratios with negative advantage (3 in verl); None: no bound
    kl_estimator: Estimator = "k1"  # estimator of the KL divergence (core/kl.py)
    kl_in: Place = "reward"  # place of the KL penalty: the rewards, or the loss
    whiten_rewards: bool = False  # scale token rewards to variance 1, without shifting their mean
    whiten_advantages: bool = True  # scale advantages to mean 0 and variance 1
    # Last share of the maximum response length, over which a penalty rises linearly to 1 (eq. 13 of DAPO,
    # arXiv:2503.14476); 0: no penalty.
    overlong_buffer: OverlongBuffer = 0.0
    # Network below the value head: a copy of the reward model's, a copy of the policy's, or the policy itself.
    value_trunk: Literal["reward_model", "policy", "shared"] = "reward_model"
    value_head: Literal["zero", "normal", "reward_model"] = "zero"  # initialisation of the value head
    value_warmup: CountOrZero = 0  # initial iterations that train only the value function
    # Optimiser of the value function (verl's critic.optim); None: the policy's, as in TRL. With value_trunk =
    # 'shared' it trains only the value head.
    value_optimizer: OptimizerConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dual_clip is not None:
            check_dual_clip(self.dual_clip, self.upper_clip_ratio)
        check_penalty(self, self.kl_coef, self.kl_estimator, self.kl_in)
        check_value_optimizer(self.value_optimizer)
        if self.value_warmup and self.value_warmup >= self.iterations:
            raise ValueError(
                f"value_warmup = {self.value_warmup} leaves none of iterations = {self.iterations} to the policy: "
                "lower it"
            )
        if self.value_head == "reward_model" and self.value_trunk != "reward_model":
            raise ValueError(
                f"value_head = 'reward_model' reads the reward model's trunk, not value_trunk = {self.value_trunk!r}"
            )

    @property
    def upper_clip_ratio(self) -> float:
        """Distance of the upper bound from 1."""
        return self.clip_ratio if self.clip_ratio_high is None else self.clip_ratio_high


def build_method(config: PPOConfig) -> OnlineMethod[Experience]:
    """Make PPO's method from a config: GAE, the clipped surrogate and the clipped value loss."""

    def advantages(rewards: Array, values: Array, mask: Array, trained: Array, axes: tuple[str, ...]) -> Advantages:
        if config.whiten_rewards:
            rewards = whiten_rewards(rewards, mask, axes)
        found, returns = gae(rewards, values, mask, gamma=config.gamma, gae_lambda=config.gae_lambda)
        return Advantages(masking.whiten(found, trained, axes) if config.whiten_advantages else found, returns)

    loss = functools.partial(
        ppo_clip,
        clip_ratio=config.clip_ratio,
        clip_ratio_high=config.upper_clip_ratio,
        dual_clip=math.inf if config.dual_clip is None else config.dual_clip,
    )
    learner = functools.partial(
        PolicyGradient,
        policy_loss=loss,
        advantages=advantages,
        aggregation=AGGREGATIONS["token"],
        vf_coef=config.vf_coef,
        value_clip=math.inf if config.value_clip is None else config.value_clip,
    )
    return make_method(
        config,
        learner,
        kl_coef=config.kl_coef,
        kl_estimator=config.kl_estimator,
        kl_in=config.kl_in,
        overlong_buffer=config.overlong_buffer,
        value_warmup=config.value_warmup,
        value_optimizer=config.value_optimizer,
    )


def run(config: PPOConfig, context: Context) -> dict[str, Any]:
    """Train `context.seeds` policies at once, each with its own prompts, samples and initial key."""
    return train_policy(config, build_method(config), functools.partial(start_value, config), context)


def start_value(config: PPOConfig, policy: Policy, reward_model: RewardModel | None, key: PRNGKeyArray) -> ValueStart:
    """Make the value function before the first iteration.

    `value_trunk` selects a copy of the reward model's trunk (Huang et al. 2024; of the policy's if the reward model
    reads other tokens), a copy of the policy's, or the policy's trunk itself. `value_head` gives values of 0 (Ziegler
    et al. 2019), is drawn from N(0, 1/(d+1)), or is a copy of the reward model's (Huang et al. 2024).
    """
    if config.value_trunk == "shared":
        width = policy.network.config.d_model
        zero = config.value_head == "zero"
        return ValueStart("shared", value_head.init_zero(width) if zero else value_head.init_normal(width, key))
    if config.value_head == "reward_model" and reward_model is None:
        raise RlhfError(
            f"value_head = 'reward_model': {config.reward_model!r} does not read the policy's tokens: set 'zero'"
        )
    model = reward_model if config.value_trunk == "reward_model" else None
    model = as_reward_model(policy, key) if model is None else model
    if config.value_head == "reward_model":
        return ValueStart(model.network, model.params)
    if config.value_head == "zero":
        return ValueStart(model.network, model.network.init_value(model.params))
    head = jax.jit(lambda key: model.network.init(key)["head"])(derive(key, "head"))
    return ValueStart(model.network, {"body": model.params["body"], "head": head})
