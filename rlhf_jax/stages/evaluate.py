"""evaluate: compare methods by one response to each prompt, with win rates against the reference and other opponents.

Stages of one kind (such as DPO with different betas) are selected on the validation split; the table is computed on the
test split.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from rlhf_jax.config import AtLeastTwo, Count, ModelSource, NonNegative, Range, check_ranges
from rlhf_jax.core.statistics import standard_error
from rlhf_jax.data import pipeline
from rlhf_jax.data.prompts import draw_prompts
from rlhf_jax.inference.answers import Answers, EvaluatedMethod, Split, answer, held_out_texts, measures, win_rate
from rlhf_jax.loading.context import Context
from rlhf_jax.loading.data_report import report_prompts
from rlhf_jax.loading.models import Policy, RewardModel
from rlhf_jax.loading.stage_models import load_stage_policy
from rlhf_jax.rewards.http_judge import HTTPJudge, HTTPJudgeConfig
from rlhf_jax.rewards.judging import TextScorer, make_http_judge, make_judge, preferred_by_asking, preferred_by_score
from rlhf_jax.rewards.scorers import make_scorer, same_tokenizer
from rlhf_jax.rewards.sources import Reward, RewardSource, find_reward, name_of
from rlhf_jax.runtime.files import measured, read_json, write_rows
from rlhf_jax.types import RlhfError

Rows = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Policies to compare, the prompts that they answer, and the judge that decides."""

    kind: Literal["evaluate"]
    reference: ModelSource  # policy that the others are compared with
    policies: tuple[ModelSource, ...]  # stages or checkpoints to evaluate
    best_of: tuple[AtLeastTwo, ...]  # values of N for the reference's Best-of-N
    reward_model: RewardSource  # reward that scores responses and chooses Best-of-N's
    # Gold stage, reward or judge over HTTP that decides pairs; None: reward_model.
    judge: RewardSource | HTTPJudgeConfig | None
    prompts: Count  # maximum number of test prompts, drawn at random, the same for every method
    selection_prompts: Count  # maximum number of validation prompts, on which stages are selected
    # Temperature of the responses; 0 is greedy, and then KL is the mean log-ratio at temperature 1.
    temperature: NonNegative
    against: tuple[
        ModelSource, ...
    ] = ()  # further opponents in addition to the reference, each also a row of the table
    # Resamples of the bootstrap intervals over prompts.
    bootstrap_rounds: Annotated[int, Range(at_least=100, at_most=1_000_000)] = 1000

    def __post_init__(self) -> None:
        check_ranges(self)


class Judges(NamedTuple):
    """The reference, the reward model and the judge, for every split."""

    reference: Policy
    reward_model: RewardModel | Reward
    judge: Callable[[Policy, Rows], TextScorer] | None
    http: HTTPJudge | None


def run(config: EvaluateConfig, context: Context) -> dict[str, Any]:
    """Write the tables of the test and validation splits, win rates and all responses.

    `results.jsonl` has a row for each method with its win rate against the reference; `selection.jsonl` has the same
    columns for the validation split; `win_rates.jsonl` has win rates against every opponent; `samples.jsonl` has the
    responses, each with its `win` against the reference's.
    """
    judge, http = None, None
    if isinstance(config.judge, HTTPJudgeConfig):
        http = make_http_judge(config.judge)
    elif config.judge is not None:
        judge = make_judge(config.judge, context)
    judges = Judges(context.policy(config.reference), find_reward(context, config.reward_model), judge, http)
    methods = _methods(config, context)
    tables = {split: pipeline.load_rows(context.data, split) for split in ("eval", "test")}
    report_prompts(context, judges.reference.tokenizer, tables)
    selection, *_ = _compare(config, context, methods, judges, "eval")
    results, win_rates, samples = _compare(config, context, methods, judges, "test")
    write_rows(context.directory / "selection.jsonl", selection)
    write_rows(context.directory / "results.jsonl", results)
    write_rows(context.directory / "win_rates.jsonl", win_rates)
    write_rows(context.directory / "samples.jsonl", samples)
    return {
        "selected": select(selection, deciding_column(config), context),
        "judge": config.judge.model
        if isinstance(config.judge, HTTPJudgeConfig)
        else name_of(config.judge or config.reward_model),
        **(http.summary() if http else {}),
    }


def _compare(
    config: EvaluateConfig, context: Context, methods: list[EvaluatedMethod], judges: Judges, name: str
) -> tuple[Rows, Rows, Rows]:
    """Return the table of a split, win rates against every opponent, and the responses."""
    split, answers = _split(config, context, judges, name), []
    for done, method in enumerate(methods, start=1 + len(methods) * (name == "test")):
        context.bar.now(f"answers of {method.name} ({name} split)")
        answers.append(_answers(method, split, config, context))
        context.bar.update(done, 2 * len(methods), {})

    def wins_against(own: Answers, other: Answers) -> Float[np.ndarray, "N"]:
        if judges.http is None:
            return preferred_by_score(own.judged(), other.judged())
        return preferred_by_asking(
            judges.http,
            own.rows,
            other.rows,
            lambda asked, of: context.bar.update(done, 2 * len(methods), {"asked": asked, "of": of}),
        )

    results: Rows = []
    win_rates: Rows = []
    samples: Rows = []
    for method, found in zip(methods, answers, strict=True):
        wins = wins_against(found, answers[0])
        results.append(result(method, found, answers[0], wins, config, context))
        samples += [
            {"step": index, "seed": method.seed, "method": method.name, **row, "win": float(win)}
            for index, (row, win) in enumerate(zip(found.rows, wins, strict=True))
        ]
        for source in dict.fromkeys((config.reference, *config.against)):
            number = opponent(source, method, methods)
            if methods[number] != method:
                pair = {"against": methods[number].name, "against_seed": methods[number].seed}
                won = wins_against(found, answers[number])
                rates = win_rate(won, found, answers[number], rounds=config.bootstrap_rounds, seed=context.seed)
                win_rates.append({"method": method.name, "seed": method.seed, **pair, "n_prompts": len(won), **rates})
    return results, win_rates, samples


def result(
    method: EvaluatedMethod,
    found: Answers,
    reference: Answers,
    wins: Float[np.ndarray, "N"],
    config: EvaluateConfig,
    context: Context,
) -> dict[str, Any]:
    """Return a row of the table: means over prompts, and the win rate against the reference."""
    alone = measures(found, method.best_of)
    pairs = win_rate(wins, found, reference, rounds=config.bootstrap_rounds, seed=context.seed)
    gains = found.judged() - reference.judged() if alone["gold_score"] is not None else None
    columns = {
        "method": method.name,
        "seed": method.seed,
        "n_prompts": len(wins),
        "gold_score": alone["gold_score"],
        "gold_se": alone["gold_se"],
        "gold_gain": None if gains is None else float(gains.mean()),
        "gold_gain_se": None if gains is None else measured(standard_error(gains)),
    }
    for name in ("win_rate", "win_low", "win_high"):
        columns[name] = pairs[name]
    for name in ("reward_score", "kl", "kl_se", "length", "vader", "distinct_2"):
        columns[name] = alone[name]
    columns["seconds"] = _seconds(method, context)
    return {**columns, **(pairs | alone | columns)}


def deciding_column(config: EvaluateConfig) -> str:
    """Return the column that chooses among stages: the judge's or the reward model's score, or the win rate."""
    if isinstance(config.judge, HTTPJudgeConfig):
        return "win_rate"
    return "reward_score" if config.judge is None else "gold_score"


def select(table: Rows, column: str, context: Context) -> dict[str, str]:
    """Return, for each kind of stage, the stage whose column has the highest mean."""
    by_kind: dict[str, dict[str, list[float]]] = {}
    for row in table:
        if row["method"] in context.stages:
            kind = read_json(context.workdir.find(row["method"]) / "config.json")["section"]["kind"]
            by_kind.setdefault(kind, {}).setdefault(row["method"], []).append(row[column])
    return {kind: max(found, key=lambda name: float(np.mean(found[name]))) for kind, found in by_kind.items()}


def _split(config: EvaluateConfig, context: Context, judges: Judges, name: str) -> Split:
    """Return the prompts of a split, with the models that score responses to them."""
    rows, reference = pipeline.load_rows(context.data, name), judges.reference
    count = config.prompts if name == "test" else config.selection_prompts
    prompts = pipeline.prompts(rows, reference.tokenizer, context.data)
    key, most = context.key(f"prompts: {name}"), min(count, len(prompts.tokens))
    texts = jax.random.permutation(context.key(f"texts: {name}"), len(rows))[:count]
    return Split(
        name,
        pipeline.take(prompts, np.sort(draw_prompts(prompts, most, key, f"config.{context.name}.prompts"))),
        held_out_texts([rows[number] for number in texts.tolist()], reference, context.data),
        reference,
        make_scorer(judges.reward_model, reference, rows, context.data, context.runtime.inference_batch),
        None if judges.judge is None else judges.judge(reference, rows),
    )


def _answers(method: EvaluatedMethod, split: Split, config: EvaluateConfig, context: Context) -> Answers:
    """Sample a method's answers with random keys specific to the method and split.

    Raises RlhfError if the method's policy has another tokenizer than the reference.
    """
    policy = split.reference if method.source == config.reference else _policy(method, context)
    if not same_tokenizer(policy.tokenizer, split.reference.tokenizer):
        raise RlhfError(
            f"config.{context.name}: {method.source} has another tokenizer than {config.reference}, so that their "
            "prompts differ and their KL divergence is undefined: compare models with the same tokenizer"
        )
    return answer(
        policy,
        split,
        context.key(f"samples: {method.name} {split.name}", method.seed - context.seed),
        context.sampling(policy.tokenizer, config.temperature),
        best_of=method.best_of,
        batch_size=context.runtime.inference_batch,
    )


def _policy(method: EvaluatedMethod, context: Context) -> Policy:
    if method.source not in context.stages:
        return context.policy(method.source)
    find = context.workdir.find
    return load_stage_policy(find(method.source), seed=method.seed, step=None, find=find, where=context.where)


def _methods(config: EvaluateConfig, context: Context) -> list[EvaluatedMethod]:
    """Return the methods, the reference first; a stage with several seeds has one entry for each."""
    name = config.reference if config.reference in context.stages else "reference"
    methods = [EvaluatedMethod(name, config.reference, context.seed, 1)]
    methods += [EvaluatedMethod(f"best_of_{n}", config.reference, context.seed, n) for n in config.best_of]
    for source in dict.fromkeys((*config.policies, *config.against)):
        if source in context.stages and source != config.reference:
            first, stop = read_json(context.workdir.find(source) / "model.json")["seeds"]
            methods += [EvaluatedMethod(source, source, seed, 1) for seed in range(first, stop)]
        elif source != config.reference:
            taken = {method.name for method in methods} | set(context.stages)
            short = Path(source).name
            methods.append(EvaluatedMethod(source if short in taken else short, source, context.seed, 1))
    return methods


def opponent(source: str, method: EvaluatedMethod, methods: list[EvaluatedMethod]) -> int:
    """Return the index of a source's method: with the same seed if there is one, else with the first."""
    numbers = {
        other.seed: number
        for number, other in reversed([*enumerate(methods)])
        if (other.source, other.best_of) == (source, 1)
    }
    return numbers.get(method.seed, min(numbers.values()))


def _seconds(method: EvaluatedMethod, context: Context) -> float | None:
    """Return the wall time of a method's stage; None for a checkpoint and for Best-of-N."""
    if method.best_of > 1 or method.name not in context.stages:
        return None
    return read_json(context.workdir.find(method.name) / "summary.json")["time/seconds"]
