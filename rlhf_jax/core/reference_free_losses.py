r"""Preference losses without a reference. Log-probabilities of responses in, one loss a pair out.

`chosen` and `rejected` are $\log \pi(y_w)$ and $\log \pi(y_l)$ in nats, summed over the response's tokens with EOS.
A maximum-likelihood part is a mean over tokens, as in TRL: each pair's is divided by `tokens_per_pair`, the mean number
of chosen tokens of all pairs of the batch, so that the mean over the pairs is the mean over all chosen tokens.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax.core.preference_losses import per_token, smoothed


def sft_loss(chosen: Float[Array, "B"], *, tokens_per_pair: Float[Array, ""]) -> Float[Array, "B"]:
    r"""Maximum likelihood of the chosen responses: $-\log\pi(y_w)$ over the mean number of tokens."""
    return -chosen / tokens_per_pair


def cpo_loss(
    chosen: Float[Array, "B"],
    rejected: Float[Array, "B"],
    likelihood: Float[Array, "B"],
    *,
    beta: float | Float[Array, ""],
    label_smoothing: float,
    cpo_alpha: float,
    tokens_per_pair: Float[Array, ""],
) -> Float[Array, "B"]:
    r"""Contrastive preference optimisation: $-\log \sigma(\beta \log\pi(y_w) - \beta \log\pi(y_l))$ and `sft_loss`.

    Eq. 3 of Xu et al. 2024 (arXiv:2401.08417), DPO under a uniform reference, and the likelihood of what is preferred.
    In the paper that is the log-probability of a whole response; the authors' code and TRL add its mean over tokens,
    times `cpo_alpha`, and smooth the labels as `cdpo_loss` does. So do we.

    Args: likelihood is $\log \pi(y_w)$ again, also where chosen and rejected are those of `desensitised_logprobs`.
    """
    margins = beta * (chosen - rejected)
    return smoothed(margins, label_smoothing) + cpo_alpha * sft_loss(likelihood, tokens_per_pair=tokens_per_pair)


def simpo_loss(
    chosen: Float[Array, "B"],
    rejected: Float[Array, "B"],
    chosen_tokens: Int[Array, "B"],
    rejected_tokens: Int[Array, "B"],
    *,
    beta: float | Float[Array, ""],
    gamma: float,
    label_smoothing: float,
) -> Float[Array, "B"]:
    r"""Simple preference optimisation (Meng et al. 2024, arXiv:2405.14734), lengths being in tokens.

    $-\log\sigma(\beta\frac{\log\pi(y_w)}{|y_w|} - \beta\frac{\log\pi(y_l)}{|y_l|} - \gamma)$; labels are smoothed as
    in `cdpo_loss`, as in the authors' code and in TRL.
    """
    margins = per_token(chosen, chosen_tokens) - per_token(rejected, rejected_tokens)
    return smoothed(beta * margins - gamma, label_smoothing)


def orpo_loss(
    chosen: Float[Array, "B"],
    rejected: Float[Array, "B"],
    chosen_tokens: Int[Array, "B"],
    rejected_tokens: Int[Array, "B"],
    *,
    beta: float | Float[Array, ""],
    tokens_per_pair: Float[Array, ""],
) -> Float[Array, "B"]:
    r"""Odds ratio preference optimisation (Hong et al. 2024, arXiv:2403.07691), where beta is lambda.

    `sft_loss` and $-\beta\log\sigma(\log\frac{p_w}{1-p_w}-\log\frac{p_l}{1-p_l})$, p being the geometric mean of a
    response's token probabilities. The likelihood is that of the response alone; TRL learns the prompt's tokens too, as
    the authors' code does unless it is told not to. The odds of what is certain are infinite: log p is held below
    -1e-6.
    """
    log_odds = _log_odds(per_token(chosen, chosen_tokens)) - _log_odds(per_token(rejected, rejected_tokens))
    return sft_loss(chosen, tokens_per_pair=tokens_per_pair) - beta * jax.nn.log_sigmoid(log_odds)


def _log_odds(logprobs: Array) -> Array:
    logprobs = jnp.minimum(logprobs, -1e-6)
    return logprobs - jnp.log(-jnp.expm1(logprobs))
