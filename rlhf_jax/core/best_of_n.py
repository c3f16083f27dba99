"""Best-of-N, estimated without bias for every n from one pool of samples."""

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike


def order_statistic_weights(pool: int, n: int) -> Float[np.ndarray, "N"]:
    r"""Probability that the item of rank i (1 is the lowest proxy score) is the best of n drawn from the pool.

    $w_i = \binom{i-1}{n-1} / \binom{N}{n}$, the weights of Nakano et al. 2021 (WebGPT, arXiv:2112.09332, appendix I)
    and Gao et al. 2022 (arXiv:2210.10760). Raises ValueError unless 1 <= n <= pool.
    """
    if not 1 <= n <= pool:
        raise ValueError(f"cannot draw the best of n={n} from a pool of {pool}")
    ranks = np.arange(1, pool + 1)
    # w_N = n / N, and w_i / w_{i+1} = (i - n + 1) / i: products of ratios never overflow, binomials do.
    ratios = np.maximum(ranks[:-1] - n + 1, 0) / ranks[:-1]
    return n / pool * np.append(np.cumprod(ratios[::-1])[::-1], 1.0)


def best_of_n(proxy: ArrayLike, gold: ArrayLike, n: int) -> Float[np.ndarray, "B"]:
    """Expected gold score of the response that the proxy ranks first among n, for each prompt (row) of a pool.

    Args: proxy and gold scores, [B, N]. Ties in the proxy are broken by position, as `argsort(kind="stable")` does.
    """
    proxy, gold = np.asarray(proxy, np.float64), np.asarray(gold, np.float64)
    order = np.argsort(proxy, axis=1, kind="stable")
    return np.take_along_axis(gold, order, axis=1) @ order_statistic_weights(proxy.shape[1], n)


def best_of_n_kl(n: ArrayLike) -> Float[np.ndarray, "..."]:
    r"""$\log n - (n-1)/n$ nats: the divergence of Best-of-N from the policy that it samples.

    Stiennon et al. 2020 (arXiv:2009.01325, appendix G.3); an upper bound where responses can repeat (Beirami et al.
    2024, arXiv:2401.01879).
    """
    n = np.asarray(n, np.float64)
    return np.asarray(np.log(n) - (n - 1) / n)
