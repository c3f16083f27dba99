r"""Preference losses without a reference: functions from the log-probabilities of pairs to one loss per pair.

`chosen_logps` and `rejected_logps` are $\log \pi(y_w)$ and $\log \pi(y_l)$ in nats, summed over the response's tokens,
EOS included. With LD-DPO they come from `logprobs.length_desensitised`; `full_*_logps` are always the plain sums.

Likelihood terms are means over tokens, as in TRL: each pair's log-probability is divided by `tokens_per_pair`, the mean
number of chosen tokens per pair in the batch, so that the mean over pairs is the mean over all chosen tokens.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax.core.divergences import alpha_divergence
from rlhf_jax.core.preference_losses import Beta, per_token, smoothed


def sft_loss(full_chosen_logps: Float[Array, "B"], *, tokens_per_pair: Float[Array, ""]) -> Float[Array, "B"]:
    r"""Maximum likelihood of the chosen responses: $-\log\pi(y_w)$ over the mean number of tokens."""
    return -full_chosen_logps / tokens_per_pair


def cpo_loss(
    chosen_logps: Float[Array, "B"],
    rejected_logps: Float[Array, "B"],
    full_chosen_logps: Float[Array, "B"],
    *,
    beta: Beta,
    label_smoothing: float,
    cpo_alpha: float,
    tokens_per_pair: Float[Array, ""],
) -> Float[Array, "B"]:
    r"""Contrastive preference optimisation: $-\log \sigma(\beta \log\pi(y_w) - \beta \log\pi(y_l))$ plus `sft_loss`.

    Eq. 3 of Xu et al. 2024 (arXiv:2401.08417): DPO under a uniform reference, plus the likelihood of the chosen
    response. The paper adds the log-probability of the whole response; the authors' code and TRL add its mean over
    tokens times `cpo_alpha`, and smooth labels as `cdpo_loss` does. So do we.
    """
    margins = beta * (chosen_logps - rejected_logps)
    return smoothed(margins, label_smoothing) + cpo_alpha * sft_loss(full_chosen_logps, tokens_per_pair=tokens_per_pair)


def simpo_loss(
    full_chosen_logps: Float[Array, "B"],
    full_rejected_logps: Float[Array, "B"],
    chosen_tokens: Int[Array, "B"],
    rejected_tokens: Int[Array, "B"],
    *,
    beta: Beta,
    simpo_gamma: float,
    label_smoothing: float,
) -> Float[Array, "B"]:
    r"""Simple preference optimisation (Meng et al. 2024, arXiv:2405.14734), with lengths in tokens.

    $-\log\sigma(\beta\frac{\log\pi(y_w)}{|y_w|} - \beta\frac{\log\pi(y_l)}{|y_l|} - \gamma)$; labels are smoothed as
    in `cdpo_loss`, as in the authors' code and in TRL.
    """
    margins = per_token(full_chosen_logps, chosen_tokens) - per_token(full_rejected_logps, rejected_tokens)
    return smoothed(beta * margins - simpo_gamma, label_smoothing)


def orpo_loss(
    full_chosen_logps: Float[Array, "B"],
    full_rejected_logps: Float[Array, "B"],
    chosen_tokens: Int[Array, "B"],
    rejected_tokens: Int[Array, "B"],
    *,
    beta: Beta,
    tokens_per_pair: Float[Array, ""],
) -> Float[Array, "B"]:
    r"""Odds ratio preference optimisation (Hong et al. 2024, arXiv:2403.07691), where beta is lambda.

    `sft_loss` plus $-\beta\log\sigma(\log\frac{p_w}{1-p_w}-\log\frac{p_l}{1-p_l})$, where p is the geometric mean of a
    response's token probabilities. The likelihood covers the response alone; TRL's also covers the prompt, as the
    authors' code does by default. Log p is kept below -1e-6, because a response of
    probability 1 has infinite odds.
    """
    chosen, rejected = per_token(full_chosen_logps, chosen_tokens), per_token(full_rejected_logps, rejected_tokens)
    log_odds = _log_odds(chosen) - _log_odds(rejected)
    return sft_loss(full_chosen_logps, tokens_per_pair=tokens_per_pair) - beta * jax.nn.log_sigmoid(log_odds)


def alphapo_loss(
    full_chosen_logps: Float[Array, "B"],
    full_rejected_logps: Float[Array, "B"],
    chosen_tokens: Int[Array, "B"],
    rejected_tokens: Int[Array, "B"],
    *,
    beta: Beta,
    alphapo_alpha: float,
    simpo_gamma: float,
    label_smoothing: float,
) -> Float[Array, "B"]:
    r"""AlphaPO (Gupta et al. 2025, arXiv:2501.03884): SimPO with another shape of the reward.

    $-\log\sigma(\beta r_w - \beta r_l - \gamma)$ with $r = \frac{1 - p^{-\alpha}}{\alpha}$, where p is the geometric
    mean of a response's token probabilities; `simpo_loss` is the limit of alpha = 0. Labels are smoothed as in TRL. The
    exponent is bounded, as in `divergences`.
    """
    chosen, rejected = per_token(full_chosen_logps, chosen_tokens), per_token(full_rejected_logps, rejected_tokens)
    margins = alpha_divergence(chosen, alpha=alphapo_alpha) - alpha_divergence(rejected, alpha=alphapo_alpha)
    return smoothed(beta * margins - simpo_gamma, label_smoothing)


def _log_odds(logprobs: Array) -> Array:
    logprobs = jnp.minimum(logprobs, -1e-6)
    return logprobs - jnp.log(-jnp.expm1(logprobs))
