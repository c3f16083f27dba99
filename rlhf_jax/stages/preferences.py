"""preferences: samples responses from a policy and has a judge prefer one of two, as a noisy person would."""

import dataclasses
import itertools
from typing import Any, Literal

import jax
import numpy as np

from rlhf_jax.config import ModelSource, StageName
from rlhf_jax.data import pipeline
from rlhf_jax.runtime.files import write_rows
from rlhf_jax.sampling.batches import sample_all
from rlhf_jax.stages.context import Context
from rlhf_jax.stages.gold import load_judge
from rlhf_jax.stages.samples import texts
from rlhf_jax.types import RlhfError

TRAIN_FILE, EVAL_FILE = "preferences.jsonl", "preferences_eval.jsonl"


@dataclasses.dataclass(frozen=True)
class PreferencesConfig:
    """How many prompts are drawn, how many samples each gets (all pairs are labelled), and how noisy labels are.

    `rationality` multiplies the difference of the judge's scores, in standard deviations of the samples' scores, to
    give the log-odds of the label.
    """

    kind: Literal["preferences"]
    policy: ModelSource
    judge: StageName
    prompts: int
    eval_prompts: int  # of the prompts, those held out
    samples_per_prompt: int
    rationality: float


def run(config: PreferencesConfig, context: Context) -> dict[str, Any]:
    """Writes `preferences.jsonl` and `preferences_eval.jsonl` (prompt, chosen, rejected, and the judge's scores)."""
    policy, judge = context.policy(config.policy), load_judge(context, config.judge)
    pool = pipeline.prompts(pipeline.load_rows(context.data, "train"), policy.tokenizer, context.data)
    if config.prompts > len(pool.tokens):
        raise RlhfError(f"config.{context.name}.prompts = {config.prompts}: the data has only {len(pool.tokens)}")
    prompt_key, sample_key, label_key = jax.random.split(context.key(), 3)
    drawn = np.asarray(jax.random.choice(prompt_key, len(pool.tokens), (config.prompts,), replace=False))
    rollout = sample_all(
        policy.network,
        policy.params,
        pipeline.take(pool, drawn),
        sample_key,
        context.sampling(policy.tokenizer, 1.0),
        samples=config.samples_per_prompt,
        batch_size=context.runtime.inference_batch,
    )
    prompts, completions = texts(policy.tokenizer, rollout)
    scores = judge.score([prompt + completion for prompt, completion in zip(prompts, completions, strict=True)])
    rng = np.random.default_rng(np.asarray(jax.random.key_data(label_key)))
    pairs = [
        label(
            rng, prompts[a], (completions[a], completions[b]), (scores[a], scores[b]), config.rationality, scores.std()
        )
        for first in range(0, len(prompts), config.samples_per_prompt)
        for a, b in itertools.combinations(range(first, first + config.samples_per_prompt), 2)
    ]
    a_prompt = len(pairs) // config.prompts
    held_out = config.eval_prompts * a_prompt
    for name, rows in ((EVAL_FILE, pairs[:held_out]), (TRAIN_FILE, pairs[held_out:])):
        write_rows(context.directory / name, rows)
    agreement = float(np.mean([row["chosen_score"] > row["rejected_score"] for row in pairs]))
    context.bar.update(1, 1, {"pairs": len(pairs), "label agreement": agreement})
    return {
        "train_pairs": len(pairs) - held_out,
        "eval_pairs": held_out,
        "label_agreement": agreement,
        "judge_mean": float(scores.mean()),
        "judge_std": float(scores.std()),
        "prompt_key": np.asarray(jax.random.key_data(prompt_key)).tolist(),
    }


def label(
    rng: np.random.Generator,
    prompt: str,
    completions: tuple[str, str],
    scores: tuple[float, float],
    rationality: float,
    std: float,
) -> dict[str, Any]:
    r"""One preference: the first is chosen with probability $\sigma(c (s_1 - s_2) / \mathrm{std})$ (Bradley-Terry)."""
    logit = rationality * (scores[0] - scores[1]) / std
    first_wins = rng.random() < 1 / (1 + np.exp(-logit))
    chosen, rejected = (0, 1) if first_wins else (1, 0)
    return {
        "prompt": prompt,
        "chosen": completions[chosen],
        "rejected": completions[rejected],
        "chosen_score": float(scores[chosen]),
        "rejected_score": float(scores[rejected]),
    }


def load_preferences(context: Context, stage: str | None) -> tuple[list[dict], list[dict]]:
    """Training and held-out pairs: those an earlier stage wrote, or the experiment's own data where stage is None."""
    if stage is not None:
        directory = context.workdir.find(stage)
        rows = [pipeline.formats.read_table(str(directory / name)) for name in (TRAIN_FILE, EVAL_FILE)]
    else:
        rows = [pipeline.load_rows(context.data, split) for split in ("train", "eval")]
        for split, table in zip(("train", "eval"), rows, strict=True):
            pipeline.formats.require_columns(table, ["prompt", "chosen", "rejected"], context.data.source(split))
    return rows[0], rows[1]
