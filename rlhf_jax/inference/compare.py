"""Compare policies by their answers to the same prompts."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import pandas as pd

from rlhf_jax import config as configs
from rlhf_jax.core.keys import derive
from rlhf_jax.core.statistics import standard_error
from rlhf_jax.data.padding import pad_left
from rlhf_jax.data.pipeline import Content, Prompts
from rlhf_jax.data.rows import limited
from rlhf_jax.inference.answers import Split, answer, measures, win_rate
from rlhf_jax.inference.encoding import encode_prompts, within_context
from rlhf_jax.inference.sample import BATCH, MAX_NEW_TOKENS
from rlhf_jax.loading.models import Policy
from rlhf_jax.rewards.judging import preferred_by_score
from rlhf_jax.rewards.scorers import make_scorer, same_tokenizer
from rlhf_jax.rewards.sources import AnyReward, as_reward
from rlhf_jax.runtime.files import measured
from rlhf_jax.sampling.buckets import bucket
from rlhf_jax.sampling.options import SamplingOptions
from rlhf_jax.types import RlhfError

BOOTSTRAP_ROUNDS = 1000


def evaluate(
    policies: Mapping[str, Policy],
    prompts: Sequence[Content],
    judge: AnyReward,
    *,
    seed: int = 0,
    batch_size: int = BATCH,
    **options: Any,
) -> pd.DataFrame:
    """Compare policies with the first one, the reference, on one answer each to the same prompts.

        evaluate({"sft": start, "mine": policy}, prompts, reward_model, max_new_tokens=32)

    The stage `evaluate` compares the stages of an experiment in the same way, and adds held-out texts, Best-of-N and
    several seeds.

    Args:
        policies: policies by name, all with the reference's tokenizer.
        prompts: all texts or all chats.
        judge: a reward model or a function, as for `score`. It overrates policies that were trained on it.
        seed: random seed.
        batch_size: answers per batch.
        options: fields of `SamplingOptions` except stop, as for `sample`.

    Returns: one row per policy: `n_prompts`; the judge's mean `score` and its `gain` over the reference, with standard
    errors over prompts (`_se`); `win_rate` against the reference with 95 % intervals (`win_low`, `win_high` by Wilson,
    `boot_low`, `boot_high` by bootstrap), `tie_rate`, and the length-controlled `lc_win_rate`; `kl` from the reference
    (nats); mean `length` (tokens); and further columns of an experiment's results.

    Raises RlhfError if tokenizers differ, a prompt cannot be encoded or fills the context, or an option is invalid.
    """
    how = configs.build(SamplingOptions, options, "evaluate")
    if how.stop:
        raise RlhfError("evaluate.stop is not supported, because divergences are measured on complete answers: omit it")
    if not policies or not prompts:
        raise RlhfError("evaluate needs at least one policy and one prompt")
    if len({isinstance(prompt, list) for prompt in prompts}) > 1:
        raise RlhfError("some prompts are texts and some are chats: give one kind only")
    reference = next(iter(policies.values()))
    for name, policy in policies.items():
        if not same_tokenizer(policy.tokenizer, reference.tokenizer):
            raise RlhfError(f"{name} and the reference have different tokenizers: compare models with one tokenizer")
    ids = encode_prompts(prompts, reference)
    sampling = how.sampling(reference.tokenizer.stop_ids, MAX_NEW_TOKENS)
    sampling = within_context(reference, max(ids, key=len), sampling)
    width = bucket(max(map(len, ids)))
    rows, data = [{"prompt": prompt} for prompt in prompts], limited(width, sampling.max_new_tokens)
    scorer = make_scorer(as_reward(judge), reference, rows, data, batch_size)
    split = Split("prompts", Prompts(*pad_left(ids, width)), None, reference, scorer, None)
    key = jax.random.key(seed)
    answers = {
        name: answer(policy, split, derive(key, name), sampling, best_of=1, batch_size=batch_size)
        for name, policy in policies.items()
    }
    first = next(iter(answers.values()))
    table = []
    for found in answers.values():
        gains, pairs = found.judged() - first.judged(), preferred_by_score(found.judged(), first.judged())
        alone = {name: value for name, value in measures(found, 1).items() if not name.startswith("gold")}
        table.append(
            {
                "n_prompts": len(prompts),
                "score": alone.pop("reward_score"),
                "score_se": measured(standard_error(found.judged())),
                "gain": float(gains.mean()),
                "gain_se": measured(standard_error(gains)),
                **win_rate(pairs, found, first, rounds=BOOTSTRAP_ROUNDS, seed=seed),
                **alone,
            }
        )
    return pd.DataFrame(table, index=pd.Index(answers, name="policy")).dropna(axis="columns", how="all")
