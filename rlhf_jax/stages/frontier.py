"""frontier: score against KL along the runs of several methods, and the methods' scores at equal KL.

The end of a run depends on its learning rate, KL coefficient and length, so methods are compared along their runs: each
checkpoint is scored, and each run is interpolated to given values of KL. The axes are those of figure 1 of Gao et al.
2022 (arXiv:2210.10760) and figure 2 of Rafailov et al. 2023 (arXiv:2305.18290).
"""

import dataclasses
from typing import Any, Literal

import numpy as np

from rlhf_jax import processes
from rlhf_jax.config import AtLeastTwo, ModelSource, NonNegative, Positive, StageName, check_ranges
from rlhf_jax.core.interpolation import score_at_kl
from rlhf_jax.core.statistics import standard_error, t_interval
from rlhf_jax.data import pipeline
from rlhf_jax.data.prompts import draw_prompts
from rlhf_jax.loading.context import Context
from rlhf_jax.loading.data_report import report_prompts
from rlhf_jax.loading.models import Policy
from rlhf_jax.loading.samples import texts
from rlhf_jax.loading.stage_models import load_stage_policy
from rlhf_jax.rewards.http_judge import HTTPJudgeConfig
from rlhf_jax.rewards.judging import TextScorer, make_judge
from rlhf_jax.rewards.sources import RewardSource, name_of
from rlhf_jax.runtime.checkpoints import steps_of
from rlhf_jax.runtime.files import read_json, read_rows, write_rows
from rlhf_jax.sampling.batches import sample_all, sequence_kl

POINTS, AT_KL, MATCHED = "points.jsonl", "at_kl.jsonl", "matched.jsonl"


@dataclasses.dataclass(frozen=True)
class FrontierConfig:
    """Stages whose checkpoints are scored, the policy that KL is measured from, and the judge."""

    kind: Literal["frontier"]
    reference: ModelSource  # policy that KL is measured from
    policies: tuple[StageName, ...]  # stages whose checkpoints are scored
    judge: RewardSource | HTTPJudgeConfig  # gold stage or reward that gives scores; a judge over HTTP gives none
    prompts: AtLeastTwo  # prompts of the test split, drawn by the seed, the same for every policy
    # Temperature of the responses; 0 is greedy, and then KL is the mean log-ratio at temperature 1.
    temperature: NonNegative
    kl_targets: tuple[Positive, ...]  # values of KL, in nats, at which methods are compared

    def __post_init__(self) -> None:
        if isinstance(self.judge, HTTPJudgeConfig):
            raise ValueError(
                f"judge = {self.judge.model!r} over HTTP compares two answers, and gives no score to compare at equal "
                "KL: name a gold stage, a reward model, or a section with functions; a stage of kind evaluate gives "
                "win rates"
            )
        check_ranges(self)
        if not self.kl_targets:
            raise ValueError("kl_targets is empty: give at least one value of KL")


def run(config: FrontierConfig, context: Context) -> dict[str, Any]:
    """Write `points.jsonl`, `at_kl.jsonl` and `matched.jsonl`.

    Their rows are, in this order: checkpoints of each seed, seeds at each target KL, and methods at each target KL. The
    score is in the column `gold`, whichever judge gave it; the summary names the judge. Each point is written as soon
    as it is measured, so that an interrupted run keeps its points.
    """
    assert not isinstance(config.judge, HTTPJudgeConfig)
    reference = context.policy(config.reference)
    rows = pipeline.load_rows(context.data, "test")
    prompts = pipeline.prompts(rows, reference.tokenizer, context.data)
    report_prompts(context, reference.tokenizer, {"test": rows})
    drawn = draw_prompts(prompts, config.prompts, context.key("prompts"), f"config.{context.name}.prompts")
    prompts = pipeline.take(prompts, np.sort(drawn))
    judge = make_judge(config.judge, context)(reference, rows)

    path = context.directory / POINTS
    points = read_rows(path)
    processes.wait()  # until all have read what the first one is about to add to
    known = {(point["method"], point["seed"], point["step"]) for point in points}
    start = config.reference if config.reference in context.stages else "reference"
    places = [(start, context.seed, 0), *_checkpoints(config.policies, context)]
    for done, place in enumerate(places):
        if place not in known:
            policy = reference
            if place != places[0]:
                find = context.workdir.find
                policy = load_stage_policy(find(place[0]), seed=place[1], step=place[2], find=find, where=context.where)
            points.append(measure(place, policy, reference, judge, prompts, config, context))
            write_rows(path, points)
        context.bar.update(done + 1, len(places), {})
    write_rows(context.directory / AT_KL, at_kl(points, config.policies, config.kl_targets))
    matched = match(points, config.policies, config.kl_targets)
    write_rows(context.directory / MATCHED, matched)
    return {"points": len(points), "prompts": config.prompts, "judge": name_of(config.judge)}


def _checkpoints(policies: tuple[StageName, ...], context: Context) -> list[tuple[str, int, int]]:
    """Return stage, seed and step of every checkpoint, in the order of training."""
    found = []
    for stage in policies:
        directory = context.workdir.find(stage)
        first, stop = read_json(directory / "model.json")["seeds"]
        steps = steps_of(directory / "checkpoints")
        found += [(stage, seed, step) for seed in range(first, stop) for step in steps]
    return found


def measure(
    place: tuple[str, int, int],
    policy: Policy,
    reference: Policy,
    judge: TextScorer,
    prompts: pipeline.Prompts,
    config: FrontierConfig,
    context: Context,
) -> dict[str, Any]:
    """Sample one response to each prompt; return its mean score and KL from the reference (k1, in nats)."""
    method, seed, step = place
    rollout = sample_all(
        policy.network,
        policy.params,
        prompts,
        context.key(f"samples: {method} {step}", seed - context.seed),
        context.sampling(policy.tokenizer, config.temperature),
        samples=1,
        batch_size=context.runtime.inference_batch,
    )
    written = [prompt + answer for prompt, answer in zip(*texts(policy.tokenizer, rollout), strict=True)]
    gold = judge(rollout, written)
    divergence = sequence_kl(
        policy.network,
        policy.params,
        (reference.network, reference.params),
        rollout,
        batch_size=context.runtime.inference_batch,
        temperature=config.temperature,
    )
    return {
        "method": method,
        "seed": seed,
        "step": step,
        "kl": float(divergence.mean()),
        "kl_se": standard_error(divergence),
        "gold": float(gold.mean()),
        "gold_se": standard_error(gold),
        "length": float(rollout.response_mask.sum(axis=1).mean()),
    }


def at_kl(points: list[dict[str, Any]], methods: tuple[str, ...], targets: tuple[float, ...]) -> list[dict[str, Any]]:
    """Interpolate each run's score at each KL: rows of `method, seed, kl, gold`, with None if the run did not reach it.

    Args: points are the rows of `points.jsonl`, the reference's first; targets are in nats.
    """
    start, rows = points[0]["gold"], []
    for method in methods:
        runs: dict[int, list[dict[str, Any]]] = {}
        for point in points:
            if point["method"] == method:
                runs.setdefault(point["seed"], []).append(point)
        for seed, run in runs.items():
            found = score_at_kl([0, *(p["kl"] for p in run)], [start, *(p["gold"] for p in run)], targets)
            rows += [
                {"method": method, "seed": seed, "kl": target, "gold": score}
                for target, score in zip(targets, found, strict=True)
            ]
    return rows


def match(points: list[dict[str, Any]], methods: tuple[str, ...], targets: tuple[float, ...]) -> list[dict[str, Any]]:
    """Average each method's score at each KL over the seeds that reached it.

    The standard error and the 95 % Student's t interval are over seeds, and None for fewer than two. Args: as of
    `at_kl`.
    """
    rows, scores = [], at_kl(points, methods, targets)
    for method in methods:
        for target in targets:
            found = [row["gold"] for row in scores if (row["method"], row["kl"]) == (method, target)]
            reached = np.array([score for score in found if score is not None])
            several = len(reached) > 1
            low, high = t_interval(reached, level=0.95) if several else (None, None)
            rows.append(
                {
                    "method": method,
                    "kl": target,
                    "seeds": len(found),
                    "reached": len(reached),
                    "gold": float(reached.mean()) if len(reached) else None,
                    "gold_se": standard_error(reached) if several else None,
                    "gold_low": low,
                    "gold_high": high,
                }
            )
    return rows
