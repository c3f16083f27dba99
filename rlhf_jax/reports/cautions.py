"""Reasons to mistrust a comparison, told before any of its findings."""

from typing import Any

from rlhf_jax.reports import frames
from rlhf_jax.reports.run import Run

FEWEST_PROMPTS = 100
"""With fewer, the 95 % interval of a share of pairs won is more than 20 points wide."""


def cautions(run: Run) -> list[str]:
    """A sentence or two for each reason; empty where there is none, or no evaluation.

    The reasons are a reward model that ranks held-out pairs no better than chance (its accuracy's 95 % interval
    contains 50 %, or lies below), pairs decided by the same reward that chose or trained some of the answers, and an
    evaluation on few prompts.
    """
    if not run.of_kind("evaluate", complete=True):
        return []
    section = run.config(run.evaluation())["section"]
    judge = section["reward_model"] if section.get("judge") is None else section["judge"]
    chosen = _optimised_for(run)
    rewards = {name for reward in [section["reward_model"], judge, *chosen.values()] for name in _models(reward)}
    found = [_chance(run, name) for name in run.of_kind("reward_model", complete=True) if name in rewards]
    own = [method for method, reward in chosen.items() if set(_parts(reward)) & set(_parts(judge))]
    if own:
        found.append(
            f"The judge chose its own samples: {_list(own)} {'was' if len(own) == 1 else 'were'} chosen by, or trained "
            f"on, the score of {frames.judge_name(run, judge)}, which also judges here. A high score or win rate shows "
            "that this score was optimised, not that the answers are better."
        )
    prompts = int(run.results()["n_prompts"].max())
    if prompts < FEWEST_PROMPTS:
        found.append(
            f"Only {prompts} prompt{'s' if prompts > 1 else ''}: differences between methods must be large to be more "
            f"than noise. Evaluate on {FEWEST_PROMPTS} or more."
        )
    return [sentence for sentence in found if sentence is not None]


def meaningless(run: Run) -> bool:
    """Return whether a reward model no better than chance gives the score that methods are compared by."""
    if not run.of_kind("evaluate", complete=True) or frames.judged_by_gold(run.results()):
        return False
    reward = run.config(run.evaluation())["section"]["reward_model"]
    stages = run.of_kind("reward_model", complete=True)
    return any(_chance(run, name) is not None for name in _models(reward) if name in stages)


def _chance(run: Run, stage: str) -> str | None:
    """Caution about a reward model at chance or below; None for any other, and for stages that kept no interval."""
    summary = run.summary(stage)
    if "accuracy_low" not in summary or summary["accuracy_low"] > 0.5:
        return None
    rate, low, high = (f"{100 * summary[name]:.0f}" for name in ("accuracy", "accuracy_low", "accuracy_high"))
    standing = "no better than chance" if summary["accuracy_high"] >= 0.5 else "worse than chance"
    return (
        f"The reward model {stage} is {standing}: it ranks {rate} % [{low}, {high}] of {summary['eval_pairs']} "
        "held-out pairs as their labels do. Scores by it, and what was chosen or trained by them, say nothing about "
        "the preferences."
    )


def _optimised_for(run: Run) -> dict[str, Any]:
    """The reward that each compared method was chosen by or trained on, by the method's name."""
    section = run.config(run.evaluation())["section"]
    found: dict[str, Any] = {}
    for method in run.results()["method"].unique():
        if method.startswith("best_of_"):
            found[method] = section["reward_model"]
        elif method in run.stages:
            reward = _reward_of(run, method)
            if reward is not None:
                found[method] = reward
    return found


def _reward_of(run: Run, stage: str) -> Any:
    """The reward that a stage's section names, or that of the stage whose samples it learns from; None without one."""
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
    """The model and the functions of a reward; nothing for a judge that is asked over HTTP."""
    return [*_models(reward), *(reward.get("functions", ()) if isinstance(reward, dict) else ())]


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
