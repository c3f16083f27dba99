"""evaluate: one sample a prompt from every method, judged side by side with the reference's.

What was to be chosen (a DPO's beta) is chosen on the evaluation split; the table is made on the test split.
"""

import dataclasses
import math
import zlib
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from rlhf_jax.config import StageName
from rlhf_jax.core.best_of_n import best_of_n_kl
from rlhf_jax.core.statistics import distinct_n, standard_error, wilson_interval
from rlhf_jax.data import pipeline
from rlhf_jax.rewards.lexicon import vader
from rlhf_jax.runtime.files import read_json, write_rows
from rlhf_jax.sampling.batches import sample_all, score_all, sequence_kl
from rlhf_jax.stages.context import Context, Policy, RewardModel, load_policy
from rlhf_jax.stages.gold import load_judge
from rlhf_jax.stages.samples import sample_rows
from rlhf_jax.types import Rollout

Z_95 = 1.959964


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Which policies are compared with the reference, and with its own Best-of-N."""

    kind: Literal["evaluate"]
    reference: StageName
    policies: tuple[StageName, ...]
    best_of: tuple[int, ...]
    reward_model: StageName
    judge: StageName | None  # None: the reward model's score decides the pairs
    prompts: int  # at most, of the test split
    selection_prompts: int  # at most, of the evaluation split
    temperature: float
    batch_size: int


class Answers(NamedTuple):
    """One method's answers to the same prompts, in the same order."""

    rows: list[dict[str, Any]]  # prompt, completion, score, kl, length, gold
    kl: float
    kl_se: float

    def judged(self) -> np.ndarray:
        """What decides: the judge's score, or the reward model's where there is no judge."""
        column = "score" if self.rows[0]["gold"] is None else "gold"
        return np.array([row[column] for row in self.rows])


def run(config: EvaluateConfig, context: Context) -> dict[str, Any]:
    """Writes `results.jsonl`, `selection.jsonl` (the same columns) and every answer in `samples.jsonl`."""
    methods = _methods(config, context)
    tables: dict[str, list[dict[str, Any]]] = {}
    for split, count in (("eval", config.selection_prompts), ("test", config.prompts)):
        answers = {}
        for done, (method, seed) in enumerate(methods):
            answers[method, seed] = answer(method, seed, split, count, config, context)
            context.bar.update(done + 1 + len(methods) * (split == "test"), 2 * len(methods), {})
        reference = answers[config.reference, context.seed]
        seconds = {method: _seconds(method, context) for method, _ in methods if not method.startswith("best_of_")}
        tables[split] = [
            result(method, seed, found, reference, seconds.get(method, math.nan))
            for (method, seed), found in answers.items()
        ]
    write_rows(context.directory / "selection.jsonl", tables["eval"])
    write_rows(context.directory / "results.jsonl", tables["test"])
    write_rows(
        context.directory / "samples.jsonl",
        [
            {"step": index, "seed": seed, "method": method, **row}
            for (method, seed), found in answers.items()
            for index, row in enumerate(found.rows)
        ],
    )
    return {"selected": select(tables["eval"], context), "judge": config.judge or config.reward_model}


def answer(method: str, seed: int, split: str, count: int, config: EvaluateConfig, context: Context) -> Answers:
    """One answer of a method to each of the first `count` prompts of a split."""
    n = int(method.removeprefix("best_of_")) if method.startswith("best_of_") else None
    stage = config.reference if n else method
    policy = load_policy(context.workdir.find(stage), seed=seed, step=None)
    reference, reward_model = context.policy(config.reference), context.reward_model(config.reward_model)
    prompts = pipeline.prompts(pipeline.load_rows(context.data, split), policy.tokenizer, context.data)
    rollout = sample_all(
        policy.network,
        policy.params,
        pipeline.take(prompts, np.arange(min(count, len(prompts.tokens)))),
        jax.random.fold_in(context.key(seed - context.seed), zlib.crc32(f"{method} {split}".encode())),
        samples=n or 1,
        batch_size=config.batch_size,
        max_new_tokens=context.data.max_response_tokens,
        temperature=config.temperature,
        eos_id=policy.tokenizer.eos_id,
    )
    scores = score_all(reward_model.network, reward_model.params, rollout, config.batch_size)
    if n:
        rollout, scores = _best(rollout, scores, n)
    divergence = sequence_kl(
        policy.network,
        policy.params,
        (reference.network, reference.params),
        rollout,
        batch_size=config.batch_size,
        temperature=config.temperature,
    )
    rows = sample_rows(policy.tokenizer, rollout, scores.tolist(), [None] * len(scores) if n else divergence.tolist())
    judged = [None] * len(rows)
    if config.judge is not None:
        texts = [row["prompt"] + row["completion"] for row in rows]
        judged = load_judge(context, config.judge).score(texts).tolist()
    rows = [row | {"gold": gold} for row, gold in zip(rows, judged, strict=True)]
    if n:
        return Answers(rows, float(best_of_n_kl(n)), 0.0)
    return Answers(rows, float(divergence.mean()), standard_error(divergence))


def result(method: str, seed: int, found: Answers, reference: Answers, seconds: float) -> dict[str, Any]:
    """One row of the table: means over prompts, and pairs won against the reference's answers, ties counted half."""
    own, other = found.judged(), reference.judged()
    wins = float(np.sum(0.5 * (1 + np.sign(own - other))))
    low, high = wilson_interval(wins, len(own), z=Z_95)
    texts = [row["prompt"] + row["completion"] for row in found.rows]
    has_gold = found.rows[0]["gold"] is not None
    return {
        "method": method,
        "seed": seed,
        "n_prompts": len(own),
        "gold_score": float(own.mean()) if has_gold else None,
        "gold_se": standard_error(own) if has_gold else None,
        "gold_gain": float((own - other).mean()) if has_gold else None,
        "gold_gain_se": standard_error(own - other) if has_gold else None,
        "win_rate": wins / len(own),
        "win_low": low,
        "win_high": high,
        "reward_score": float(np.mean([row["score"] for row in found.rows])),
        "kl": found.kl,
        "kl_se": found.kl_se,
        "length": float(np.mean([row["length"] for row in found.rows])),
        "vader": float(vader(texts).mean()),
        "distinct_2": distinct_n([row["completion"].split() for row in found.rows], 2),
        "seconds": None if math.isnan(seconds) else seconds,
    }


def select(table: list[dict[str, Any]], context: Context) -> dict[str, str]:
    """The stage with the highest judged score on the evaluation split, for each kind of stage that has several."""
    by_kind: dict[str, dict[str, list[float]]] = {}
    for row in table:
        if not row["method"].startswith("best_of_"):
            column = "reward_score" if row["gold_score"] is None else "gold_score"
            kind = read_json(context.workdir.find(row["method"]) / "config.json")["section"]["kind"]
            by_kind.setdefault(kind, {}).setdefault(row["method"], []).append(row[column])
    return {kind: max(found, key=lambda name: float(np.mean(found[name]))) for kind, found in by_kind.items()}


def _methods(config: EvaluateConfig, context: Context) -> list[tuple[str, int]]:
    """Every (method, seed), the reference first. A stage that trained several seeds is one method with several."""
    methods = [(config.reference, context.seed)] + [(f"best_of_{n}", context.seed) for n in config.best_of]
    for stage in config.policies:
        first, stop = read_json(context.workdir.find(stage) / "model.json")["seeds"]
        methods += [(stage, seed) for seed in range(first, stop)]
    return methods


def _best(rollout: Rollout, scores: np.ndarray, n: int) -> tuple[Rollout, np.ndarray]:
    groups = scores.reshape(-1, n)
    best = np.arange(len(groups)) * n + groups.argmax(axis=1)
    return jax.tree.map(lambda leaf: leaf[best], rollout), scores[best]


def _seconds(stage: str, context: Context) -> float:
    return read_json(context.workdir.find(stage) / "summary.json")["time/seconds"]
