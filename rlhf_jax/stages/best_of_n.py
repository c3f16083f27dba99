"""best_of_n: sample a pool of N responses per prompt and estimate Best-of-n by the reward model for every n up to N.

Figure 2 (left) of Gao et al. 2022 (arXiv:2210.10760): proxy and gold score against the square root of the divergence.
Every number is a mean over prompts of unbiased estimates, with a standard error and a 95 % bootstrap interval over
prompts. Pools are independent, so the variation between prompts includes the randomness of the pools.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import numpy as np

from rlhf_jax.config import Count, ModelSource, Positive, check_ranges
from rlhf_jax.core.selection import (
    best_of_n,
    best_of_n_kl,
    best_of_n_kl_estimate,
    best_of_n_win_rate,
    best_of_n_win_rate_bound,
    random_groups,
    soft_best_of_n,
    soft_best_of_n_kl_bound,
)
from rlhf_jax.core.statistics import bootstrap_interval, standard_error
from rlhf_jax.data import pipeline
from rlhf_jax.loading.context import Context
from rlhf_jax.loading.data_report import report_prompts
from rlhf_jax.loading.models import Policy
from rlhf_jax.loading.samples import draw_and_sample, sample_rows
from rlhf_jax.rewards.judging import make_judge
from rlhf_jax.rewards.scorers import make_scorer
from rlhf_jax.rewards.sources import RewardSource, find_reward
from rlhf_jax.runtime.files import measured, write_rows
from rlhf_jax.sampling.batches import response_logprobs_all
from rlhf_jax.types import Rollout

ROUNDS = 1000  # of the bootstrap
SOFT_DRAWS = 16  # number of random partitions of the pool into groups of n


@dataclasses.dataclass(frozen=True)
class BestOfNConfig:
    """Policy to sample from, reward that selects, and an optional judge."""

    kind: Literal["best_of_n"]
    policy: ModelSource  # policy to sample from
    reward_model: RewardSource  # reward that selects
    judge: RewardSource | None  # gold stage, or reward, that scores the selected responses; None: no judge
    prompts: Count  # prompts of the test split
    pool: Count  # samples per prompt; N is every power of two up to this
    temperature: Positive  # temperature of the samples
    # Temperatures of soft Best-of-N, in units of the score; None: hard Best-of-N only.
    soft: tuple[Positive, ...] | None = None

    def __post_init__(self) -> None:
        check_ranges(self)


class Pool(NamedTuple):
    """Scores of every prompt's samples, [prompts, pool], and log-probabilities under the sampling distribution."""

    proxy: np.ndarray
    gold: np.ndarray | None
    logprobs: np.ndarray


def run(config: BestOfNConfig, context: Context) -> dict[str, Any]:
    """Write `curve.jsonl` (one row per n), the selected responses of a few prompts, and with `soft` also `soft.jsonl`.

    Columns of the curve: `n`; `kl`, the upper bound on the divergence, and `kl_estimate` from the probabilities of the
    selected responses; `proxy` and `gold`; `win_rate` against one sample (by the gold score if there is a judge) and
    its bound. Columns of `soft.jsonl`: `temperature, n`; `kl`, the smaller of two bounds; `proxy` and `gold`. Means
    over prompts also have columns with the suffixes `_se`, `_low` and `_high`.
    """
    policy, reward_model = context.policy(config.policy), find_reward(context, config.reward_model)
    table = pipeline.load_rows(context.data, "test")
    report_prompts(context, policy.tokenizer, {"test": table})
    drawn = draw_and_sample(
        policy,
        table,
        context,
        prompts=config.prompts,
        samples=config.pool,
        temperature=config.temperature,
    )
    rollout = drawn.rollout
    scores = make_scorer(reward_model, policy, table, context.data, context.runtime.inference_batch)(rollout)
    rows = sample_rows(policy.tokenizer, rollout, scores.tolist(), [None] * len(scores))
    shape = (config.prompts, config.pool)
    gold = None
    if config.judge is not None:
        whole = [row["prompt"] + row["completion"] for row in rows]
        gold = make_judge(config.judge, context)(policy, table)(rollout, whole).reshape(shape)
    pool = Pool(scores.reshape(shape), gold, _logprobs(policy, rollout, config, context).reshape(shape))

    sizes = [2**i for i in range(config.pool.bit_length()) if 2**i <= config.pool]
    curve = [_point(n, pool) for n in sizes]
    write_rows(context.directory / "curve.jsonl", curve)
    summary = {
        "prompts": config.prompts,
        "pool": config.pool,
        "prompt_key": drawn.key,
        "curve": curve,
    }
    if config.soft is not None:
        summary["soft"] = [
            _soft_point(n, pool, temperature, context.seed) for temperature in config.soft for n in sizes
        ]
        write_rows(context.directory / "soft.jsonl", summary["soft"])
    write_rows(context.directory / "samples.jsonl", _chosen(rows, pool.proxy, sizes, context.seed, shown=8))
    context.bar.update(1, 1, {f"proxy at n={sizes[-1]}": curve[-1]["proxy"]})
    return summary


def _logprobs(policy: Policy, rollout: Rollout[np.ndarray], config: BestOfNConfig, context: Context) -> np.ndarray:
    """Log-probabilities of responses under the sampling distribution, in nats."""
    tokens = response_logprobs_all(
        policy.network, policy.params, rollout, context.runtime.inference_batch, temperature=config.temperature
    )
    return np.where(rollout.response_mask, tokens, 0.0).sum(axis=1, dtype=np.float64)


def _point(n: int, pool: Pool) -> dict[str, Any]:
    judged = pool.proxy if pool.gold is None else pool.gold
    alone = n == pool.proxy.shape[1]  # the pool has no further sample to compare with
    point: dict[str, Any] = {"n": n, "kl": float(best_of_n_kl(n))}
    point |= _mean("kl_estimate", best_of_n(pool.proxy, best_of_n_kl_estimate(pool.logprobs, n), n))
    point |= _mean("proxy", best_of_n(pool.proxy, pool.proxy, n))
    point |= _mean("gold", None if pool.gold is None else best_of_n(pool.proxy, pool.gold, n))
    point |= _mean("win_rate", None if alone else best_of_n_win_rate(pool.proxy, judged, n))
    return point | {"win_rate_bound": float(best_of_n_win_rate_bound(n))}


def _soft_point(n: int, pool: Pool, temperature: float, seed: int) -> dict[str, Any]:
    prompts, samples = pool.proxy.shape
    groups = random_groups(np.random.default_rng((seed, n)), prompts, samples, n, SOFT_DRAWS)
    bound = soft_best_of_n_kl_bound(pool.proxy, groups, temperature=temperature)
    point: dict[str, Any] = {"temperature": temperature, "n": n}
    point["kl"] = min(float(best_of_n_kl(n)), float(bound.mean()))
    for name, scores in (("proxy", pool.proxy), ("gold", pool.gold)):
        expected = None if scores is None else soft_best_of_n(pool.proxy, scores, groups, temperature=temperature)
        point |= _mean(name, expected)
    return point


def _mean(name: str, estimates: np.ndarray | None) -> dict[str, float | None]:
    """Mean over prompts with its standard error and interval."""
    if estimates is None:
        return {name: None, f"{name}_se": None, f"{name}_low": None, f"{name}_high": None}
    low, high = bootstrap_interval(estimates, level=0.95, rounds=ROUNDS, seed=0)  # the same resamples for every n
    return {
        name: float(estimates.mean()),
        f"{name}_se": measured(standard_error(estimates)),
        f"{name}_low": measured(low),
        f"{name}_high": measured(high),
    }


def _chosen(
    rows: list[dict[str, Any]], proxy: np.ndarray, sizes: list[int], seed: int, shown: int
) -> list[dict[str, Any]]:
    """Best of the first n samples of a few prompts, for every n; the column `step` is n."""
    return [
        {"step": n, "seed": seed, **rows[prompt * proxy.shape[1] + int(np.argmax(proxy[prompt, :n]))]}
        for n in sizes
        for prompt in range(min(shown, len(proxy)))
    ]
