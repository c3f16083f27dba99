"""The choice among the preference losses: what a config names, what they read of the models, and their mixture."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, PyTree

from rlhf_jax.config import Finite, NonNegative, Positive, Range, check_ranges
from rlhf_jax.core import divergences, logprobs, masking, reference_free_losses
from rlhf_jax.core import preference_losses as losses
from rlhf_jax.core.metrics import Metric, mean
from rlhf_jax.core.preference_losses import Pairs
from rlhf_jax.models.head import TokenStats
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.types import PreferenceBatch

LossName = Literal[
    "sigmoid",
    "cdpo",
    "robust",
    "hinge",
    "ipo",
    "sigmoid_norm",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "cpo",
    "simpo",
    "orpo",
]
Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
Beta = float | Float[Array, ""]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceLossConfig:
    """One preference loss, or the sum of several with weights. What no chosen loss reads must keep its default."""

    losses: tuple[LossName, ...] = ("sigmoid",)  # losses, which are summed
    loss_weights: tuple[Finite, ...] | None = None  # weights in the sum; None: 1 each
    label_smoothing: Annotated[float, Range(at_least=0, below=0.5)] = 0.0  # assumed share of flipped labels
    divergence: Divergence = "reverse_kl"  # divergence from the reference
    # Alpha of the alpha-divergence, between 0 (reverse KL) and 1 (forward KL).
    divergence_alpha: Annotated[float, Range(above=0, below=1)] = 0.5
    discopop_tau: Positive = 0.05  # tau of DiscoPOP's modulation (eq. 5 of Lu et al. 2024, arXiv:2406.08414)
    simpo_gamma: NonNegative = 0.5  # SimPO's target margin, in nats
    cpo_alpha: NonNegative = 1.0  # weight of CPO's likelihood
    # LD-DPO's weight of tokens beyond the shorter response; None: 1.
    ld_alpha: Annotated[float, Range(at_least=0, below=1)] | None = None
    use_weighting: bool = False  # WPO: weight pairs by how likely the policy is to write them

    def __post_init__(self) -> None:
        if not self.losses:
            raise ValueError(f"losses is empty: name one or more of {', '.join(LOSSES)}")
        if len(set(self.losses)) < len(self.losses):
            raise ValueError(f"losses = {self.losses} names a loss twice: give it a weight in loss_weights instead")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.losses):
            raise ValueError(f"loss_weights = {self.loss_weights} must have one weight for each of {self.losses}")
        self._check_values()
        for field in dataclasses.fields(self):
            if field.name in READERS and getattr(self, field.name) != field.default:
                self._check_read(field.name)
        if self.divergence_alpha != 0.5 and self.divergence != "alpha_divergence":
            raise ValueError(
                f"divergence_alpha = {self.divergence_alpha} is not read with divergence = {self.divergence!r}: "
                "leave it out, or choose 'alpha_divergence'"
            )

    def _check_values(self) -> None:
        check_ranges(self)
        if "exo_pair" in self.losses and self.label_smoothing == 0:
            raise ValueError("exo_pair takes the logarithm of label_smoothing = 0: set it above 0 (0.001 in the paper)")

    def _check_read(self, option: str) -> None:
        readers, value = READERS[option], getattr(self, option)
        others = [name for name in self.losses if name not in readers]
        if others and (option in OF_ALL or len(others) == len(self.losses)):
            raise ValueError(
                f"{option} = {value!r} is not read by {', '.join(others)}{WHY.get(option, '')}: leave it out, or "
                f"choose among {', '.join(sorted(readers))}"
            )

    @property
    def needs_reference(self) -> bool:
        """Whether a chosen loss reads the reference's log-probabilities."""
        return not set(self.losses) <= REFERENCE_FREE

    @property
    def of_the_whole_batch(self) -> bool:
        """Whether a chosen loss compares each pair with all others, and so cannot be accumulated over parts."""
        return not SORTING.isdisjoint(self.losses)

    @property
    def weights(self) -> tuple[float, ...]:
        """One weight a loss."""
        return self.loss_weights or (1.0,) * len(self.losses)


class PairStats(NamedTuple):
    """What one model says of the pairs of a batch."""

    chosen: Any  # float32[B], nats
    rejected: Any  # float32[B]
    weights: Any = None  # float32[B]
    all_tokens: Any = None  # (float32[B], float32[B]): with all tokens counted alike, where LD-DPO's stand above


def check_micro_batch(config: PreferenceLossConfig, micro_batch: int | None) -> None:
    """Raises ValueError where gradients are accumulated of a loss that sorts the whole batch."""
    if micro_batch is not None and config.of_the_whole_batch:
        raise ValueError(
            f"optimizer.micro_batch = {micro_batch}, and {' and '.join(sorted(SORTING.intersection(config.losses)))} "
            "sorts all pairs of a batch: over parts of it, it would be another loss. Set micro_batch = None"
        )


def pair_stats(
    config: PreferenceLossConfig,
    network: PolicyNetwork,
    params: PyTree,
    batch: PreferenceBatch,
    dropout_keys: Key[Array, "B"] | None = None,
) -> PairStats:
    """What the chosen losses read of a model's log-probabilities of a batch, in one forward pass.

    These are the responses' log-probabilities, with LD-DPO its own as well, and with WPO the pairs' weights.
    """
    stats = network.pair_stats(params, batch, dropout_keys=dropout_keys)
    return of_tokens(config, *stats, batch.chosen_mask, batch.rejected_mask)


def of_tokens(
    config: PreferenceLossConfig,
    chosen: TokenStats,
    rejected: TokenStats,
    chosen_mask: Bool[Array, "B T"],
    rejected_mask: Bool[Array, "B T"],
) -> PairStats:
    """The statistics of the pairs, given those of their tokens."""
    alpha, sides = config.ld_alpha, ((chosen, chosen_mask), (rejected, rejected_mask))
    sums = [logprobs.sequence_logprobs(stats.logprobs, mask) for stats, mask in sides]
    weights = None
    if config.use_weighting:
        each = [losses.wpo_weights(stats.logprobs, stats.log_sum_sq_probs, mask) for stats, mask in sides]
        weights = each[0] * each[1]
    if alpha is None:
        return PairStats(sums[0], sums[1], weights)
    shared = jnp.minimum(masking.lengths(chosen_mask), masking.lengths(rejected_mask))
    cut = [losses.desensitised_logprobs(stats.logprobs, mask, shared, alpha=alpha) for stats, mask in sides]
    return PairStats(cut[0], cut[1], weights, (sums[0], sums[1]))


def join(own: PairStats, reference: PairStats | None, batch: PreferenceBatch) -> Pairs:
    """The policy's statistics beside the reference's, which are None where the losses need none."""
    return Pairs(
        own.chosen,
        own.rejected,
        None if reference is None else reference.chosen,
        None if reference is None else reference.rejected,
        masking.lengths(batch.chosen_mask),
        masking.lengths(batch.rejected_mask),
        own.weights,
        own.all_tokens,
    )


def tokens_per_pair(chosen_mask: Bool[Array, "B T"], axes: tuple[str, ...]) -> Float[Array, ""]:
    """The mean number of chosen tokens of the pairs of a batch."""
    return masking.mean(masking.lengths(chosen_mask).astype(jnp.float32), axes)


def preference_loss(
    config: PreferenceLossConfig,
    pairs: Pairs,
    *,
    beta: Beta,
    axes: tuple[str, ...],
    tokens_per_pair: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], dict[str, Metric]]:
    """The weighted sum of the chosen losses, each averaged over the pairs of the whole batch.

    Args: tokens_per_pair is the whole batch's where the pairs are a part of it, so that likelihoods accumulate to a
    mean over tokens; None takes it of the pairs.
    Returns: the loss, the implicit rewards as `rewards/{chosen,rejected,margins,accuracies}`, and the mean
    log-probabilities as `logps/{chosen,rejected}`; of a mixture, each loss as `loss/NAME`. The rewards are beta
    log(pi / pi_ref); without a reference beta log pi, for a token where the first loss is simpo or orpo.
    """
    if config.needs_reference and pairs.ref_chosen is None:
        raise TypeError(f"{', '.join(config.losses)} read the reference's log-probabilities, and there are none")
    if tokens_per_pair is None:
        tokens_per_pair = masking.mean(pairs.chosen_tokens.astype(jnp.float32), axes)
    given = _given(config, pairs, beta, jnp.maximum(tokens_per_pair, 1), axes)
    parts = {}
    for name in config.losses:
        each = LOSSES[name](given)
        parts[name] = mean(each if pairs.weights is None else pairs.weights * each, axes)
    weighted = (weight * part.value for weight, part in zip(config.weights, parts.values(), strict=True))
    loss = sum(weighted, start=jnp.float32(0))
    rewards = given.ratios if config.needs_reference else given.logprobs
    if not config.needs_reference and config.losses[0] in ("simpo", "orpo"):
        rewards = tuple(map(losses.per_token, given.all_tokens, given.tokens))
    metrics = losses.reward_metrics(beta * rewards[0], beta * rewards[1], axes) | {
        "logps/chosen": mean(pairs.chosen, axes),
        "logps/rejected": mean(pairs.rejected, axes),
    }
    if len(parts) > 1:
        metrics |= {f"loss/{name}": part for name, part in parts.items()}
    return loss, metrics


class _Given(NamedTuple):
    """What the losses are computed of."""

    config: PreferenceLossConfig
    logprobs: tuple[Array, Array]  # of the chosen and of the rejected responses
    all_tokens: tuple[Array, Array]  # the same, whose tokens count alike also where LD-DPO cuts what counts above
    ratios: tuple[Array, Array]  # to the reference; where there is none, the log-probabilities again
    scores: tuple[Array, Array]  # what the divergence makes of the ratios
    margins: tuple[Array, Array]  # chosen less rejected, of the policy and of the reference
    tokens: tuple[Array, Array]
    beta: Beta
    tokens_per_pair: Array
    axes: tuple[str, ...]


def _given(
    config: PreferenceLossConfig, pairs: Pairs, beta: Beta, tokens_per_pair: Array, axes: tuple[str, ...]
) -> _Given:
    own = pairs.chosen, pairs.rejected
    none = jnp.zeros_like(pairs.chosen)
    ref_chosen, ref_rejected = (none if ref is None else ref for ref in (pairs.ref_chosen, pairs.ref_rejected))
    ratios = own[0] - ref_chosen, own[1] - ref_rejected
    divergence = DIVERGENCES[config.divergence]
    return _Given(
        config,
        own,
        own if pairs.all_tokens is None else pairs.all_tokens,
        ratios,
        (divergence(ratios[0], config), divergence(ratios[1], config)),
        (own[0] - own[1], ref_chosen - ref_rejected),
        (pairs.chosen_tokens, pairs.rejected_tokens),
        beta,
        tokens_per_pair,
        axes,
    )


DIVERGENCES: dict[str, Callable[[Array, PreferenceLossConfig], Array]] = {
    "reverse_kl": lambda ratios, config: ratios,
    "forward_kl": lambda ratios, config: divergences.forward_kl(ratios),
    "js_divergence": lambda ratios, config: divergences.js_divergence(ratios),
    "alpha_divergence": lambda ratios, config: divergences.alpha_divergence(ratios, alpha=config.divergence_alpha),
}

LOSSES: dict[LossName, Callable[[_Given], Array]] = {
    "sigmoid": lambda x: losses.sigmoid_loss(*x.scores, beta=x.beta),
    "cdpo": lambda x: losses.cdpo_loss(*x.scores, beta=x.beta, label_smoothing=x.config.label_smoothing),
    "robust": lambda x: losses.robust_loss(*x.scores, beta=x.beta, label_smoothing=x.config.label_smoothing),
    "hinge": lambda x: losses.hinge_loss(*x.scores, beta=x.beta),
    "ipo": lambda x: losses.ipo_loss(*x.scores, *x.tokens, beta=x.beta),
    "sigmoid_norm": lambda x: losses.sigmoid_norm_loss(*x.scores, *x.tokens, beta=x.beta),
    "exo_pair": lambda x: losses.exo_pair_loss(*x.scores, beta=x.beta, label_smoothing=x.config.label_smoothing),
    "nca_pair": lambda x: losses.nca_pair_loss(*x.ratios, beta=x.beta),
    "bco_pair": lambda x: losses.bco_pair_loss(*x.ratios, beta=x.beta),
    "sppo_hard": lambda x: losses.sppo_hard_loss(*x.ratios, beta=x.beta),
    "aot": lambda x: losses.aot_loss(*x.margins, beta=x.beta, label_smoothing=x.config.label_smoothing, axes=x.axes),
    "aot_unpaired": lambda x: losses.aot_unpaired_loss(
        *x.ratios, beta=x.beta, label_smoothing=x.config.label_smoothing, axes=x.axes
    ),
    "apo_zero": lambda x: losses.apo_zero_loss(*x.ratios, beta=x.beta),
    "apo_down": lambda x: losses.apo_down_loss(*x.ratios, beta=x.beta),
    "discopop": lambda x: losses.discopop_loss(*x.scores, beta=x.beta, tau=x.config.discopop_tau),
    "sft": lambda x: reference_free_losses.sft_loss(x.all_tokens[0], tokens_per_pair=x.tokens_per_pair),
    "cpo": lambda x: reference_free_losses.cpo_loss(
        *x.logprobs,
        x.all_tokens[0],
        beta=x.beta,
        label_smoothing=x.config.label_smoothing,
        cpo_alpha=x.config.cpo_alpha,
        tokens_per_pair=x.tokens_per_pair,
    ),
    "simpo": lambda x: reference_free_losses.simpo_loss(
        *x.all_tokens,
        *x.tokens,
        beta=x.beta,
        gamma=x.config.simpo_gamma,
        label_smoothing=x.config.label_smoothing,
    ),
    "orpo": lambda x: reference_free_losses.orpo_loss(
        *x.all_tokens, *x.tokens, beta=x.beta, tokens_per_pair=x.tokens_per_pair
    ),
}
REFERENCE_FREE = frozenset({"sft", "cpo", "simpo", "orpo"})
SORTING = frozenset({"aot", "aot_unpaired"})
DIFFERENCES = frozenset({"sigmoid", "cdpo", "robust", "hinge", "ipo", "sigmoid_norm", "exo_pair", "discopop"})
"""The losses that read only the difference of two scores, in which a divergence's constant cancels."""

READERS: dict[str, frozenset[str]] = {
    "label_smoothing": frozenset({"cdpo", "robust", "exo_pair", "cpo", "simpo"}) | SORTING,
    "divergence": DIFFERENCES | {"sft"},
    "discopop_tau": frozenset({"discopop"}),
    "simpo_gamma": frozenset({"simpo"}),
    "cpo_alpha": frozenset({"cpo"}),
    "ld_alpha": frozenset(LOSSES) - {"sft", "simpo", "orpo"},
    "use_weighting": frozenset(LOSSES) - SORTING,
}
"""Which losses read an option; all that are chosen must read those `OF_ALL`, and one of them the others."""

OF_ALL = ("divergence", "use_weighting")

WHY: dict[str, str] = {
    "divergence": ", as its constant cancels only in the difference of two scores",
    "ld_alpha": ", as a likelihood is of all tokens and so is a mean log-probability",
    "use_weighting": ", as a sort takes pairs apart",
}
"""Why the others do not read an option that is not one loss's own."""
