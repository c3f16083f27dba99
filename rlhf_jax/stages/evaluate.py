"""evaluate: one sample a prompt from every method, judged side by side with the reference's.

What was to be chosen (a DPO's beta) is chosen on the evaluation split; the table is made on the test split.
"""

import dataclasses
import zlib
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from rlhf_jax.config import ModelSource, StageName
from rlhf_jax.core.best_of_n import best_of_n_kl
from rlhf_jax.core.statistics import distinct_n, standard_error, wilson_interval
from rlhf_jax.data import pipeline
from rlhf_jax.rewards.lexicon import vader
from rlhf_jax.rewards.tfidf import TfidfJudge
from rlhf_jax.runtime.files import read_json, write_rows
from rlhf_jax.sampling.batches import sample_all, sequence_kl
from rlhf_jax.stages.context import Context
from rlhf_jax.stages.gold import load_judge
from rlhf_jax.stages.models import Policy, load_policy
from rlhf_jax.stages.samples import sample_rows
from rlhf_jax.stages.scoring import Scorer, make_scorer
from rlhf_jax.types import Rollout

Z_95 = 1.959964


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Which policies are compared with the reference, and with its own Best-of-N."""

    kind: Literal["evaluate"]
    reference: ModelSource
    policies: tuple[StageName, ...]
    best_of: tuple[int, ...]  # each above 1
    reward_model: ModelSource
    judge: StageName | None  # None: the reward model's score decides the pairs
    prompts: int  # at most, of the test split
    selection_prompts: int  # at most, of the evaluation split
    temperature: float

    def __post_init__(self) -> None:
        if any(n < 2 for n in self.best_of):
            raise ValueError(f"best_of = {self.best_of} must be above 1: one sample is the reference itself")


class Method(NamedTuple):
    """A row of the table: one answer of a stage's policy, or the best of several by the reward model."""

    name: str
    stage: str
    seed: int
    best_of: int


class Judges(NamedTuple):
    """What every answer is measured by."""

    reference: Policy
    score: Scorer  # by the reward model
    judge: TfidfJudge | None


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
    reference, reward_model = context.policy(config.reference), context.reward_model(config.reward_model)
    judge = None if config.judge is None else load_judge(context, config.judge)
    methods = _methods(config, context)
    seconds = {method.name: _seconds(method.name, context) for method in methods if method.best_of == 1}
    tables: dict[str, list[dict[str, Any]]] = {}
    for split, count in (("eval", config.selection_prompts), ("test", config.prompts)):
        rows = pipeline.load_rows(context.data, split)
        prompts = pipeline.prompts(rows, reference.tokenizer, context.data)
        prompts = pipeline.take(prompts, np.arange(min(count, len(prompts.tokens))))
        scorer = make_scorer(reward_model, reference, rows, context.data, context.runtime.inference_batch)
        judges = Judges(reference, scorer, judge)
        answers = []
        for done, method in enumerate(methods):
            answers.append(answer(method, split, prompts, judges, config, context))
            context.bar.update(done + 1 + len(methods) * (split == "test"), 2 * len(methods), {})
        tables[split] = [
            result(method, found, answers[0], seconds.get(method.name))
            for method, found in zip(methods, answers, strict=True)
        ]
    write_rows(context.directory / "selection.jsonl", tables["eval"])
    write_rows(context.directory / "results.jsonl", tables["test"])
    write_rows(
        context.directory / "samples.jsonl",
        [
            {"step": index, "seed": method.seed, "method": method.name, **row}
            for method, found in zip(methods, answers, strict=True)
            for index, row in enumerate(found.rows)
        ],
    )
    return {"selected": select(tables["eval"], context), "judge": config.judge or config.reward_model}


def answer(
    method: Method,
    split: str,
    prompts: pipeline.Prompts,
    judges: Judges,
    config: EvaluateConfig,
    context: Context,
) -> Answers:
    """One answer of a method to each prompt; a method has its own random numbers on each split."""
    policy = judges.reference
    if method.stage != config.reference:
        policy = load_policy(context.workdir.find(method.stage), seed=method.seed, step=None, find=context.workdir.find)
    rollout = sample_all(
        policy.network,
        policy.params,
        prompts,
        jax.random.fold_in(context.key(method.seed - context.seed), zlib.crc32(f"{method.name} {split}".encode())),
        context.sampling(policy.tokenizer, config.temperature),
        samples=method.best_of,
        batch_size=context.runtime.inference_batch,
    )
    scores = judges.score(rollout)
    best = np.arange(0, len(scores), method.best_of) + scores.reshape(-1, method.best_of).argmax(axis=1)
    rollout, scores = jax.tree.map(lambda leaf: leaf[best], rollout), scores[best]
    divergence = _divergence(method, policy, rollout, judges, config.temperature, context)
    rows = sample_rows(
        policy.tokenizer, rollout, scores.tolist(), [None] * len(scores) if divergence is None else divergence
    )
    judged = [None] * len(rows)
    if judges.judge is not None:
        judged = judges.judge.score([row["prompt"] + row["completion"] for row in rows]).tolist()
    rows = [row | {"gold": gold} for row, gold in zip(rows, judged, strict=True)]
    if divergence is None:
        return Answers(rows, float(best_of_n_kl(method.best_of)), 0.0)
    return Answers(rows, float(np.mean(divergence)), standard_error(divergence))


def _divergence(
    method: Method, policy: Policy, rollout: Rollout, judges: Judges, temperature: float, context: Context
) -> list[float] | None:
    """Log pi/pi_ref of every answer; None for Best-of-N, which has no density but a known divergence."""
    if method.best_of > 1:
        return None
    return sequence_kl(
        policy.network,
        policy.params,
        (judges.reference.network, judges.reference.params),
        rollout,
        batch_size=context.runtime.inference_batch,
        temperature=temperature,
    ).tolist()


def result(method: Method, found: Answers, reference: Answers, seconds: float | None) -> dict[str, Any]:
    """One row of the table: means over prompts, and pairs won against the reference's answers, ties counted half."""
    own, other = found.judged(), reference.judged()
    wins = float(np.sum(0.5 * (1 + np.sign(own - other))))
    low, high = wilson_interval(wins, len(own), z=Z_95)
    texts = [row["prompt"] + row["completion"] for row in found.rows]
    has_gold = found.rows[0]["gold"] is not None
    return {
        "method": method.name,
        "seed": method.seed,
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
        "seconds": seconds,
    }


def select(table: list[dict[str, Any]], context: Context) -> dict[str, str]:
    """The stage with the highest judged score on the evaluation split, for each kind of stage that has several."""
    by_kind: dict[str, dict[str, list[float]]] = {}
    for row in table:
        if row["method"] in context.stages:
            column = "reward_score" if row["gold_score"] is None else "gold_score"
            kind = read_json(context.workdir.find(row["method"]) / "config.json")["section"]["kind"]
            by_kind.setdefault(kind, {}).setdefault(row["method"], []).append(row[column])
    return {kind: max(found, key=lambda name: float(np.mean(found[name]))) for kind, found in by_kind.items()}


def _methods(config: EvaluateConfig, context: Context) -> list[Method]:
    """The reference first. A stage that trained several seeds is one method with several."""
    name = config.reference if config.reference in context.stages else "reference"
    methods = [Method(name, config.reference, context.seed, 1)]
    methods += [Method(f"best_of_{n}", config.reference, context.seed, n) for n in config.best_of]
    for stage in config.policies:
        first, stop = read_json(context.workdir.find(stage) / "model.json")["seeds"]
        methods += [Method(stage, stage, seed, 1) for seed in range(first, stop)]
    return methods


def _seconds(stage: str, context: Context) -> float | None:
    """Wall time of a method's stage; a checkpoint's is not known."""
    if stage not in context.stages:
        return None
    return read_json(context.workdir.find(stage) / "summary.json")["time/seconds"]
