"""Decoded responses, and rows of `samples.jsonl`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from rlhf_jax.data import pipeline
from rlhf_jax.data.padding import pad_left
from rlhf_jax.data.pipeline import Prompts, take
from rlhf_jax.data.prompts import draw_prompts
from rlhf_jax.loading.context import Context
from rlhf_jax.loading.models import Policy
from rlhf_jax.sampling.batches import sample_all
from rlhf_jax.sampling.buckets import bucket
from rlhf_jax.sampling.choice import Sampling
from rlhf_jax.text.incremental import token_texts
from rlhf_jax.text.stop_strings import cut, stop_table
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.types import Rollout


class SampledTexts(NamedTuple):
    """Responses of a model, one per row. Texts end before a stop string, which the last token completes."""

    rollout: Rollout[np.ndarray]
    texts: list[str]
    ended: list[bool]  # True if a stop token or stop string ended the response, False if it was cut off


def respond(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    sampling: Sampling,
    stops: Sequence[str],
    *,
    samples: int,
    batch_size: int,
    first: int = 0,
) -> SampledTexts:
    """Sample `samples` responses to each prompt in batches of `batch_size`, up to a stop token or stop string.

    Responses are also limited by the model's context.

    Args: first is the number of prompts sampled before these, so that each prompt of a data set has its own random key.
    """
    network, context = policy.network, policy.network.config.context
    lengths = np.array([len(prompt) for prompt in prompts])
    if context is not None:  # independent of the prompts' lengths, so that few programs are compiled
        sampling = dataclasses.replace(sampling, max_new_tokens=min(sampling.max_new_tokens, context))
    rollout = sample_all(
        network,
        policy.params,
        pad_left(prompts, bucket(int(lengths.max()))),
        key,
        sampling,
        samples=samples,
        batch_size=batch_size,
        first=first,
        limits=None if context is None else np.minimum(sampling.max_new_tokens, context - lengths),
        stop_strings=stop_table(policy.tokenizer, stops, network.vocab_size) if stops else None,
    )
    mask, written, ended = rollout.response_mask.copy(), [], []
    for row, (response, own) in enumerate(zip(rollout.response, rollout.response_mask, strict=True)):
        prompt, tokens = prompts[row // samples], response[own].tolist()
        count, text = cut(policy.tokenizer, prompt, tokens, stops)
        mask[row, count:] = False
        written.append(text)
        stopped = bool(stops) and text != cut(policy.tokenizer, prompt, tokens, ())[1]
        ended.append(stopped or tokens[-1] in sampling.stop_ids)
    rollout = rollout._replace(response=np.where(mask, rollout.response, 0), response_mask=mask)
    return SampledTexts(rollout, written, ended)


class DrawnSamples(NamedTuple):
    """Prompts drawn at random from a table, and sampled responses; the responses to one prompt are consecutive rows."""

    rows: np.ndarray  # int[prompts]: indices of the drawn prompts in the result of `data.pipeline.prompts`
    rollout: Rollout[np.ndarray]  # prompts x samples rows
    key: list[int]  # random key that the prompts were drawn with, for the summary


def draw_and_sample(
    policy: Policy,
    table: list[dict[str, Any]],
    context: Context,
    *,
    prompts: int,
    samples: int,
    temperature: float,
    field: str = "prompts",
    purpose: str = "",
) -> DrawnSamples:
    """Draw prompts from a table, and sample responses of a policy to each.

    Args: prompts is the number of prompts, and field the config field that sets it, for messages; samples is the number
    of responses per prompt; purpose is a prefix of the random keys' tags, for a stage that also samples elsewhere.
    """
    key = context.key(f"{purpose}prompts")
    pool = pipeline.prompts(table, policy.tokenizer, context.data)
    rows = draw_prompts(pool, prompts, key, f"config.{context.name}.{field}")
    context.bar.now(f"sampling {prompts * samples} responses")
    rollout = sample_all(
        policy.network,
        policy.params,
        take(pool, rows),
        context.key(f"{purpose}samples"),
        context.sampling(policy.tokenizer, temperature),
        samples=samples,
        batch_size=context.runtime.inference_batch,
    )
    return DrawnSamples(rows, rollout, np.asarray(jax.random.key_data(key)).tolist())


def texts(tokenizer: Tokenizer, rollout: Rollout[np.ndarray]) -> tuple[list[str], list[str]]:
    """Decode the prompts and completions of a rollout. Judges read their concatenation."""
    prompts, completions = [], []
    for prompt, prompt_mask, response, response_mask in zip(*map(np.asarray, rollout), strict=True):
        ids = prompt[prompt_mask].tolist()
        prompts.append(tokenizer.decode(ids))
        completions.append(tokenizer.decode_completion(ids, response[response_mask].tolist()))
    return prompts, completions


def sample_rows(
    tokenizer: Tokenizer, rollout: Rollout[np.ndarray], score: Sequence[float | None], kl: Sequence[float | None]
) -> list[dict[str, Any]]:
    """Make rows with `prompt`, `completion`, `score`, `kl` and `length` from a rollout."""
    lengths = np.asarray(rollout.response_mask).sum(axis=1)
    return [
        {"prompt": prompt, "completion": completion, "score": _number(s), "kl": _number(k), "length": int(length)}
        for prompt, completion, s, k, length in zip(*texts(tokenizer, rollout), score, kl, lengths, strict=True)
    ]


def add_tokens(
    rows: Sequence[dict[str, Any]],
    tokenizer: Tokenizer,
    rollout: Rollout[np.ndarray],
    values: Mapping[str, Float[np.ndarray, "N T"]],
) -> None:
    """Add `tokens` to the rows of the first samples: the `text` of each response token, and its value by name."""
    first = zip(rows, *map(np.asarray, rollout), strict=False)
    for number, (row, prompt, prompt_mask, response, mask) in enumerate(first):
        ids = response[mask].tolist()
        numbers = {name: [float(f"{x:.4g}") for x in value[number, : len(ids)]] for name, value in values.items()}
        row["tokens"] = {"text": token_texts(tokenizer, prompt[prompt_mask].tolist(), ids), **numbers}


def policy_samples(
    policy: Policy, prompts: Prompts, count: int, context: Context, temperature: float
) -> list[dict[str, Any]]:
    """Sample one response to each of the first `count` prompts, with the same random keys in every call; no scores."""
    if not count:
        return []
    first = take(prompts, np.arange(min(count, len(prompts.tokens))))
    rollout = sample_all(
        policy.network,
        policy.params,
        first,
        context.key("shown samples"),
        context.sampling(policy.tokenizer, temperature),
        samples=1,
        batch_size=context.runtime.inference_batch,
    )
    nothing = [None] * len(first.tokens)
    return [{"seed": context.seed, **row} for row in sample_rows(policy.tokenizer, rollout, nothing, nothing)]


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
