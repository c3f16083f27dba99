r"""Preference losses with a reference: functions from the log-probabilities of pairs to one loss per pair.

Throughout, $\rho_w = \log\frac{\pi(y_w)}{\pi_{ref}(y_w)}$ is the log-ratio of the chosen response under the policy and
the reference, and $\rho_l$ that of the rejected one, in nats, summed over the response's tokens, EOS included.

`methods.preference_table` passes each function its inputs by parameter name. Losses marked `any_divergence` there may
receive log-ratios transformed by `core.divergences`. Beta may be an array.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax.core import masking

Beta = float | Float[Array, ""]


def sigmoid_loss(
    chosen_logratios: Float[Array, "B"], rejected_logratios: Float[Array, "B"], *, beta: Beta
) -> Float[Array, "B"]:
    r"""Direct preference optimisation: $-\log \sigma(\beta \rho_w - \beta \rho_l)$.

    Eq. 7 of Rafailov et al. 2023 (arXiv:2305.18290).

    Examples:
        A pair on which policy and reference agree, and one that the policy prefers by 20 nats:

        >>> chosen, rejected = jnp.array([0.0, 10.0]), jnp.array([0.0, -10.0])
        >>> print(jnp.round(sigmoid_loss(chosen, rejected, beta=0.1), 4))
        [0.6931 0.1269]
    """
    return -jax.nn.log_sigmoid(beta * chosen_logratios - beta * rejected_logratios)


def cdpo_loss(
    chosen_logratios: Float[Array, "B"], rejected_logratios: Float[Array, "B"], *, beta: Beta, label_smoothing: float
) -> Float[Array, "B"]:
    r"""Conservative DPO: $-(1-\epsilon) \log \sigma(m) - \epsilon \log \sigma(-m)$ with $m = \beta(\rho_w - \rho_l)$.

    Eq. 3 of Mitchell 2023 ("A note on DPO with noisy preferences & relationship to IPO"): a label is flipped with
    probability epsilon. The loss is minimal at $\sigma(m) = 1 - \epsilon$.

    Examples:
        Beyond that margin (here log 4 = 1.39), a larger one has a higher loss:

        >>> margins = jnp.array([0.0, 1.39, 5.0])
        >>> print(jnp.round(cdpo_loss(margins, 0 * margins, beta=1.0, label_smoothing=0.2), 2))
        [0.69 0.5  1.01]
    """
    return smoothed(beta * (chosen_logratios - rejected_logratios), label_smoothing)


def robust_loss(
    chosen_logratios: Float[Array, "B"], rejected_logratios: Float[Array, "B"], *, beta: Beta, label_smoothing: float
) -> Float[Array, "B"]:
    r"""Provably robust DPO: an unbiased estimate of `sigmoid_loss` from labels flipped with probability epsilon.

    $\frac{-(1-\epsilon) \log \sigma(m) + \epsilon \log \sigma(-m)}{1 - 2 \epsilon}$ with $m = \beta(\rho_w - \rho_l)$
    and epsilon below 1/2: Chowdhury et al. 2024 (arXiv:2403.00409).

    Examples:
        Over flips, its mean is the loss of the true label:

        >>> given = {"beta": 1.0, "label_smoothing": 0.2}
        >>> true, zero = jnp.array([1.5]), jnp.zeros(1)
        >>> print(jnp.round(0.8 * robust_loss(true, zero, **given) + 0.2 * robust_loss(zero, true, **given), 4))
        [0.2014]
        >>> print(jnp.round(sigmoid_loss(true, zero, beta=1.0), 4))
        [0.2014]
    """
    margins = beta * (chosen_logratios - rejected_logratios)
    kept, flipped = jax.nn.log_sigmoid(margins), jax.nn.log_sigmoid(-margins)
    return (label_smoothing * flipped - (1 - label_smoothing) * kept) / (1 - 2 * label_smoothing)


def hinge_loss(
    chosen_logratios: Float[Array, "B"], rejected_logratios: Float[Array, "B"], *, beta: Beta
) -> Float[Array, "B"]:
    r"""$\max(0, 1 - \beta(\rho_w - \rho_l))$: the hinge loss of SLiC (Zhao et al. 2023, arXiv:2305.10425).

    Applied to log-ratios to a reference, as in RSO (Liu et al. 2023, arXiv:2309.06657); beta is one over the margin.
    """
    return jax.nn.relu(1 - beta * (chosen_logratios - rejected_logratios))


def ipo_loss(
    chosen_logratios: Float[Array, "B"],
    rejected_logratios: Float[Array, "B"],
    chosen_tokens: Int[Array, "B"],
    rejected_tokens: Int[Array, "B"],
    *,
    beta: Beta,
) -> Float[Array, "B"]:
    r"""Identity preference optimisation: $(\frac{\rho_w}{|y_w|} - \frac{\rho_l}{|y_l|} - \frac{1}{2 \beta})^2$.

    Eq. 17 of Azar et al. 2023 (arXiv:2310.12036), where beta is tau. The paper does not divide by the lengths in
    tokens; TRL does, and reports that the authors confirmed it. At the optimum
    $\frac{\rho(y)}{|y|} = \frac1\beta \mathbb{E}_{y'}[p(y \succ y')]$ plus a constant: the paper's closed form if all
    responses have one length, with beta over that length as tau.

    Examples:
        The margin per token has a target, 1 / (2 beta) = 0.5, on either side of which the loss rises:

        >>> margins, one = jnp.array([0.0, 0.5, 1.0]), jnp.ones(3, jnp.int32)
        >>> print(ipo_loss(margins, 0 * margins, one, one, beta=1.0))
        [0.25 0.   0.25]
    """
    margins = per_token(chosen_logratios, chosen_tokens) - per_token(rejected_logratios, rejected_tokens)
    return jnp.square(margins - 1 / (2 * beta))


def sigmoid_norm_loss(
    chosen_logratios: Float[Array, "B"],
    rejected_logratios: Float[Array, "B"],
    chosen_tokens: Int[Array, "B"],
    rejected_tokens: Int[Array, "B"],
    *,
    beta: Beta,
) -> Float[Array, "B"]:
    r"""Length-normalised DPO: $-\log \sigma(\beta \frac{\rho_w}{|y_w|} - \beta \frac{\rho_l}{|y_l|})$.

    Lambert et al. 2024 (Tulu 3, arXiv:2411.15124), with lengths in tokens.
    """
    chosen, rejected = per_token(chosen_logratios, chosen_tokens), per_token(rejected_logratios, rejected_tokens)
    return sigmoid_loss(chosen, rejected, beta=beta)


def exo_pair_loss(
    chosen_logratios: Float[Array, "B"], rejected_logratios: Float[Array, "B"], *, beta: Beta, label_smoothing: float
) -> Float[Array, "B"]:
    r"""Efficient exact optimisation for pairs: reverse KL divergence from the model's choice to a smoothed label.

    $\sigma(m) \log\frac{\sigma(m)}{1-\epsilon} + \sigma(-m) \log\frac{\sigma(-m)}{\epsilon}$ with $m = \beta(\rho_w -
    \rho_l)$: eq. 16 of Ji et al. 2024 (arXiv:2402.00856). Epsilon must be above 0: the paper recommends 0.001, its
    code uses $e^{-10}$.
    """
    margins = beta * (chosen_logratios - rejected_logratios)
    won, lost = jax.nn.log_sigmoid(margins), jax.nn.log_sigmoid(-margins)
    won_part = jnp.exp(won) * (won - math.log1p(-label_smoothing))
    return won_part + jnp.exp(lost) * (lost - math.log(label_smoothing))


def nca_pair_loss(
    chosen_logratios: Float[Array, "B"], rejected_logratios: Float[Array, "B"], *, beta: Beta
) -> Float[Array, "B"]:
    r"""Noise contrastive alignment for pairs (Chen et al. 2024, arXiv:2402.05369).

    $-\log \sigma(\beta \rho_w) - \frac12 \log \sigma(-\beta \rho_w) - \frac12 \log \sigma(-\beta \rho_l)$.
    """
    chosen, rejected = beta * chosen_logratios, beta * rejected_logratios
    noise = jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected)
    return -jax.nn.log_sigmoid(chosen) - 0.5 * noise


def bco_pair_loss(
    chosen_logratios: Float[Array, "B"], rejected_logratios: Float[Array, "B"], *, beta: Beta
) -> Float[Array, "B"]:
    r"""Binary classifier optimisation for pairs: $-\log \sigma(\beta \rho_w) - \log \sigma(-\beta \rho_l)$.

    Jung et al. 2024 (arXiv:2404.04656), without the reward shift (a running mean of the rewards), as in TRL.
    """
    return -jax.nn.log_sigmoid(beta * chosen_logratios) - jax.nn.log_sigmoid(-beta * rejected_logratios)


def sppo_hard_loss(
    chosen_logratios: Float[Array, "B"], rejected_logratios: Float[Array, "B"], *, beta: Beta
) -> Float[Array, "B"]:
    r"""Self-play preference optimisation, hard labels: $(\rho_w - \frac{1}{2\beta})^2 + (\rho_l + \frac{1}{2\beta})^2$.

    Eq. 4.7 of Wu et al. 2024 (arXiv:2405.00675) with $\eta = 1 / \beta$, where the winner wins with probability 1.
    """
    return jnp.square(chosen_logratios - 0.5 / beta) + jnp.square(rejected_logratios + 0.5 / beta)


def aot_loss(
    chosen_logps: Float[Array, "B"],
    rejected_logps: Float[Array, "B"],
    ref_chosen_logps: Float[Array, "B"],
    ref_rejected_logps: Float[Array, "B"],
    *,
    beta: Beta,
    label_smoothing: float,
    axes: tuple[str, ...],
) -> Float[Array, "B"]:
    r"""Alignment via optimal transport, paired (Melnyk et al. 2024, arXiv:2406.05882).

    `cdpo_loss` of the difference between the i-th smallest policy margin $\log \pi(y_w) - \log \pi(y_l)$ and the i-th
    smallest reference margin, with ranks over the whole batch. Each device computes the losses of its share of the
    ranks, not of its own pairs: only their mean over all devices is meaningful.
    """
    policy, reference = chosen_logps - rejected_logps, ref_chosen_logps - ref_rejected_logps
    return smoothed(beta * (_sorted(policy, axes) - _sorted(reference, axes)), label_smoothing)


def aot_unpaired_loss(
    chosen_logratios: Float[Array, "B"],
    rejected_logratios: Float[Array, "B"],
    *,
    beta: Beta,
    label_smoothing: float,
    axes: tuple[str, ...],
) -> Float[Array, "B"]:
    r"""Alignment via optimal transport, unpaired (Melnyk et al. 2024, arXiv:2406.05882).

    As `aot_loss`, with the difference between the i-th smallest $\rho_w$ and the i-th smallest $\rho_l$ of the batch.
    """
    return smoothed(beta * (_sorted(chosen_logratios, axes) - _sorted(rejected_logratios, axes)), label_smoothing)


def apo_zero_loss(
    chosen_logratios: Float[Array, "B"], rejected_logratios: Float[Array, "B"], *, beta: Beta
) -> Float[Array, "B"]:
    r"""Anchored preference optimisation for responses better than the model's.

    $1 - \sigma(\beta\rho_w) + \sigma(\beta\rho_l)$: eq. 7 of D'Oosterlinck et al. 2024 (arXiv:2408.06266), plus 1 so
    that the loss is positive, as in TRL.
    """
    return jax.nn.sigmoid(-beta * chosen_logratios) + jax.nn.sigmoid(beta * rejected_logratios)


def apo_down_loss(
    chosen_logratios: Float[Array, "B"], rejected_logratios: Float[Array, "B"], *, beta: Beta
) -> Float[Array, "B"]:
    r"""Anchored preference optimisation for responses worse than the model's.

    $\sigma(\beta\rho_w) + 1 - \sigma(\beta(\rho_w - \rho_l))$: eq. 8 of D'Oosterlinck et al. 2024 (arXiv:2408.06266),
    plus 1 so that the loss is positive, as in TRL.
    """
    margins = chosen_logratios - rejected_logratios
    return jax.nn.sigmoid(beta * chosen_logratios) + jax.nn.sigmoid(-beta * margins)


def discopop_loss(
    chosen_logratios: Float[Array, "B"], rejected_logratios: Float[Array, "B"], *, beta: Beta, discopop_tau: float
) -> Float[Array, "B"]:
    r"""Log-ratio modulated loss, discovered by DiscoPOP: $-(1-s)\log\sigma(m) + s\,e^{-m}$ with $s = \sigma(m/\tau)$.

    Eq. 5 of Lu et al. 2024 (arXiv:2406.08414), $m = \beta(\rho_w - \rho_l)$; the paper recommends tau = 0.05. The
    second term is computed as one exponential, so that a low margin does not overflow.
    """
    margins = beta * (chosen_logratios - rejected_logratios)
    logistic = -jax.nn.log_sigmoid(margins) * jax.nn.sigmoid(-margins / discopop_tau)
    return logistic + jnp.exp(jax.nn.log_sigmoid(margins / discopop_tau) - margins)


def dpop_loss(
    chosen_logratios: Float[Array, "B"], rejected_logratios: Float[Array, "B"], *, beta: Beta, dpop_lambda: float
) -> Float[Array, "B"]:
    r"""DPO-Positive: $-\log \sigma(\beta(\rho_w - \rho_l - \lambda \max(0, -\rho_w)))$.

    Eq. 3 of Pal et al. 2024 (Smaug, arXiv:2402.13228v2). The penalty keeps the chosen response at least as likely as
    under the reference. They use $\lambda = 50$ with $\beta = 0.3$, and report that results hardly change between 5 and
    500 (github.com/abacusai/smaug/issues/2, which also corrects the brackets of v1).
    """
    penalty = jax.nn.relu(-chosen_logratios)
    return -jax.nn.log_sigmoid(beta * (chosen_logratios - rejected_logratios - dpop_lambda * penalty))


def alpha_dpo_loss(
    chosen_logps: Float[Array, "B"],
    rejected_logps: Float[Array, "B"],
    ref_chosen_logps: Float[Array, "B"],
    ref_rejected_logps: Float[Array, "B"],
    chosen_tokens: Int[Array, "B"],
    rejected_tokens: Int[Array, "B"],
    *,
    beta: Beta,
    label_smoothing: float,
    simpo_gamma: float,
    alpha_dpo_alpha: float,
    axes: tuple[str, ...],
) -> Float[Array, "B"]:
    r"""Alpha-DPO: SimPO whose target margin is larger where the policy already beats the reference by more.

    $-\log\sigma(\beta m - \gamma - \alpha \beta\,\mathrm{sg}[z])$ with the policy's margin
    $m = \frac{\log\pi(y_w)}{|y_w|} - \frac{\log\pi(y_l)}{|y_l|}$ and z the z-score, over the whole batch, of m less the
    reference's margin: Wu et al. 2024 (arXiv:2410.10148). No gradient passes through z. Labels are smoothed as in
    `cdpo_loss`, and the deviation is divided by the count less one, as in the authors' code, which also averages mean
    and deviation over past batches; we do not. The variance is stabilised by 1e-8: it is 0 before the first update.
    """
    policy = per_token(chosen_logps, chosen_tokens) - per_token(rejected_logps, rejected_tokens)
    reference = per_token(ref_chosen_logps, chosen_tokens) - per_token(ref_rejected_logps, rejected_tokens)
    centred = policy - reference - masking.mean(policy - reference, axes)
    degrees = jnp.maximum(masking.rows(centred, axes) - 1, 1).astype(centred.dtype)
    variance = masking.total(jnp.square(centred), axes) / degrees
    z_scores = jax.lax.stop_gradient(centred * jax.lax.rsqrt(variance + 1e-8))
    return smoothed(beta * (policy - alpha_dpo_alpha * z_scores) - simpo_gamma, label_smoothing)


def smoothed(margins: Float[Array, "B"], label_smoothing: float) -> Float[Array, "B"]:
    r"""$-(1-\epsilon) \log \sigma(m) - \epsilon \log \sigma(-m)$ for margins m, with `label_smoothing` as epsilon."""
    kept, flipped = jax.nn.log_sigmoid(margins), jax.nn.log_sigmoid(-margins)
    return -(1 - label_smoothing) * kept - label_smoothing * flipped


def per_token(x: Float[Array, "B"], tokens: Int[Array, "B"]) -> Float[Array, "B"]:
    """Divide a sum over a response's tokens by their number; 0 tokens count as 1."""
    return x / jnp.maximum(tokens, 1).astype(x.dtype)


def _sorted(x: Array, axes: tuple[str, ...]) -> Array:
    """Sort the whole batch in ascending order and return this device's share."""
    everyone = jnp.sort(masking.gather_rows(x, axes))
    return everyone[masking.local_rows(jnp.arange(len(everyone)), axes)]
