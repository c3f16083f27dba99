"""Unbiased estimates of Best-of-N for every n from one pool of samples, and its KL divergence."""

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike


def order_statistic_weights(pool: int, n: int) -> Float[np.ndarray, "N"]:
    r"""Probability that the item of rank i (rank 1 has the lowest proxy score) is the best of n drawn from the pool.

    $w_i = \binom{i-1}{n-1} / \binom{N}{n}$, the weights of Nakano et al. 2021 (WebGPT, arXiv:2112.09332, appendix I)
    and Gao et al. 2022 (arXiv:2210.10760). Raises ValueError unless 1 <= n <= pool.
    """
    if not 1 <= n <= pool:
        raise ValueError(f"cannot draw the best of n={n} from a pool of {pool}")
    ranks = np.arange(1, pool + 1)
    # w_N = n / N and w_i / w_{i+1} = (i - n + 1) / i: products of ratios do not overflow as binomials do.
    ratios = np.maximum(ranks[:-1] - n + 1, 0) / ranks[:-1]
    return n / pool * np.append(np.cumprod(ratios[::-1])[::-1], 1.0)


def best_of_n(proxy: ArrayLike, gold: ArrayLike, n: int) -> Float[np.ndarray, "B"]:
    """Expected gold score, for each prompt, of the response with the highest proxy score among n of the pool.

    Args: proxy and gold scores, [B, N]. Ties in the proxy are broken by position, as `argsort(kind="stable")` does.

    Examples:
        One prompt and a pool of three. The best of two is the third sample in two of three draws, and else the second:

        >>> [round(float(best_of_n([[1, 2, 3]], [[10, 20, 60]], n)[0]), 2) for n in (1, 2, 3)]
        [30.0, 46.67, 60.0]
    """
    proxy, gold = np.asarray(proxy, np.float64), np.asarray(gold, np.float64)
    order = np.argsort(proxy, axis=1, kind="stable")
    return np.take_along_axis(gold, order, axis=1) @ order_statistic_weights(proxy.shape[1], n)


def best_of_n_distribution(chances: ArrayLike, proxy: ArrayLike, n: int) -> Float[np.ndarray, "N"]:
    r"""Distribution of the best of n samples by proxy score, for a policy with finitely many responses.

    $P(S \le s)^n - P(S < s)^n$ for each score s, shared among responses of equal score in proportion to their chances:
    the first of equally good samples is selected. Lemma 1 of Beirami et al. 2024 (arXiv:2401.01879).

    Args: the policy's chances and the scores of all responses, [N].
    """
    chances, proxy = np.asarray(chances, np.float64), np.asarray(proxy, np.float64)
    values, where = np.unique(proxy, return_inverse=True)
    equal = np.bincount(where, weights=chances, minlength=len(values))
    up_to = np.minimum(np.cumsum(equal), 1.0)
    below = np.append(0.0, up_to[:-1])
    share = np.divide(chances, equal[where], out=np.zeros_like(chances), where=equal[where] > 0)
    return (up_to**n - below**n)[where] * share


def best_of_n_kl(n: ArrayLike) -> Float[np.ndarray, "..."]:
    r"""KL divergence of Best-of-N from the policy that it samples from: $\log n - (n-1)/n$ nats.

    Stiennon et al. 2020 (arXiv:2009.01325, appendix G.3); an upper bound if responses can repeat (Beirami et al. 2024,
    arXiv:2401.01879).

    Examples:
        >>> print(best_of_n_kl([1, 4, 16, 256]).round(2))
        [0.   0.64 1.84 4.55]
    """
    n = np.asarray(n, np.float64)
    return np.asarray(np.log(n) - (n - 1) / n)


def best_of_n_kl_estimate(logprobs: ArrayLike, n: int) -> Float[np.ndarray, "..."]:
    r"""Estimate, in nats, of the divergence of Best-of-N if responses can repeat; at most `best_of_n_kl`.

    $(1-\epsilon)^n (\log n + (n-1) \log(1-\epsilon) - \frac{n-1}{n})
    + (1 - (1-\epsilon)^n) \log \frac{1 - (1-\epsilon)^n}{\epsilon}$, the estimator of Beirami et al. 2024
    (arXiv:2401.01879), with $\epsilon$ the policy's probability of the chosen response. It is exact if the chosen
    response is the best possible and no other response repeats. They conjecture that its mean over chosen responses,
    which `best_of_n` of a pool estimates, is at least the divergence; this held for every distribution we enumerated.

    Args: logprobs are log-probabilities of chosen responses under the sampling distribution, in nats.
    """
    logprobs = np.minimum(np.asarray(logprobs, np.float64), 0.0)
    epsilon = np.exp(logprobs)
    certain, rare = epsilon == 1, epsilon < 1e-12
    rest = np.log1p(-np.where(certain, 0.0, epsilon))  # log(1 - epsilon)
    among_rest = np.where(certain, 0.0, np.exp(n * rest))
    chosen = np.where(certain, 1.0, -np.expm1(n * rest))
    ratio = np.where(rare, np.log(n), np.log(np.where(rare, 1.0, chosen)) - logprobs)
    return np.asarray(among_rest * (best_of_n_kl(n) + (n - 1) * rest) + chosen * ratio)


def fit_over_optimisation(kl: Float[np.ndarray, "N"], gains: Float[np.ndarray, "N"]) -> tuple[float, float]:
    r"""Fit $R(d) = d (\alpha - \beta d)$ with $d = \sqrt{KL}$ to the gold gains of Best-of-N, by least squares.

    The law of Gao et al. 2022 (arXiv:2210.10760) for Best-of-N; its maximum is at $d = \alpha / 2 \beta$.

    Args: kl in nats and gains over a single sample, for several n.
    Returns: alpha, in units of the gain per root of a nat, and beta, per nat.
    """
    root = np.sqrt(kl)
    alpha, beta = np.linalg.lstsq(np.stack([root, -kl], axis=1), gains, rcond=None)[0]
    return float(alpha), float(beta)


def best_of_n_win_rate(proxy: ArrayLike, gold: ArrayLike, n: int) -> Float[np.ndarray, "B"]:
    r"""Probability, for each prompt, that the best of n by proxy score beats another sample by gold score.

    Ties count half. It is the mean over all choices of n responses of the pool and one of the remaining. If the best of
    n has rank i, $n-1$ of the $i-1$ responses below it were also drawn: the other sample is a given one of those below
    with probability $\frac{i-n}{(i-1)(N-n)}$, and a given one above with probability $\frac{1}{N-n}$. If gold and proxy
    scores are equal and have no ties, the result is $n/(n+1)$.

    Args: proxy and gold scores, [B, N]. Raises ValueError unless n < N.
    """
    proxy, gold = np.asarray(proxy, np.float64), np.asarray(gold, np.float64)
    pool = proxy.shape[1]
    if n >= pool:
        raise ValueError(f"a pool of {pool} has no further response to compare the best of n={n} with")
    order = np.argsort(proxy, axis=1, kind="stable")
    ranks = np.arange(1, pool + 1)
    below = np.maximum(ranks - n, 0) / np.maximum(ranks - 1, 1)
    other = (np.tril(np.ones((pool, pool)), -1) * below[:, None] + np.triu(np.ones((pool, pool)), 1)) / (pool - n)
    weights = order_statistic_weights(pool, n)
    rates = []
    for ranked in np.take_along_axis(gold, order, axis=1):  # one prompt at a time, to save memory
        wins = 0.5 * (1 + np.sign(ranked[:, None] - ranked[None, :]))
        rates.append(weights @ np.sum(wins * other, axis=1))
    return np.asarray(rates)


def best_of_n_win_rate_bound(n: ArrayLike) -> Float[np.ndarray, "..."]:
    """Upper bound on the win rate of Best-of-N against its policy in the proxy score, ties counting half: n / (n + 1).

    Beirami et al. 2024 (arXiv:2401.01879); attained if responses never repeat.
    """
    n = np.asarray(n, np.float64)
    return np.asarray(n / (n + 1))


def random_groups(rng: np.random.Generator, prompts: int, pool: int, n: int, draws: int) -> Int[np.ndarray, "R B G n"]:
    """Indices of random disjoint groups of n responses, as many as fit into each prompt's pool, drawn `draws` times.

    All subsets of size n are equally likely, so that a mean over groups is an unbiased estimate of the mean over all
    subsets; for n = pool it is exact. Raises ValueError unless 1 <= n <= pool.
    """
    if not 1 <= n <= pool:
        raise ValueError(f"cannot draw groups of n={n} from a pool of {pool}")
    order = rng.permuted(np.broadcast_to(np.arange(pool), (draws, prompts, pool)), axis=2)
    groups = pool // n
    return order[:, :, : groups * n].reshape(draws, prompts, groups, n)


def soft_best_of_n(
    proxy: ArrayLike, gold: ArrayLike, groups: Int[np.ndarray, "R B G n"], *, temperature: float
) -> Float[np.ndarray, "B"]:
    r"""Expected gold score, for each prompt, of one of n chosen with probability proportional to $\exp(r / \lambda)$.

    Soft Best-of-N, Verdun et al. 2025 (arXiv:2505.03156), averaged over groups of a pool. It approaches Best-of-N as
    the temperature $\lambda$ goes to 0, and a single sample as $\lambda$ grows.

    Args: proxy scores r and gold scores, [B, N]; groups from `random_groups`; the temperature in units of the score.
    """
    chances = _soft_chances(proxy, groups, temperature)
    return np.mean(np.sum(chances * _in_groups(gold, groups), axis=3), axis=(0, 2))


def soft_best_of_n_kl_bound(
    proxy: ArrayLike, groups: Int[np.ndarray, "R B G n"], *, temperature: float
) -> Float[np.ndarray, "B"]:
    r"""Upper bound on the divergence of Soft Best-of-N per prompt: $\log n - \mathbb{E}[H]$ nats, H the choice entropy.

    It is the divergence of (n samples, soft choice) from (n samples, uniform choice), which bounds that of the chosen
    response by the data-processing inequality. It is at most `best_of_n_kl`, because with Gumbel noise added to
    $r / \lambda$ the soft choice is Best-of-N of a score without ties.
    """
    chances = _soft_chances(proxy, groups, temperature)
    entropy = -np.sum(chances * np.log(np.where(chances > 0, chances, 1.0)), axis=3)
    return np.log(groups.shape[3]) - np.mean(entropy, axis=(0, 2))


def soft_choice(scores: ArrayLike, uniforms: ArrayLike, *, temperature: float) -> Int[np.ndarray, "B"]:
    r"""Choose one response per prompt with probability proportional to $\exp(r / \lambda)$, by inverting the CDF.

    Args: scores r, [B, N]; one uniform number in [0, 1) per prompt.
    """
    scores, uniforms = np.asarray(scores, np.float64), np.asarray(uniforms, np.float64)
    cumulative = np.cumsum(np.exp((scores - scores.max(axis=1, keepdims=True)) / temperature), axis=1)
    total = cumulative[:, -1:]
    return np.sum(cumulative <= np.minimum(uniforms[:, None] * total, np.nextafter(total, 0)), axis=1)


def _soft_chances(proxy: ArrayLike, groups: np.ndarray, temperature: float) -> np.ndarray:
    scores = _in_groups(proxy, groups)
    weights = np.exp((scores - scores.max(axis=3, keepdims=True)) / temperature)
    return weights / weights.sum(axis=3, keepdims=True)


def _in_groups(values: ArrayLike, groups: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float64)
    return values[np.arange(len(values))[None, :, None, None], groups]
