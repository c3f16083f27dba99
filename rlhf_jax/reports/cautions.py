"""Reasons to mistrust a comparison of methods, shown before its results."""

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import pandas as pd

from rlhf_jax.reports import frames
from rlhf_jax.reports.run import Run
from rlhf_jax.types import Json

FEWEST_PROMPTS = 100
"""With fewer prompts, the 95 % interval of a win rate is more than 20 points wide."""

ERRORS = 3
"""Number of standard errors by which two estimates must differ to be taken as different."""


class _Judgement(NamedTuple):
    """A stage that compares methods: the judge's reward, the rewards that the methods optimised, and its prompts."""

    judge: Any
    optimised: dict[str, Any]
    prompts: int


def cautions(run: Run) -> list[str]:
    """List the reasons to mistrust the evaluation and the scores at equal KL; empty if there are none.

    The reasons are a reward model no better than chance on held-out pairs (the 95 % interval of its accuracy contains
    50 % or lies below it), a judge that is also the reward that selected or trained some of the answers, a comparison
    on few prompts, a divergence below 0, a reference with another score on Best-of-N's prompts, a comparison on rows of
    the evaluation split, and training that ended within the learning rate's warm-up. Before methods are compared, every
    reward model is checked, and afterwards those that the comparison depends on.
    """
    judgements = _judgements(run)
    rewards = [reward for found in judgements for reward in (found.judge, *found.optimised.values())]
    used = {name for reward in [*rewards, *_selecting(run)] for name in _models(reward)}
    models = run.of_kind("reward_model", complete=True)
    reasons = [_chance(run, name) for name in models if name in used or not judgements]
    reasons += [_circular(run, found) for found in judgements]
    if judgements and (prompts := min(found.prompts for found in judgements)) < FEWEST_PROMPTS:
        reasons.append(
            f"Only {prompts} prompt{'s' if prompts > 1 else ''}: small differences between methods may be noise. "
            f"Evaluate on {FEWEST_PROMPTS} prompts or more."
        )
    reasons += [_negative_kl(run), _heights(run), _tested_on_evaluation_rows(run), _still_warming_up(run)]
    return list(dict.fromkeys(reason for reason in reasons if reason is not None))


def of_several(runs: Mapping[str, Run]) -> list[str]:
    """List the reasons to mistrust a comparison of the runs with each other, as on the shared chart of score and KL."""
    evaluated = {name: run for name, run in runs.items() if run.of_kind("evaluate", complete=True)}
    if len(evaluated) < 2:
        return []
    starts = {name: _start(run) for name, run in evaluated.items()}
    low, high = (choose(starts, key=lambda name: starts[name]["score"]) for choose in (min, max))
    error = (starts[low]["score_se"] ** 2 + starts[high]["score_se"] ** 2) ** 0.5
    reasons = []
    if len({json.dumps(_judge_identity(run), sort_keys=True) for run in evaluated.values()}) > 1:
        reasons.append("The runs were not judged by the same judge: do not compare their scores.")
    elif starts[high]["score"] - starts[low]["score"] > ERRORS * error:
        values = (f"{starts[name]['score']:.2f} in {name} ({starts[name]['label']})" for name in (low, high))
        reasons.append(
            f"The references of the runs differ: they score {' and '.join(values)}. Compare the gains over the "
            "references, not the scores."
        )
    return reasons


def _judgements(run: Run) -> list[_Judgement]:
    found = []
    for stage in run.of_kind("evaluate", complete=True)[-1:]:
        section, results = run.config(stage)["section"], run.results()
        judge = section["reward_model"] if section.get("judge") is None else section["judge"]
        optimised = _optimised(run, results["method"].unique(), section["reward_model"])
        found.append(_Judgement(judge, optimised, int(results["n_prompts"].max())))
    for stage in run.of_kind("frontier", complete=True)[-1:]:
        section = run.config(stage)["section"]
        methods = run.points(stage)["method"].unique()
        found.append(_Judgement(section["judge"], _optimised(run, methods, None), int(section["prompts"])))
    return found


def _selecting(run: Run) -> list[Any]:
    """Reward of the last evaluation, which selects Best-of-N's answers."""
    return [run.config(stage)["section"]["reward_model"] for stage in run.of_kind("evaluate", complete=True)[-1:]]


def _circular(run: Run, judgement: _Judgement) -> str | None:
    """Caution about a judge whose score the methods optimised, or None."""
    judge = set(_parts(judgement.judge))
    circular = [method for method, reward in judgement.optimised.items() if set(_parts(reward)) & judge]
    if not circular:
        return None
    return (
        f"The judge scores answers that were optimised for it: {_list(circular)} "
        f"{'was' if len(circular) == 1 else 'were'} selected by, or trained on, the score of "
        f"{frames.judge_name(run, judgement.judge)}, which is also the judge here. A high score or win rate shows that "
        "this score was optimised, not that the answers are better."
    )


def _negative_kl(run: Run) -> str | None:
    """Caution about measured divergences that are below 0 by more than their errors, or None."""
    tables = [run.results()] if run.of_kind("evaluate", complete=True) else []
    tables += [run.points(stage) for stage in run.of_kind("frontier", complete=True)[-1:]]
    if not tables:
        return None
    measured = pd.concat([table[["method", "kl", "kl_se"]].astype({"kl": float, "kl_se": float}) for table in tables])
    below = measured[measured["kl"] + ERRORS * measured["kl_se"].fillna(0.0) < 0]
    if below.empty:
        return None
    methods = list(dict.fromkeys(below["method"]))
    return (
        f"The KL divergence of {_list(methods)} was measured below 0 ({below['kl'].min():.3g} nats), which is "
        "impossible: answers were sampled otherwise than they were scored, for example with a temperature or a filter. "
        "Do not compare methods by KL."
    )


def _heights(run: Run) -> str | None:
    """Caution about a reference whose score on Best-of-N's prompts is not the one on the evaluation's, or None."""
    if not run.of_kind("evaluate", complete=True):
        return None
    start = _start(run)
    column = "gold" if frames.judged_by_gold(run.results()) else "proxy"
    for stage in run.of_kind("best_of_n", complete=True)[-1:]:
        first = run.best_of_n_curve(stage).iloc[0]
        gap, error = abs(first[column] - start["score"]), (first[f"{column}_se"] ** 2 + start["score_se"] ** 2) ** 0.5
        if gap > ERRORS * error:
            return (
                f"{start['label']} scores {start['score']:.2f} on the prompts of the evaluation and "
                f"{first[column]:.2f} on those of {stage}: compare Best-of-N's gains with those of other methods, not "
                "its scores."
            )
    return None


def _tested_on_evaluation_rows(run: Run) -> str | None:
    """Caution about a comparison on the rows that stages are selected on, or None."""
    for stage in run.of_kind("evaluate", complete=True)[-1:]:
        data = run.config(stage)["common"]["data"]
        if data["test"] in (None, data["eval"]):
            selected = sorted(run.selected())
            found = f", as {_list(selected)} {'was' if len(selected) == 1 else 'were'}," if selected else ""
            return (
                "The test rows are the evaluation rows (data.test): a stage or setting that was selected on them"
                f"{found} looks better than it is."
            )
    return None


def _still_warming_up(run: Run) -> str | None:
    """Caution about stages whose learning rate was still rising at the last update, or None."""
    rising = []
    for name in filter(run.is_complete, run.stages):
        section = run.config(name)["section"]
        if "optimizer" in section:
            warmup, updates = section["optimizer"]["warmup_steps"], _updates(section, run.summary(name))
            if warmup >= updates:
                rising.append(f"{name} (optimizer.warmup_steps = {warmup}, {updates} updates)")
    if not rising:
        return None
    return f"The learning rate of {_list(rising)} was still rising at the last update: train longer, or lower it."


def _updates(section: Mapping[str, Any], summary: Mapping[str, Any]) -> int:
    """Updates of a stage that trained; an online one makes several in a step."""
    steps = summary["steps"] if "steps" in summary else section["iterations"]
    return steps * section["epochs"] * section["minibatches"] if "minibatches" in section else steps


def meaningless(run: Run) -> bool:
    """Return whether the methods are compared by a reward model that is no better than chance."""
    if not run.of_kind("evaluate", complete=True) or frames.judged_by_gold(run.results()):
        return False
    reward = run.config(run.evaluation())["section"]["reward_model"]
    stages = run.of_kind("reward_model", complete=True)
    return any(_chance(run, name) is not None for name in _models(reward) if name in stages)


def _chance(run: Run, stage: str) -> str | None:
    """Caution about a reward model at or below chance, or None; also None if the stage recorded no interval."""
    summary = run.summary(stage)
    if "accuracy_low" not in summary or summary["accuracy_low"] > 0.5:
        return None
    rate, low, high = (f"{100 * summary[name]:.0f}" for name in ("accuracy", "accuracy_low", "accuracy_high"))
    standing = "no better than chance" if summary["accuracy_high"] >= 0.5 else "worse than chance"
    return (
        f"The reward model {stage} is {standing}: it ranks {rate} % [{low}, {high}] of {summary['eval_pairs']} "
        "held-out pairs as their labels do. Its scores, and anything selected or trained by them, say nothing about "
        "the preferences."
    )


def _start(run: Run) -> pd.Series:
    """Results of the evaluation's reference."""
    results = frames.comparison(run)
    return results[results["reference"]].iloc[0]


def _judge_identity(run: Run) -> Json:
    """Judge of an evaluation with the fingerprint of its stage, if it is one."""
    config = run.config(run.evaluation())
    section = config["section"]
    judge = section["reward_model"] if section.get("judge") is None else section["judge"]
    return [judge, config["inputs"].get(judge) if isinstance(judge, str) else None]


def _optimised(run: Run, methods: Iterable[str], selecting: Any) -> dict[str, Any]:
    """Map each method to the reward that it was trained on or, for Best-of-N, selected by."""
    rewards = {
        method: selecting if method.startswith("best_of_") else _reward_of(run, method)
        for method in methods
        if method.startswith("best_of_") or method in run.stages
    }
    return {method: reward for method, reward in rewards.items() if reward is not None}


def _reward_of(run: Run, stage: str) -> Any:
    """Reward of a stage, or of the stage whose samples it is trained on; None if neither has one."""
    section = run.config(stage)["section"]
    if section.get("reward_model") is not None:
        return section["reward_model"]
    for source in (section.get("demonstrations"), section.get("preferences")):
        if source in run.stages:
            return run.config(source)["section"].get("reward_model")
    return None


def _models(reward: Any) -> list[str]:
    if isinstance(reward, dict) and "url" in reward:
        return []
    model = reward.get("model") if isinstance(reward, dict) else reward
    return [model] if model is not None else []


def _parts(reward: Any) -> list[str]:
    """Names of a reward's model and functions; empty for an HTTP judge."""
    return [*_models(reward), *(reward.get("functions", ()) if isinstance(reward, dict) else ())]


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
