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
    """Compare policies with the first of them, the reference, by one answer each to the same prompts.

        evaluate({"sft": start, "mine": policy}, prompts, reward_model, max_new_tokens=32)

    The stage `evaluate` measures the same of an experiment's stages, with held-out texts, Best-of-N and seeds.

    Args:
        policies: by name, all with the reference's tokenizer.
        prompts: all texts or all chats.
        judge: a reward model or a function, as for `score`. A policy trained against it is flattered by it.
        seed: of the random numbers.
        batch_size: answers at once.
        options: fields of `SamplingOptions` but stop, as for `sample`.

    Returns: a row a policy: `n_prompts`; the judge's mean `score`, and `gain` over the reference, with standard errors
    over prompts (`_se`); `win_rate` against the reference with 95 % intervals (`win_low`, `win_high` by Wilson,
    `boot_low`, `boot_high` by bootstrap), ties, and the rate at equal lengths (`lc_win_rate`); `kl` from the reference
    (nats), mean `length` (tokens), and further columns as in an experiment's results.

    Raises RlhfError where tokenizers differ, where a prompt cannot be read or leaves no room, and for a bad option.
    """
    how = configs.build(SamplingOptions, options, "evaluate")
    if how.stop:
        raise RlhfError("evaluate.stop: divergences are those of whole answers: leave stop out")
    if not policies or not prompts:
        raise RlhfError("evaluate needs at least one policy and one prompt")
    if len({isinstance(prompt, list) for prompt in prompts}) > 1:
        raise RlhfError("some prompts are texts and some are chats: give all of one kind")
    reference = next(iter(policies.values()))
    for name, policy in policies.items():
        if not same_tokenizer(policy.tokenizer, reference.tokenizer):
            raise RlhfError(f"{name} has another tokenizer than the reference: compare models of one tokenizer")
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
