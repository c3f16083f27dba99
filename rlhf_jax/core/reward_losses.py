"""Losses that learn a scalar reward from preferences."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax.core import masking, metrics
from rlhf_jax.core.metrics import Mean, Metric


def bradley_terry_loss(
    chosen_scores: Float[Array, "B"], rejected_scores: Float[Array, "B"], *, axes: tuple[str, ...]
) -> tuple[Float[Array, ""], dict[str, Metric]]:
    r"""Negative log-likelihood of the preferences under the Bradley-Terry model, averaged over the whole batch.

    $L = -\mathbb{E}[\log \sigma(r(x, y_w) - r(x, y_l))]$, eq. 1 of Ouyang et al. 2022 (arXiv:2203.02155) for pairs.

    Returns: the loss, and `accuracy` (a tie counts half), `margin`, and `{min,mean,max}_reward` over both responses.

    Examples:
        Only the difference of the two scores counts:

        >>> for shift in (0.0, 100.0):
        ...     loss, metrics = bradley_terry_loss(jnp.array([1.0]) + shift, jnp.array([0.0]) + shift, axes=())
        ...     print(f"{loss:.4f} {metrics['mean_reward'].value}")
        0.3133 0.5
        0.3133 100.5
    """
    loss = masking.mean(-jax.nn.log_sigmoid(chosen_scores - rejected_scores), axes)
    return loss, _metrics(chosen_scores, rejected_scores, axes)


def margin_loss(
    chosen_scores: Float[Array, "B"],
    rejected_scores: Float[Array, "B"],
    margins: Float[Array, "B"],
    *,
    axes: tuple[str, ...],
) -> tuple[Float[Array, ""], dict[str, Metric]]:
    r"""Bradley-Terry loss with a given margin for each pair, by which the chosen response should win.

    $L = -\mathbb{E}[\log \sigma(r(x, y_w) - r(x, y_l) - m)]$, eq. 2 of Touvron et al. 2023 (arXiv:2307.09288), and
    TRL's RewardTrainer on data with a column `margin`.

    Returns: as `bradley_terry_loss`; the metric `margin` is the difference of the scores, not the given margin.
    """
    loss = masking.mean(-jax.nn.log_sigmoid(chosen_scores - rejected_scores - margins), axes)
    return loss, _metrics(chosen_scores, rejected_scores, axes)


def smoothed_bradley_terry_loss(
    chosen_scores: Float[Array, "B"],
    rejected_scores: Float[Array, "B"],
    *,
    label_smoothing: float,
    axes: tuple[str, ...],
) -> tuple[Float[Array, ""], dict[str, Metric]]:
    r"""Bradley-Terry loss that assumes a share $\epsilon$ of the labels to be flipped.

    $L = -\mathbb{E}[(1 - \epsilon) \log \sigma(\Delta) + \epsilon \log \sigma(-\Delta)]$ with
    $\Delta = r(x, y_w) - r(x, y_l)$, as in Wang et al. 2024 (arXiv:2401.06080). Its minimum is
    at $\sigma(\Delta) = 1 - \epsilon$, so that scores stay finite.

    Returns: as `bradley_terry_loss`.
    """
    margins = chosen_scores - rejected_scores
    loss = masking.mean(_cross_entropy(margins, 1 - label_smoothing, label_smoothing), axes)
    return loss, _metrics(chosen_scores, rejected_scores, axes)


def classification_loss(
    chosen_scores: Float[Array, "B"], rejected_scores: Float[Array, "B"], *, axes: tuple[str, ...]
) -> tuple[Float[Array, ""], dict[str, Metric]]:
    r"""Cross-entropy of a verifier that classifies each response as right (chosen) or wrong (rejected).

    $L = -\tfrac{1}{2} \mathbb{E}[\log \sigma(r(x, y_w)) + \log \sigma(-r(x, y_l))]$: the score is the log-odds that a
    response is right, if as many are right as wrong. Cobbe et al. 2021 (arXiv:2110.14168) train such a verifier, on
    every token and with the squared error.

    Returns: as `bradley_terry_loss`.
    """
    each = -0.5 * (jax.nn.log_sigmoid(chosen_scores) + jax.nn.log_sigmoid(-rejected_scores))
    return masking.mean(each, axes), _metrics(chosen_scores, rejected_scores, axes)


def raters_loss(
    chosen_scores: Float[Array, "B"],
    rejected_scores: Float[Array, "B"],
    votes: Float[Array, "B 2"],
    *,
    axes: tuple[str, ...],
) -> tuple[Float[Array, ""], dict[str, Metric]]:
    r"""Negative log-likelihood of the labels of all raters, averaged over all labels of the batch.

    $L = -\sum_i [n_i^w \log \sigma(\Delta_i) + n_i^l \log \sigma(-\Delta_i)] / \sum_i (n_i^w + n_i^l)$: each label is
    one Bernoulli observation under the Bradley-Terry model. The loss equals that of a table with one row per label, but
    needs one forward pass per pair. A pair with more labels has more weight.

    Args: votes counts the raters who prefer the chosen response, and those who prefer the rejected one.
    Returns: as `bradley_terry_loss`, where `accuracy` is the share of labels that the scores agree with.
    """
    margins = chosen_scores - rejected_scores
    labels = jnp.maximum(masking.total(votes, axes), 1)
    each = _cross_entropy(margins, votes[:, 0], votes[:, 1])
    lean = jnp.sign(margins) * (votes[:, 0] - votes[:, 1])
    accuracy = Mean(0.5 * (1 + masking.total(lean, axes) / labels), labels)
    return masking.total(each, axes) / labels, _metrics(chosen_scores, rejected_scores, axes) | {"accuracy": accuracy}


def k_wise_loss(
    scores: Float[Array, "B K"], wins: Bool[Array, "B K K"], *, label_smoothing: float, axes: tuple[str, ...]
) -> tuple[Float[Array, ""], dict[str, Metric]]:
    r"""Bradley-Terry loss of all pairs among K responses, with each prompt as one element of the batch.

    $L = -\binom{K}{2}^{-1} \mathbb{E}[\log \sigma(r(x, y_w) - r(x, y_l))]$, eq. 1 of Ouyang et al. 2022
    (arXiv:2203.02155): the mean over a prompt's pairs, and then over prompts. A prompt with fewer responses, or with
    ties, contributes the mean over the pairs that remain. Labels are smoothed as in `smoothed_bradley_terry_loss`.

    Args: wins[b, i, j] is True if response i is preferred to response j; responses in no pair are ignored.
    Returns: as `bradley_terry_loss`; `accuracy` and `margin` are averaged over a prompt's pairs, then over prompts.
    """
    in_pairs = jnp.any(wins, axis=2) | jnp.any(wins, axis=1)
    scores = jnp.where(in_pairs, scores, 0)
    margins = scores[:, :, None] - scores[:, None, :]
    loss = _over_pairs(_cross_entropy(margins, 1 - label_smoothing, label_smoothing), wins, axes)
    return loss.value, {
        "accuracy": _over_pairs(0.5 * (1 + jnp.sign(margins)), wins, axes),
        "margin": _over_pairs(margins, wins, axes),
        "min_reward": metrics.smallest(jnp.where(in_pairs, scores, jnp.inf), axes),
        "mean_reward": metrics.masked_mean(scores, in_pairs, axes),
        "max_reward": metrics.largest(jnp.where(in_pairs, scores, -jnp.inf), axes),
    }


def plackett_luce_loss(
    scores: Float[Array, "B K"], mask: Bool[Array, "B K"], *, axes: tuple[str, ...]
) -> tuple[Float[Array, ""], dict[str, Metric]]:
    r"""Negative log-likelihood of whole rankings under the Plackett-Luce model, averaged over prompts.

    $L = -\mathbb{E}[\sum_{k=1}^{K} (r(x, y_k) - \log \sum_{j=k}^{K} \exp r(x, y_j))]$, the K-wise likelihood of Zhu et
    al. 2023 (arXiv:2301.11270). For K = 2 it is the Bradley-Terry loss.

    Args: scores are in the order of the ranking, best first; mask marks the responses that exist, a prefix.
    Returns: as `k_wise_loss`.
    """
    order = jnp.arange(scores.shape[1])
    wins = (order[:, None] < order[None, :])[None] & mask[:, :, None] & mask[:, None, :]
    found = k_wise_loss(jax.lax.stop_gradient(scores), wins, label_smoothing=0.0, axes=axes)[1]
    scores = jnp.where(mask, scores, 0)
    # A missing response is compared with itself alone: its term is 0, and no logsumexp is over an empty set.
    left = (order[:, None] == order[None, :])[None] | wins
    rest = jax.scipy.special.logsumexp(jnp.broadcast_to(scores[:, None, :], left.shape), axis=2, where=left)
    each = jnp.sum(rest - scores, axis=1)
    return masking.masked_mean(each, jnp.any(wins, axis=(1, 2)), axes), found


def centering(chosen_scores: Float[Array, "B"], rejected_scores: Float[Array, "B"], *, axes: tuple[str, ...]) -> Mean:
    r"""Penalty that centres scores at 0, a level that preferences do not determine: $\mathbb{E}[(r_w + r_l)^2]$.

    Eq. 2 of Eisenstein et al. 2023 (arXiv:2312.09244), as in TRL, before it is multiplied by
    `center_rewards_coefficient`.
    """
    return metrics.mean(jnp.square(chosen_scores + rejected_scores), axes)


def k_wise_centering(scores: Float[Array, "B K"], wins: Bool[Array, "B K K"], *, axes: tuple[str, ...]) -> Mean:
    """Penalty of `centering` over the pairs of `k_wise_loss`."""
    scores = jnp.where(jnp.any(wins, axis=2) | jnp.any(wins, axis=1), scores, 0)
    return _over_pairs(jnp.square(scores[:, :, None] + scores[:, None, :]), wins, axes)


def _cross_entropy(
    margins: Float[Array, "*dims"], chosen: float | Float[Array, "*dims"], rejected: float | Float[Array, "*dims"]
) -> Float[Array, "*dims"]:
    """Cross-entropy with the given weights on the chosen and the rejected response, in nats."""
    return -(chosen * jax.nn.log_sigmoid(margins) + rejected * jax.nn.log_sigmoid(-margins))


def _over_pairs(x: Float[Array, "B K K"], wins: Bool[Array, "B K K"], axes: tuple[str, ...]) -> Mean:
    """Mean over each prompt's pairs, then over the prompts that have at least one."""
    count = jnp.sum(wins, axis=(1, 2), dtype=jnp.int32)
    each = jnp.sum(jnp.where(wins, x, 0), axis=(1, 2)) / jnp.maximum(count, 1).astype(x.dtype)
    return metrics.masked_mean(each, count > 0, axes)


def _metrics(
    chosen_scores: Float[Array, "B"], rejected_scores: Float[Array, "B"], axes: tuple[str, ...]
) -> dict[str, Metric]:
    margins = chosen_scores - rejected_scores
    scores = jnp.concatenate([chosen_scores, rejected_scores])
    return {
        "accuracy": metrics.mean(0.5 * (1 + jnp.sign(margins)), axes),
        "margin": metrics.mean(margins, axes),
        "min_reward": metrics.smallest(scores, axes),
        "mean_reward": metrics.mean(scores, axes),
        "max_reward": metrics.largest(scores, axes),
    }
