"""DataFrames for the tables and figures of a run: compared methods, points of the frontier, answers side by side."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from rlhf_jax.core.statistics import standard_error
from rlhf_jax.reports.run import Run
from rlhf_jax.runtime.files import read_json
from rlhf_jax.stages.kinds import KINDS, Colour, Kind, shown_kind
from rlhf_jax.types import Row

GOLD = "gold judge"


class Training(NamedTuple):
    """A stage's metrics during training, and its section of the config."""

    metrics: pd.DataFrame
    section: Row


def comparison(run: Run) -> pd.DataFrame:
    """Results with each method's `kind` and `label`, in the order of the figures, the `reference` first.

    `score` and `score_se` are the gold judge's, or the reward model's if there is no gold judge.
    """
    table = run.results()
    names = list(table["method"].unique())
    kinds = {name: _kind(run, name) for name in names}
    strengths = {name: _strength(run, name) for name in names}
    labels = stage_labels(run, names)
    table = table.assign(
        kind=table["method"].map(kinds), label=table["method"].map(labels), reference=table["method"] == reference(run)
    )
    if judged_by_gold(table):
        table = table.assign(score=table["gold_score"], score_se=table["gold_se"])
    else:
        table = table.assign(score=table["reward_score"], score_se=_reward_errors(run, table))
    ranks = {name: (name != reference(run), _rank(kinds[name]), strengths[name], i) for i, name in enumerate(names)}
    order = table["method"].map({name: rank for rank, name in enumerate(sorted(names, key=ranks.__getitem__))})
    return table.iloc[order.argsort(kind="stable")].reset_index(drop=True)


def reference(run: Run) -> str:
    """Name of the evaluation's reference: its stage, or "reference" if it is a checkpoint."""
    source = run.config(run.evaluation())["section"]["reference"]
    return source if source in run.stages else "reference"


def judged_by_gold(results: pd.DataFrame) -> bool:
    """Return whether the results have scores of a gold judge."""
    return bool(results["gold_score"].notna().any())


def judge_of(run: Run) -> str:
    """Name of the judge of the pairs, for use in a sentence."""
    judge = run.config(run.evaluation())["section"].get("judge")
    return "reward model" if judge is None else judge_name(run, judge)


def compared_score(run: Run) -> str:
    """Axis label for the score of the evaluation's judge."""
    judge = judge_of(run)
    return "gold score (judge's rating)" if judge == GOLD else f"score by {judge}"


def reward_of(run: Run) -> str:
    """Name of the evaluation's reward, which also selects Best-of-N answers, for use in a sentence."""
    reward = run.config(run.evaluation())["section"].get("reward_model")
    return judge_name(run, reward) if isinstance(reward, dict) else "the reward model"


def judged_in_both_orders(run: Run) -> bool:
    """Return whether an HTTP judge, which compares each pair in both orders, judged the evaluation."""
    judge = run.config(run.evaluation())["section"].get("judge")
    return isinstance(judge, dict) and "url" in judge


def frontier_score(run: Run, stage: str) -> str:
    """Axis label for the score of a frontier stage: gold score, or the score of another judge."""
    judge = judge_name(run, run.config(stage)["section"]["judge"])
    return "gold score" if judge == GOLD else f"score by {judge}"


def stage_labels(run: Run, names: list[str]) -> dict[str, str]:
    """Labels such as `DPO β = 0.1`; if two stages share a label, the stage's name is appended in brackets."""
    plain = {name: _label(run, name) for name in names}
    counts = pd.Series(plain).value_counts()
    return {name: label if counts[label] == 1 else f"{label} ({name})" for name, label in plain.items()}


def learning_kinds(run: Run) -> dict[str, Kind]:
    """Kinds of the run's stages that have learning curves, in the order of the table, a user's own last."""
    names = {name: shown_kind(name) for name in sorted(set(map(run.kind, run.stages)), key=lambda x: (_rank(x), x))}
    return {name: kind for name, kind in names.items() if kind is not None and kind.curves}


def learning_figure(kind: str) -> str:
    """Name of the figure with the learning curves of a kind."""
    return "learning_" + re.sub(r"\W+", "_", kind)


def curves(run: Run, kind: str) -> dict[str, Training]:
    """All stages of a kind that have started training, by label; DPO stages by ascending beta."""
    names = by_strength(run, run.of_kind(kind))
    labels = stage_labels(run, names)
    started = [name for name in names if (run.directory(name) / "metrics.jsonl").exists()]
    found = {
        labels[name].removeprefix("DPO "): Training(run.metrics(name), run.config(name)["section"]) for name in started
    }
    return {label: training for label, training in found.items() if len(training.metrics)}


def best_of_n_points(run: Run, *, gold: bool) -> pd.DataFrame | None:
    """`n, kl, score, score_se` of the last complete Best-of-N stage, in gold or proxy score.

    The stage has prompts of its own. Its scores are shifted so that n = 1, a sample of the reference, has the
    reference's score on the evaluation's prompts.
    """
    stages = run.of_kind("best_of_n", complete=True)
    curve = run.best_of_n_curve(stages[-1]) if stages else None
    column = "gold" if gold else "proxy"
    if curve is None or curve[column].isna().all():
        return None
    results = comparison(run)
    level = results.loc[results["reference"], "score"].iloc[0]
    return curve.assign(score=curve[column] - curve[column].iloc[0] + level, score_se=curve[f"{column}_se"])


def sft_deviations(run: Run) -> tuple[float, float] | None:
    """Standard deviations of proxy and gold score over the reference's test answers; None without a gold judge."""
    stages = run.of_kind("evaluate", complete=True)
    if not stages:
        return None
    table = run.samples(stages[-1])
    table = table[table["method"] == reference(run)]
    if len(table) < 2 or table["gold"].isna().all():
        return None
    return float(table["score"].astype(float).std()), float(table["gold"].astype(float).std())


def calibration_of(run: Run) -> dict[str, Any] | None:
    """Content of the last complete reward model's calibration.json; None if there is none."""
    for stage in run.of_kind("reward_model", complete=True)[-1:]:
        if (run.directory(stage) / "calibration.json").exists():  # not written by older versions
            return read_json(run.directory(stage) / "calibration.json")
    return None


def best_method(results: pd.DataFrame) -> str:
    """Method with the highest mean score over seeds in a `comparison`."""
    return str(results.groupby("method", sort=False)["score"].mean().idxmax())


def answers(run: Run, count: int) -> list[tuple[str, pd.DataFrame]]:
    """The first `count` test prompts with every method's answer (of its first seed), its `kind` and its `label`."""
    table, order = run.samples(run.evaluation()), comparison(run)
    methods = order.drop_duplicates("method").set_index("method")[["kind", "label"]]
    table = table[table["seed"] == table.groupby("method")["seed"].transform("min")].join(methods, on="method")
    ranks = {name: rank for rank, name in enumerate(methods.index)}
    table = table.sort_values("method", key=lambda names: names.map(ranks), kind="stable")
    prompts = [table[table["step"] == step] for step in sorted(table["step"].unique())[:count]]
    return [(rows["prompt"].iloc[0], rows.reset_index(drop=True)) for rows in prompts]


def judge_name(run: Run, judge: str | dict[str, Any]) -> str:
    """Name of a judge in a config, for use in a sentence."""
    if isinstance(judge, str):
        return GOLD if judge in run.stages and run.kind(judge) == "gold" else f"reward model {Path(judge).name}"
    if "url" in judge:
        return f"judge {judge['model']}"
    return " + ".join([*([judge["model"]] if judge["model"] else []), *judge["functions"]])


def by_strength(run: Run, names: Sequence[str]) -> list[str]:
    """Sort stages by ascending beta; stages without beta keep their order."""
    return sorted(names, key=lambda name: -_strength(run, name))


def colour_of(run: Run, method: str) -> Colour:
    """Name of the colour of a method's kind; grey for methods that are no stage's, such as a checkpoint."""
    row = shown_kind(_kind(run, method))
    return "grey" if row is None else row.colour


def step_of(kind: str) -> str:
    """Name of the steps that a kind's metrics count."""
    row = shown_kind(kind)
    return "step" if row is None else row.step


def _kind(run: Run, method: str) -> str:
    if method.startswith("best_of_"):
        return "best_of_n"
    return run.kind(method) if method in run.stages else "checkpoint"


def _rank(kind: str) -> int:
    return list(KINDS).index(kind) if kind in KINDS else len(KINDS)


def _strength(run: Run, method: str) -> float:
    section = run.config(method)["section"] if method in run.stages else {}
    return -section.get("beta", 0.0)


def _label(run: Run, method: str) -> str:
    if method.startswith("best_of_"):
        return f"Best of {method.removeprefix('best_of_')}"
    if method not in run.stages:
        return method
    section = run.config(method)["section"]
    distilled = section.get("demonstrations") is not None  # trained on a stage's samples, as in rejection sampling
    kind = shown_kind(section["kind"])
    if kind is None or kind.label is None or distilled:
        return method
    return kind.label.format(**section) if isinstance(kind.label, str) else kind.label(section)


def _reward_errors(run: Run, table: pd.DataFrame) -> list[float]:
    answers = run.samples(run.evaluation())
    rows = zip(table["method"], table["seed"], strict=True)
    groups = [answers[(answers["method"] == method) & (answers["seed"] == seed)]["score"] for method, seed in rows]
    return [standard_error(np.asarray(scores, float)) for scores in groups]
