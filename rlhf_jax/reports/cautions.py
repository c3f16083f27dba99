"""Reasons to mistrust a comparison of methods, shown before its results."""

from typing import Any

from rlhf_jax.reports import frames
from rlhf_jax.reports.run import Run

FEWEST_PROMPTS = 100
"""With fewer prompts, the 95 % interval of a win rate is more than 20 points wide."""

ERRORS = 3
"""Number of standard errors by which two estimates must differ to be taken as different."""


def cautions(run: Run) -> list[str]:
    """List the reasons to mistrust the evaluation; empty if there are none or there is no evaluation.

    The reasons are a reward model no better than chance on held-out pairs (the 95 % interval of its accuracy contains
    50 % or lies below it), a judge that is also the reward that selected or trained some of the answers, an evaluation
    on few prompts, a divergence below 0, and a reference with another score on Best-of-N's prompts.
    """
    if not run.of_kind("evaluate", complete=True):
        return []
    section = run.config(run.evaluation())["section"]
    judge = section["reward_model"] if section.get("judge") is None else section["judge"]
    optimised = _optimised_rewards(run)
    rewards = {name for reward in [section["reward_model"], judge, *optimised.values()] for name in _models(reward)}
    reasons = [_chance(run, name) for name in run.of_kind("reward_model", complete=True) if name in rewards]
    circular = [method for method, reward in optimised.items() if set(_parts(reward)) & set(_parts(judge))]
    if circular:
        reasons.append(
            f"The judge scores answers that were optimised for it: {_list(circular)} "
            f"{'was' if len(circular) == 1 else 'were'} selected by, or trained on, the score of "
            f"{frames.judge_name(run, judge)}, which is also the judge here. A high score or win rate shows that this "
            "score was optimised, not that the answers are better."
        )
    prompts = int(run.results()["n_prompts"].max())
    if prompts < FEWEST_PROMPTS:
        reasons.append(
            f"Only {prompts} prompt{'s' if prompts > 1 else ''}: small differences between methods may be noise. "
            f"Evaluate on {FEWEST_PROMPTS} prompts or more."
        )
    return [reason for reason in [*reasons, _negative_kl(run), _heights(run)] if reason is not None]


def _negative_kl(run: Run) -> str | None:
    """Caution about measured divergences that are below 0 by more than their errors, or None."""
    results = run.results()
    below = results[results["kl"] + ERRORS * results["kl_se"].fillna(0.0) < 0]
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
    results = frames.comparison(run)
    column = "gold" if frames.judged_by_gold(results) else "proxy"
    start = results[results["reference"]].iloc[0]
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


def _optimised_rewards(run: Run) -> dict[str, Any]:
    """Map each compared method to the reward that it was selected by or trained on."""
    section = run.config(run.evaluation())["section"]
    rewards: dict[str, Any] = {}
    for method in run.results()["method"].unique():
        if method.startswith("best_of_"):
            rewards[method] = section["reward_model"]
        elif method in run.stages:
            reward = _reward_of(run, method)
            if reward is not None:
                rewards[method] = reward
    return rewards


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
