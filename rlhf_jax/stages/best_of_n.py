"""best_of_n: draws N answers and lets the reward model choose; every n up to N from one pool, without bias.

Figure 2 (left) of Gao et al. 2022 (arXiv:2210.10760): proxy and gold score against the root of the divergence.
"""

import dataclasses
from typing import Any, Literal

import jax
import numpy as np

from rlhf_jax.config import ModelSource, StageName
from rlhf_jax.core.best_of_n import best_of_n, best_of_n_kl
from rlhf_jax.core.statistics import standard_error
from rlhf_jax.data import pipeline
from rlhf_jax.runtime.files import write_rows
from rlhf_jax.sampling.batches import sample_all
from rlhf_jax.stages.context import Context
from rlhf_jax.stages.gold import load_judge
from rlhf_jax.stages.samples import sample_rows
from rlhf_jax.stages.scoring import make_scorer
from rlhf_jax.types import RlhfError


@dataclasses.dataclass(frozen=True)
class BestOfNConfig:
    """The policy that is sampled, the reward model that chooses, and the judge that is asked afterwards, if any."""

    kind: Literal["best_of_n"]
    policy: ModelSource
    reward_model: ModelSource
    judge: StageName | None
    prompts: int
    pool: int  # samples a prompt; every power of two up to it is reported
    temperature: float

    def __post_init__(self) -> None:
        if self.pool < 1 or self.prompts < 1:
            raise ValueError(f"prompts = {self.prompts} and pool = {self.pool} must be at least 1")


def run(config: BestOfNConfig, context: Context) -> dict[str, Any]:
    """Writes `curve.jsonl` (n, kl, proxy, proxy_se, gold, gold_se) and the chosen responses of a few prompts."""
    policy, reward_model = context.policy(config.policy), context.reward_model(config.reward_model)
    table = pipeline.load_rows(context.data, "test")
    prompts = pipeline.prompts(table, policy.tokenizer, context.data)
    prompt_key, sample_key = jax.random.split(context.key())
    if config.prompts > len(prompts.tokens):
        raise RlhfError(f"config.{context.name}.prompts = {config.prompts}: the data has only {len(prompts.tokens)}")
    drawn = np.asarray(jax.random.choice(prompt_key, len(prompts.tokens), (config.prompts,), replace=False))
    rollout = sample_all(
        policy.network,
        policy.params,
        pipeline.take(prompts, drawn),
        sample_key,
        context.sampling(policy.tokenizer, config.temperature),
        samples=config.pool,
        batch_size=context.runtime.inference_batch,
    )
    scores = make_scorer(reward_model, policy, table, context.data, context.runtime.inference_batch)(rollout)
    rows = sample_rows(policy.tokenizer, rollout, scores.tolist(), [None] * len(scores))
    proxy = scores.reshape(config.prompts, config.pool)
    gold = None
    if config.judge is not None:
        judged = load_judge(context, config.judge).score([row["prompt"] + row["completion"] for row in rows])
        gold = judged.reshape(proxy.shape)

    sizes = [2**i for i in range(config.pool.bit_length()) if 2**i <= config.pool]
    curve = [_point(n, proxy, gold) for n in sizes]
    write_rows(context.directory / "curve.jsonl", curve)
    write_rows(context.directory / "samples.jsonl", _chosen(rows, proxy, sizes, context.seed, shown=8))
    context.bar.update(1, 1, {f"proxy at n={sizes[-1]}": curve[-1]["proxy"]})
    return {
        "prompts": config.prompts,
        "pool": config.pool,
        "prompt_key": np.asarray(jax.random.key_data(prompt_key)).tolist(),
        "curve": curve,
    }


def _point(n: int, proxy: np.ndarray, gold: np.ndarray | None) -> dict[str, Any]:
    point: dict[str, Any] = {"n": n, "kl": float(best_of_n_kl(n))}
    for name, scores in (("proxy", proxy), ("gold", gold)):
        expected = None if scores is None else best_of_n(proxy, scores, n)
        point[name] = None if expected is None else float(expected.mean())
        point[f"{name}_se"] = None if expected is None else standard_error(expected)
    return point


def _chosen(
    rows: list[dict[str, Any]], proxy: np.ndarray, sizes: list[int], seed: int, shown: int
) -> list[dict[str, Any]]:
    """The best of the first n samples of a few prompts, for every n, with n in the place of the step."""
    return [
        {"step": n, "seed": seed, **rows[prompt * proxy.shape[1] + int(np.argmax(proxy[prompt, :n]))]}
        for n in sizes
        for prompt in range(min(shown, len(proxy)))
    ]
