"""preferences: sample responses from a policy and label pairs of them with a judge or a reward model.

With a `label_beta`, labels are noisy (Bradley-Terry); without one, the response with the higher score is chosen.
Repeating `preferences` and `dpo`, each time starting from the latest policy, is iterative DPO (Xu et al. 2023,
arXiv:2312.16682; Yuan et al. 2024, arXiv:2401.10020).
"""

import dataclasses
import itertools
from typing import Any, Literal

import jax
import numpy as np

from rlhf_jax.config import AtLeastTwo, Count, ModelSource, NonNegative, Positive, StageName, check_ranges
from rlhf_jax.data import chat, pipeline
from rlhf_jax.loading.context import Context
from rlhf_jax.loading.data_report import report_prompts
from rlhf_jax.loading.models import Policy
from rlhf_jax.loading.samples import draw_and_sample, texts
from rlhf_jax.loading.tables import PREFERENCES
from rlhf_jax.rewards.gold_judges import load_judge
from rlhf_jax.rewards.http_judge import HTTPJudge, HTTPJudgeConfig, Pair
from rlhf_jax.rewards.judging import make_http_judge
from rlhf_jax.rewards.scorers import make_scorer
from rlhf_jax.rewards.sources import RewardSource, find_reward
from rlhf_jax.runtime.files import write_rows
from rlhf_jax.types import RlhfError, Rollout


@dataclasses.dataclass(frozen=True)
class PreferencesConfig:
    """Prompts, samples per prompt, the judge that labels pairs of samples, and the noise of the labels.

    The log-odds of a label are `label_beta` times the difference of the scores, in standard deviations of all samples'
    scores. If it is None, the response with the higher score is chosen and ties are dropped. `pairs` selects all pairs
    of a prompt's samples, or only the best with the worst. With noise-free labels, `margin` adds a column `margin` for
    reward-model losses: this factor times the difference in standard deviations.
    """

    kind: Literal["preferences"]
    policy: ModelSource  # policy to sample from
    judge: StageName | HTTPJudgeConfig | None  # gold stage, or judge over HTTP; None if reward_model is set
    prompts: Count  # prompts of the training split to sample for
    eval_prompts: Count  # how many of these prompts are held out for evaluation
    samples_per_prompt: AtLeastTwo  # responses to each prompt
    # Log-odds of a label if scores differ by one standard deviation of all scores; None: the higher score wins, and
    # ties are dropped.
    label_beta: NonNegative | None
    reward_model: RewardSource | None = None  # reward that replaces the judge
    pairs: Literal["all", "best_worst"] = (
        "all"  # pairs to label: all of a prompt's responses, or its best with its worst
    )
    # Factor of the column `margin`, times the score difference in standard deviations (needs label_beta = None).
    margin: Positive | None = None
    temperature: Positive = 1.0  # temperature of the samples

    def __post_init__(self) -> None:
        check_ranges(self)
        if (self.judge is None) == (self.reward_model is None):
            raise ValueError(
                f"judge = {self.judge!r} and reward_model = {self.reward_model!r}: exactly one of them scores the "
                "samples, and the other is None"
            )
        if isinstance(self.judge, HTTPJudgeConfig):
            needing = {"label_beta": None, "pairs": "all", "margin": None}
            for name, value in needing.items():
                if getattr(self, name) != value:
                    raise ValueError(
                        f"{name} = {getattr(self, name)!r} needs scores, but a judge over HTTP only compares answers: "
                        f"set it to {value!r}"
                    )
        if not 0 < self.eval_prompts < self.prompts:
            raise ValueError(
                f"eval_prompts = {self.eval_prompts} are held out of prompts = {self.prompts}: both parts need some"
            )
        if self.margin is not None and self.label_beta is not None:
            raise ValueError(
                f"margin = {self.margin} needs label_beta = None: with noisy labels, margins would reveal the noise"
            )


def run(config: PreferencesConfig, context: Context) -> dict[str, Any]:
    """Write `preferences.jsonl` and `preferences_eval.jsonl` (prompt, chosen, rejected, and scores if available).

    If prompts are chats, responses are messages of the assistant. A judge over HTTP compares every pair in both orders;
    ties are dropped.
    """
    policy = context.policy(config.policy)
    table = pipeline.load_rows(context.data, "train")
    report_prompts(context, policy.tokenizer, {"train": table})
    drawn = draw_and_sample(
        policy,
        table,
        context,
        prompts=config.prompts,
        samples=config.samples_per_prompt,
        temperature=config.temperature,
    )
    rollout = drawn.rollout
    prompt_texts, answer_texts = texts(policy.tokenizer, rollout)
    prompts: list[Any] = prompt_texts
    answers: list[Any] = answer_texts
    if chats := _chats(table):
        prompts = [chats[i] for i in np.repeat(drawn.rows, config.samples_per_prompt)]
        answers = [[{"role": "assistant", "content": answer}] for answer in answers]
    if isinstance(config.judge, HTTPJudgeConfig):
        http = make_http_judge(config.judge)
        wins = _compare(http, config.samples_per_prompt, prompt_texts, answer_texts, context)
        each, figures = pairs_by_verdict(wins, config.samples_per_prompt, prompts, answers), http.summary()
    else:
        scores = _scores(config, context, policy, table, rollout)
        if scores.std() == 0:
            raise RlhfError(f"config.{context.name}: all {len(scores)} samples have the same score: no pair is left")
        rng = np.random.default_rng(np.asarray(jax.random.key_data(context.key("labels"))))
        each = pairs_by_score(config, rng, prompts, answers, scores)
        figures = {"judge_mean": float(scores.mean()), "judge_std": float(scores.std())}
    held_out = [row for rows in each[: config.eval_prompts] for row in rows]
    kept = [row for rows in each[config.eval_prompts :] for row in rows]
    for name, rows in ((PREFERENCES.eval, held_out), (PREFERENCES.train, kept)):
        if not rows:
            raise RlhfError(
                f"config.{context.name}: no pair is left for {name}, because all are ties: use more prompts or more "
                "samples per prompt"
            )
        write_rows(context.directory / name, rows)
    if "chosen_score" in kept[0]:
        agreement = np.mean([row["chosen_score"] > row["rejected_score"] for row in held_out + kept])
        figures = {"label_agreement": float(agreement), **figures}
    shown = {name: figures[name] for name in ("label_agreement", "judge_cost") if name in figures}
    context.bar.update(1, 1, {"pairs": len(held_out + kept), **shown})
    pairs_per_prompt = len(PAIRS[config.pairs](np.zeros(config.samples_per_prompt)))
    return {
        "train_pairs": len(kept),
        "eval_pairs": len(held_out),
        "ties_left_out": config.prompts * pairs_per_prompt - len(held_out + kept),
        **figures,
        "prompt_key": drawn.key,
    }


def all_pairs(scores: np.ndarray) -> list[tuple[int, int]]:
    """Index pairs of all pairs of samples of one prompt."""
    return list(itertools.combinations(range(len(scores)), 2))


def best_and_worst(scores: np.ndarray) -> list[tuple[int, int]]:
    """Index pair of the samples with the highest and the lowest score; the first and the last if all are equal."""
    return [(int(np.argmax(scores)), len(scores) - 1 - int(np.argmin(scores[::-1])))]


PAIRS = {"all": all_pairs, "best_worst": best_and_worst}


def pairs_by_score(
    config: PreferencesConfig, rng: np.random.Generator, prompts: list[Any], completions: list[Any], scores: np.ndarray
) -> list[list[dict[str, Any]]]:
    """Label pairs of each prompt by scores. Args: `samples_per_prompt` rows per prompt, in order, and scores [N]."""
    std, each = scores.std(), []
    for first in range(0, len(prompts), config.samples_per_prompt):
        prompt_scores = scores[first : first + config.samples_per_prompt]
        rows = []
        for a, b in PAIRS[config.pairs](prompt_scores):
            pair = (completions[first + a], completions[first + b]), (prompt_scores[a], prompt_scores[b])
            if config.label_beta is not None:
                rows.append(sampled_label(rng, prompts[first], *pair, config.label_beta, std))
            elif prompt_scores[a] != prompt_scores[b]:
                row = higher_first(prompts[first], *pair)
                if config.margin is not None:
                    row["margin"] = config.margin * (row["chosen_score"] - row["rejected_score"]) / float(std)
                rows.append(row)
        each.append(rows)
    return each


def pairs_by_verdict(
    wins: np.ndarray, samples: int, prompts: list[Any], completions: list[Any]
) -> list[list[dict[str, Any]]]:
    """Label pairs of each prompt by a judge's verdicts, dropping ties.

    Args: wins of all pairs of each prompt in the order of `all_pairs`: 1 if the first answer wins, 0 if the second
    wins, 1/2 for a tie.
    """
    places, each = all_pairs(np.zeros(samples)), []
    for number, own in enumerate(wins.reshape(-1, len(places))):
        first = number * samples
        two = [(completions[first + a], completions[first + b]) for a, b in places]
        each.append(
            [
                {"prompt": prompts[first], "chosen": pair[int(win < 0.5)], "rejected": pair[int(win > 0.5)]}
                for pair, win in zip(two, own, strict=True)
                if win != 0.5
            ]
        )
    return each


def sampled_label(
    rng: np.random.Generator,
    prompt: Any,
    completions: tuple[Any, Any],
    scores: tuple[float, float],
    label_beta: float,
    std: float,
) -> dict[str, Any]:
    r"""Label a pair with noise: the first is chosen with probability $\sigma(\beta (s_1 - s_2) / \mathrm{std})$."""
    logit = label_beta * (scores[0] - scores[1]) / std
    first_wins = rng.random() < 1 / (1 + np.exp(-logit))
    return _preference(prompt, completions, scores, chosen=0 if first_wins else 1)


def higher_first(prompt: Any, completions: tuple[Any, Any], scores: tuple[float, float]) -> dict[str, Any]:
    """Label a pair without noise: the higher score is chosen."""
    return _preference(prompt, completions, scores, chosen=0 if scores[0] > scores[1] else 1)


def _preference(
    prompt: Any, completions: tuple[Any, Any], scores: tuple[float, float], *, chosen: int
) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "chosen": completions[chosen],
        "rejected": completions[1 - chosen],
        "chosen_score": float(scores[chosen]),
        "rejected_score": float(scores[1 - chosen]),
    }


def _scores(
    config: PreferencesConfig,
    context: Context,
    policy: Policy,
    table: list[dict[str, Any]],
    rollout: Rollout[np.ndarray],
) -> np.ndarray:
    """Scores of the gold judge or of the reward: [N]."""
    if config.judge is not None:
        assert isinstance(config.judge, str)
        judge = load_judge(context, config.judge)
        return judge.score(
            [prompt + completion for prompt, completion in zip(*texts(policy.tokenizer, rollout), strict=True)]
        )
    assert config.reward_model is not None
    reward_model, batch_size = find_reward(context, config.reward_model), context.runtime.inference_batch
    return np.asarray(make_scorer(reward_model, policy, table, context.data, batch_size)(rollout), np.float64)


def _compare(
    judge: HTTPJudge, samples: int, prompts: list[str], completions: list[str], context: Context
) -> np.ndarray:
    """Ask the judge about all pairs of each prompt's samples."""
    pairs = [
        Pair(prompts[first], completions[first + a], completions[first + b])
        for first in range(0, len(prompts), samples)
        for a, b in all_pairs(np.zeros(samples))
    ]
    return judge.prefer(pairs, lambda done, total: context.bar.update(done, total, {}))


def _chats(table: list[dict[str, Any]]) -> list[Any] | None:
    """Prompts of a table if they are chats, otherwise None."""
    if "prompt" in table[0]:
        return [row["prompt"] for row in table] if isinstance(table[0]["prompt"], list) else None
    return [chat.question(row["messages"]) for row in table] if "messages" in table[0] else None
