r"""Losses that learn a policy from pairs of responses, against a reference. Log-probabilities in, one loss a pair out.

Throughout, $\rho_w = \log\frac{\pi(y_w)}{\pi_{ref}(y_w)}$ is the log-ratio of the chosen response under policy and
reference, and $\rho_l$ that of the rejected one, in nats, summed over the response's tokens, EOS included. `chosen`
and `rejected` are these two, or what `core.divergences` makes of them. Beta may be an array.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.core import masking, metrics
from rlhf_jax.core.metrics import Metric
from rlhf_jax.types import AnyArray


class Pairs(NamedTuple):
    """What policy and reference say of B pairs, in nats, summed over response tokens, EOS included."""

    chosen: AnyArray  # float32[B], the policy's
    rejected: AnyArray  # float32[B]
    ref_chosen: AnyArray | None  # float32[B]; None where no loss reads the reference
    ref_rejected: AnyArray | None  # float32[B]
    chosen_tokens: AnyArray  # int32[B]: how many tokens a response has
    rejected_tokens: AnyArray  # int32[B]
    weights: AnyArray | None = None  # float32[B]: what each pair's loss is multiplied by, where it is
    all_tokens: Any = None  # (float32[B], float32[B]): chosen and rejected before LD-DPO made them what they are


def sigmoid_loss(
    chosen: Float[Array, "B"], rejected: Float[Array, "B"], *, beta: float | Float[Array, ""]
) -> Float[Array, "B"]:
    r"""Direct preference optimisation: $-\log \sigma(\beta \rho_w - \beta \rho_l)$.

    Eq. 7 of Rafailov et al. 2023 (arXiv:2305.18290).
    """
    return -jax.nn.log_sigmoid(beta * chosen - beta * rejected)


def cdpo_loss(
    chosen: Float[Array, "B"], rejected: Float[Array, "B"], *, beta: float | Float[Array, ""], label_smoothing: float
) -> Float[Array, "B"]:
    r"""Conservative DPO: $-(1-\epsilon) \log \sigma(m) - \epsilon \log \sigma(-m)$ with $m = \beta(\rho_w - \rho_l)$.

    Eq. 3 of Mitchell 2023 ("A note on DPO with noisy preferences & relationship to IPO"): a label is flipped with
    probability epsilon. The loss is least where $\sigma(m) = 1 - \epsilon$.
    """
    return smoothed(beta * (chosen - rejected), label_smoothing)


def robust_loss(
    chosen: Float[Array, "B"], rejected: Float[Array, "B"], *, beta: float | Float[Array, ""], label_smoothing: float
) -> Float[Array, "B"]:
    r"""Provably robust DPO, whose mean over labels flipped with probability epsilon is that of `sigmoid_loss` without.

    $\frac{-(1-\epsilon) \log \sigma(m) + \epsilon \log \sigma(-m)}{1 - 2 \epsilon}$ with $m = \beta(\rho_w - \rho_l)$
    and epsilon below 1/2: Chowdhury et al. 2024 (arXiv:2403.00409).
    """
    margins = beta * (chosen - rejected)
    kept, flipped = jax.nn.log_sigmoid(margins), jax.nn.log_sigmoid(-margins)
    return (label_smoothing * flipped - (1 - label_smoothing) * kept) / (1 - 2 * label_smoothing)


def hinge_loss(
    chosen: Float[Array, "B"], rejected: Float[Array, "B"], *, beta: float | Float[Array, ""]
) -> Float[Array, "B"]:
    r"""$\max(0, 1 - \beta(\rho_w - \rho_l))$: the hinge loss of SLiC (Zhao et al. 2023, arXiv:2305.10425).

    On log-ratios to a reference, as in RSO (Liu et al. 2023, arXiv:2309.06657); beta is one over the margin.
    """
    return jax.nn.relu(1 - beta * (chosen - rejected))


def ipo_loss(
    chosen: Float[Array, "B"],
    rejected: Float[Array, "B"],
    chosen_tokens: Int[Array, "B"],
    rejected_tokens: Int[Array, "B"],
    *,
    beta: float | Float[Array, ""],
) -> Float[Array, "B"]:
    r"""Identity preference optimisation: $(\frac{\rho_w}{|y_w|} - \frac{\rho_l}{|y_l|} - \frac{1}{2 \beta})^2$.

    Eq. 17 of Azar et al. 2023 (arXiv:2310.12036), where beta is tau. The lengths, in tokens, are not in the paper: TRL
    divides by them, and reports that the authors did so as well. At the optimum
    $\frac{\rho(y)}{|y|} = \frac1\beta \mathbb{E}_{y'}[p(y \succ y')]$ plus a constant: their closed form where all
    responses are of one length, with beta over that length as tau.
    """
    margins = per_token(chosen, chosen_tokens) - per_token(rejected, rejected_tokens)
    return jnp.square(margins - 1 / (2 * beta))


def sigmoid_norm_loss(
    chosen: Float[Array, "B"],
    rejected: Float[Array, "B"],
    chosen_tokens: Int[Array, "B"],
    rejected_tokens: Int[Array, "B"],
    *,
    beta: float | Float[Array, ""],
) -> Float[Array, "B"]:
    r"""Length-normalised DPO: $-\log \sigma(\beta \frac{\rho_w}{|y_w|} - \beta \frac{\rho_l}{|y_l|})$.

    Lambert et al. 2024 (Tulu 3, arXiv:2411.15124), the lengths being numbers of tokens.
    """
    chosen, rejected = per_token(chosen, chosen_tokens), per_token(rejected, rejected_tokens)
    return sigmoid_loss(chosen, rejected, beta=beta)


def exo_pair_loss(
    chosen: Float[Array, "B"], rejected: Float[Array, "B"], *, beta: float | Float[Array, ""], label_smoothing: float
) -> Float[Array, "B"]:
    r"""Efficient exact optimisation for pairs: the reverse KL divergence from a softened label to the model's choice.

    $\sigma(m) \log\frac{\sigma(m)}{1-\epsilon} + \sigma(-m) \log\frac{\sigma(-m)}{\epsilon}$ with $m = \beta(\rho_w -
    \rho_l)$: eq. 16 of Ji et al. 2024 (arXiv:2402.00856). Epsilon must be above 0: they advise 0.001, and their code
    has $e^{-10}$.
    """
    margins = beta * (chosen - rejected)
    won, lost = jax.nn.log_sigmoid(margins), jax.nn.log_sigmoid(-margins)
    won_part = jnp.exp(won) * (won - math.log1p(-label_smoothing))
    return won_part + jnp.exp(lost) * (lost - math.log(label_smoothing))


def nca_pair_loss(
    chosen: Float[Array, "B"], rejected: Float[Array, "B"], *, beta: float | Float[Array, ""]
) -> Float[Array, "B"]:
    r"""Noise contrastive alignment for pairs (Chen et al. 2024, arXiv:2402.05369).

    $-\log \sigma(\beta \rho_w) - \frac12 \log \sigma(-\beta \rho_w) - \frac12 \log \sigma(-\beta \rho_l)$.
    """
    chosen, rejected = beta * chosen, beta * rejected
    noise = jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected)
    return -jax.nn.log_sigmoid(chosen) - 0.5 * noise


def bco_pair_loss(
    chosen: Float[Array, "B"], rejected: Float[Array, "B"], *, beta: float | Float[Array, ""]
) -> Float[Array, "B"]:
    r"""Binary classifier optimisation for pairs: $-\log \sigma(\beta \rho_w) - \log \sigma(-\beta \rho_l)$.

    Jung et al. 2024 (arXiv:2404.04656), without their reward shift (a running mean of the rewards), as in TRL.
    """
    return -jax.nn.log_sigmoid(beta * chosen) - jax.nn.log_sigmoid(-beta * rejected)


def sppo_hard_loss(
    chosen: Float[Array, "B"], rejected: Float[Array, "B"], *, beta: float | Float[Array, ""]
) -> Float[Array, "B"]:
    r"""Self-play preference optimisation, hard labels: $(\rho_w - \frac{1}{2\beta})^2 + (\rho_l + \frac{1}{2\beta})^2$.

    Eq. 4.7 of Wu et al. 2024 (arXiv:2405.00675) with $\eta = 1 / \beta$, where the winner wins with probability 1.
    """
    return jnp.square(chosen - 0.5 / beta) + jnp.square(rejected + 0.5 / beta)


def aot_loss(
    policy_margins: Float[Array, "B"],
    ref_margins: Float[Array, "B"],
    *,
    beta: float | Float[Array, ""],
    label_smoothing: float,
    axes: tuple[str, ...],
) -> Float[Array, "B"]:
    r"""Alignment via optimal transport, paired (Melnyk et al. 2024, arXiv:2406.05882).

    `cdpo_loss` of the difference between the i-th smallest of the policy's margins $\log \pi(y_w) - \log \pi(y_l)$ and
    the i-th smallest of the reference's, i being a rank in the whole batch. A device's losses are those of its share of
    the ranks, which are not the pairs that it holds: only their mean over all devices has a meaning.
    """
    return smoothed(beta * (_sorted(policy_margins, axes) - _sorted(ref_margins, axes)), label_smoothing)


def aot_unpaired_loss(
    chosen: Float[Array, "B"],
    rejected: Float[Array, "B"],
    *,
    beta: float | Float[Array, ""],
    label_smoothing: float,
    axes: tuple[str, ...],
) -> Float[Array, "B"]:
    r"""Alignment via optimal transport, unpaired (Melnyk et al. 2024, arXiv:2406.05882).

    As `aot_loss`, of the difference between the i-th smallest $\rho_w$ and the i-th smallest $\rho_l$ of the batch.
    """
    return smoothed(beta * (_sorted(chosen, axes) - _sorted(rejected, axes)), label_smoothing)


def apo_zero_loss(
    chosen: Float[Array, "B"], rejected: Float[Array, "B"], *, beta: float | Float[Array, ""]
) -> Float[Array, "B"]:
    r"""Anchored preference optimisation for data better than the model.

    $1 - \sigma(\beta\rho_w) + \sigma(\beta\rho_l)$: eq. 7 of D'Oosterlinck et al. 2024 (arXiv:2408.06266), with the 1
    that makes the loss positive, as in TRL.
    """
    return jax.nn.sigmoid(-beta * chosen) + jax.nn.sigmoid(beta * rejected)


def apo_down_loss(
    chosen: Float[Array, "B"], rejected: Float[Array, "B"], *, beta: float | Float[Array, ""]
) -> Float[Array, "B"]:
    r"""Anchored preference optimisation for data worse than the model.

    $\sigma(\beta\rho_w) + 1 - \sigma(\beta(\rho_w - \rho_l))$: eq. 8 of D'Oosterlinck et al. 2024 (arXiv:2408.06266),
    with the 1 that makes the loss positive, as in TRL.
    """
    return jax.nn.sigmoid(beta * chosen) + jax.nn.sigmoid(-beta * (chosen - rejected))


def discopop_loss(
    chosen: Float[Array, "B"], rejected: Float[Array, "B"], *, beta: float | Float[Array, ""], tau: float
) -> Float[Array, "B"]:
    r"""The log-ratio modulated loss that DiscoPOP found: $-(1-s)\log\sigma(m) + s\,e^{-m}$ with $s = \sigma(m/\tau)$.

    Eq. 5 of Lu et al. 2024 (arXiv:2406.08414), $m = \beta(\rho_w - \rho_l)$; they advise tau = 0.05. The second term is
    computed as one exponential, so that a low margin does not overflow.
    """
    margins = beta * (chosen - rejected)
    logistic = -jax.nn.log_sigmoid(margins) * jax.nn.sigmoid(-margins / tau)
    return logistic + jnp.exp(jax.nn.log_sigmoid(margins / tau) - margins)


def desensitised_logprobs(
    logprobs: Float[Array, "B T"], mask: Bool[Array, "B T"], shared: Int[Array, "B"], *, alpha: float
) -> Float[Array, "B"]:
    r"""LD-DPO's log-probability of a response: that of its first tokens, and alpha times that of the rest.

    $\sum_{t \le l} \log\pi(y_t) + \alpha \sum_{t > l} \log\pi(y_t)$, l being the length of the shorter response of the
    pair (`shared`, in tokens): Liu et al. 2024 (arXiv:2409.06411). Alpha = 1 is the log-probability itself; with 0 as
    many tokens of both responses count.
    """
    within = jnp.cumsum(mask, axis=1, dtype=jnp.int32) <= shared[:, None]
    return jnp.sum(jnp.where(mask, jnp.where(within, logprobs, alpha * logprobs), 0), axis=1)


def wpo_weights(
    logprobs: Float[Array, "B T"], log_sum_sq_probs: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, "B"]:
    r"""How on-policy each response is: $\exp \frac{1}{|y|} \sum_t (\log \pi(y_t) - \log \sum_v \pi(v)^2)$, no gradient.

    Eq. 2 of Zhou et al. 2024 (WPO, arXiv:2406.11827), with the alignment to sampled outputs: a response sampled from
    the policy weighs about 1. The loss of a pair is multiplied by both responses' weights, whose product the authors'
    code holds at 1 at most, as TRL's does not; nor do we.
    """
    aligned = jnp.where(mask, logprobs - log_sum_sq_probs, 0)
    return jax.lax.stop_gradient(jnp.exp(per_token(jnp.sum(aligned, axis=1), masking.lengths(mask))))


def reward_metrics(
    chosen_rewards: Float[Array, "B"], rejected_rewards: Float[Array, "B"], axes: tuple[str, ...]
) -> dict[str, Metric]:
    """Means of the implicit rewards, as `rewards/{chosen,rejected,margins,accuracies}`. A tie counts as half right."""
    margins = chosen_rewards - rejected_rewards
    return {
        "rewards/chosen": metrics.mean(chosen_rewards, axes),
        "rewards/rejected": metrics.mean(rejected_rewards, axes),
        "rewards/margins": metrics.mean(margins, axes),
        "rewards/accuracies": metrics.mean(0.5 * (1 + jnp.sign(margins)), axes),
    }


def smoothed(margins: Float[Array, "B"], label_smoothing: float) -> Float[Array, "B"]:
    r"""$-(1-\epsilon) \log \sigma(m) - \epsilon \log \sigma(-m)$ of margins m, epsilon being `label_smoothing`."""
    kept, flipped = jax.nn.log_sigmoid(margins), jax.nn.log_sigmoid(-margins)
    return -(1 - label_smoothing) * kept - label_smoothing * flipped


def per_token(x: Float[Array, "B"], tokens: Int[Array, "B"]) -> Float[Array, "B"]:
    """A sum over the tokens of a response as their mean; 0 tokens count as 1."""
    return x / jnp.maximum(tokens, 1).astype(x.dtype)


def _sorted(x: Array, axes: tuple[str, ...]) -> Array:
    """This device's share of the whole batch in ascending order."""
    everyone = jnp.sort(masking.gather_rows(x, axes))
    return everyone[masking.own_rows(jnp.arange(len(everyone)), axes)]
