"""group_rl: policy gradients without a value function; the baselines come from other responses.

RLOO, REINFORCE++, GRPO, Dr. GRPO, DAPO, GSPO, CISPO and SAPO are one iteration (`methods/policy_gradient.py`) with
different fields. `METHODS` holds each paper's settings, or common defaults where a paper gives none; any of them can be
overridden. Fields for sampling, scores, KL penalty and optimiser are the same as in PPO.
"""

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any, Literal

from jaxtyping import Array

from rlhf_jax.config import Count, CountOrZero, FunctionSource, NonNegative, Positive, Share
from rlhf_jax.core.advantages import CRITIC_FREE
from rlhf_jax.core.policy_losses import AGGREGATIONS, OPTIONS, POLICY_LOSSES
from rlhf_jax.loading.context import Context
from rlhf_jax.methods.dynamic_sampling import DynamicSampling
from rlhf_jax.methods.policy_config import (
    Estimator,
    OverlongBuffer,
    Place,
    PolicyGradientConfig,
    check_dual_clip,
    check_penalty,
    make_method,
)
from rlhf_jax.methods.policy_functions import find_advantage, find_policy_loss
from rlhf_jax.methods.policy_gradient import PolicyGradient
from rlhf_jax.methods.policy_method import OnlineMethod
from rlhf_jax.methods.policy_parts import Advantages, Experience
from rlhf_jax.methods.policy_training import no_value, train_policy

# Defaults of TRL and verl, for papers that give no bounds.
PPO_BOUNDS = {"policy_loss": "ppo", "clip_ratio": 0.2, "clip_ratio_high": 0.2}
WITHOUT_PENALTY = {"kl_coef": 0.0, "kl_estimator": "k3", "kl_in": "loss"}

METHODS: dict[str, dict[str, Any]] = {
    # Ahmadian et al. 2024 (arXiv:2402.14740): a response is one action. Bounds as in TRL's RLOOTrainer; they have no
    # effect on the first update of an iteration.
    "rloo": {
        "advantage": "rloo",
        "policy_loss": "sequence",
        "aggregation": "sequence",
        "clip_ratio": 0.2,
        "clip_ratio_high": 0.2,
        "kl_estimator": "k1",
        "kl_in": "reward",
    },
    # Hu et al. 2025 (arXiv:2501.03262): first for one response per prompt, then for groups whose mean is the baseline.
    # The second has k2 in the loss, as in the authors' scripts (OpenRLHF); its gradient is that of the divergence.
    "reinforce_plus_plus": {
        **PPO_BOUNDS,
        "advantage": "reinforce_plus_plus",
        "aggregation": "token",
        "kl_estimator": "k1",
        "kl_in": "reward",
    },
    "reinforce_plus_plus_baseline": {
        **PPO_BOUNDS,
        "advantage": "reinforce_plus_plus_baseline",
        "aggregation": "token",
        "kl_estimator": "k2",
        "kl_in": "loss",
    },
    # Shao et al. 2024 (DeepSeekMath, arXiv:2402.03300), with the coefficient of section 4.2.
    "grpo": {
        **PPO_BOUNDS,
        "advantage": "grpo",
        "aggregation": "sequence",
        "kl_coef": 0.04,
        "kl_estimator": "k3",
        "kl_in": "loss",
    },
    # Liu et al. 2025 (arXiv:2503.20783), whose runs have no penalty.
    "dr_grpo": {**PPO_BOUNDS, **WITHOUT_PENALTY, "advantage": "dr_grpo", "aggregation": "constant"},
    # Yu et al. 2025 (arXiv:2503.14476), section 4.1: L_cache is 4096 of 20480 tokens. The paper does not bound
    # the number of rounds; the bound is from verl's description of DAPO.
    "dapo": {
        **PPO_BOUNDS,
        **WITHOUT_PENALTY,
        "advantage": "grpo",
        "aggregation": "token",
        "clip_ratio_high": 0.28,
        "dynamic_sampling_rounds": 10,
        "overlong_buffer": 0.2,
    },
    # Zheng et al. 2025 (arXiv:2507.18071), section 5.1.
    "gspo": {
        **WITHOUT_PENALTY,
        "advantage": "grpo",
        "policy_loss": "gspo",
        "aggregation": "sequence",
        "clip_ratio": 3e-4,
        "clip_ratio_high": 4e-4,
    },
    # Chen et al. 2025 (MiniMax-M1, arXiv:2506.13585), which names no bound. Weights of at most 5 are those of Khatri et
    # al. 2025 (ScaleRL, arXiv:2510.13786).
    "cispo": {
        **WITHOUT_PENALTY,
        "advantage": "grpo",
        "policy_loss": "cispo",
        "aggregation": "token",
        "clip_ratio_high": 4.0,
    },
    # Gao et al. 2025 (arXiv:2511.20347): the temperatures are theirs, and TRL's defaults.
    "sapo": {
        **WITHOUT_PENALTY,
        "advantage": "grpo",
        "policy_loss": "sapo",
        "aggregation": "sequence",
        "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05,
    },
}
"""Settings of each method. `rloo` and both `reinforce_plus_plus` have no default for `kl_coef`."""

if TYPE_CHECKING:
    Name = Advantage = PolicyLoss = str
else:
    Name = Literal[tuple(METHODS)]
    Advantage = Literal[tuple(CRITIC_FREE)]
    PolicyLoss = Literal[tuple(POLICY_LOSSES)]

DEFAULTS: dict[str, Any] = {"dual_clip": math.inf, "gamma": 1.0, "dynamic_sampling_rounds": 0, "overlong_buffer": 0.0}
"""Defaults of fields that a method does not set."""

OVERRIDABLE = ("advantage", "policy_loss", "aggregation", "kl_coef", "kl_estimator", "kl_in", *OPTIONS, *DEFAULTS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupRLConfig(PolicyGradientConfig):
    """Config of the group methods: a preset and overrides. None keeps the preset's value."""

    kind: Literal["group_rl"]
    method: Name  # preset; fields below that are None keep its values
    num_generations: Count  # group size: responses per prompt
    advantage: Advantage | FunctionSource | None = None  # advantage estimator; your own: 'mine.py:my_advantage'
    gamma: Share | None = None  # discount of a token (reinforce_plus_plus); None: 1
    policy_loss: PolicyLoss | FunctionSource | None = None  # policy loss; your own: 'mine.py:my_loss'
    # Aggregation of token losses: mean over tokens, mean over responses' means or sums, or a constant denominator.
    aggregation: Literal["token", "sequence", "sequence_sum", "constant"] | None = None
    clip_ratio: Positive | None = None  # epsilon below 1
    clip_ratio_high: Positive | None = None  # epsilon above 1
    dual_clip: Positive | None = None  # upper bound of ratios with negative advantage (3 in verl); None: no bound
    sapo_temperature_pos: Positive | None = None  # SAPO's temperature where the advantage is positive
    sapo_temperature_neg: Positive | None = None  # SAPO's temperature where the advantage is negative
    kl_coef: NonNegative | None = None  # coefficient of the KL penalty
    kl_estimator: Estimator | None = None  # estimator of the KL divergence (core/kl.py)
    kl_in: Place | None = None  # place of the KL penalty: the rewards, or the loss
    # Maximum rounds of sampling to fill a batch with groups of unequal scores (DAPO); 0: no dynamic sampling.
    dynamic_sampling_rounds: CountOrZero | None = None
    # Last share of the maximum response length, over which a penalty rises linearly to 1 (eq. 13 of DAPO,
    # arXiv:2503.14476); 0: no penalty.
    overlong_buffer: OverlongBuffer | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        fields = resolve(self)
        if fields.get("kl_coef") is None:
            raise ValueError(f"method = {self.method!r} leaves kl_coef to you: set it, 0 for no penalty")
        estimator, loss = find_advantage(fields["advantage"]), find_policy_loss(fields["policy_loss"])
        if self.gamma is not None and not estimator.discounted:
            raise ValueError(f"gamma has no effect with advantage = {fields['advantage']!r}: leave it out")
        least = 2 if estimator.needs_groups else 1
        if self.num_generations < least:
            raise ValueError(
                f"num_generations = {self.num_generations} must be at least {least}: advantage = "
                f"{fields['advantage']!r} compares the responses to a prompt"
            )
        if self.batch_size % self.num_generations:
            raise ValueError(
                f"batch_size = {self.batch_size} responses do not divide into groups of num_generations = "
                f"{self.num_generations}"
            )
        for name in OPTIONS:
            if getattr(self, name) is not None and name not in loss.options:
                raise ValueError(f"{name} has no effect with policy_loss = {fields['policy_loss']!r}: leave it out")
            if name in loss.options and fields.get(name) is None:
                raise ValueError(f"policy_loss = {fields['policy_loss']!r} needs {name}: set it")
        if self.old_logprobs == "sampler" and not loss.has_ratio:
            raise ValueError(
                f"policy_loss = {fields['policy_loss']!r} has no ratio, and does not read old_logprobs = 'sampler': "
                "leave it out, or set policy_loss to 'cispo'"
            )
        if self.kl_in is not None and not fields["kl_coef"]:
            raise ValueError(f"kl_in = {self.kl_in!r} says where the penalty is, and kl_coef is 0: set kl_coef too")
        rounds = fields["dynamic_sampling_rounds"]
        if rounds and self.num_generations < 2:
            raise ValueError(
                f"dynamic_sampling_rounds = {rounds} keeps groups whose scores differ: set num_generations to 2 or more"
            )
        if {"dual_clip", "clip_ratio_high"} <= set(loss.options):
            check_dual_clip(fields["dual_clip"], fields["clip_ratio_high"])
        check_penalty(self, fields["kl_coef"], fields["kl_estimator"], fields["kl_in"])


def resolve(config: GroupRLConfig) -> dict[str, Any]:
    """Return all fields of a method: from the config if set, else from METHODS, else from DEFAULTS."""
    given = {name: getattr(config, name) for name in OVERRIDABLE if getattr(config, name) is not None}
    return DEFAULTS | METHODS[config.method] | given


def build_method(config: GroupRLConfig) -> OnlineMethod[Experience]:
    """Make the method from a config."""
    fields, size = resolve(config), config.num_generations
    estimator, loss = find_advantage(fields["advantage"]), find_policy_loss(fields["policy_loss"])
    discount = {"gamma": fields["gamma"]} if estimator.discounted else {}
    rounds = fields["dynamic_sampling_rounds"]

    def advantages(rewards: Array, values: Array, mask: Array, trained: Array, axes: tuple[str, ...]) -> Advantages:
        del values, trained
        return Advantages(estimator.function(rewards, mask, num_generations=size, axes=axes, **discount), None)

    learner = functools.partial(
        PolicyGradient,
        policy_loss=functools.partial(loss.function, **{name: fields[name] for name in loss.options}),
        advantages=advantages,
        aggregation=AGGREGATIONS[fields["aggregation"]],
    )
    return make_method(
        config,
        learner,
        kl_coef=fields["kl_coef"],
        kl_estimator=fields["kl_estimator"],
        kl_in=fields["kl_in"],
        overlong_buffer=fields["overlong_buffer"],
        num_generations=size,
        dynamic_sampling=DynamicSampling(rounds, size, config.batch_size) if rounds else None,
    )


def run(config: GroupRLConfig, context: Context) -> dict[str, Any]:
    """Train `context.seeds` policies at once, each with its own prompts, samples and initial key."""
    return train_policy(config, build_method(config), no_value, context)
