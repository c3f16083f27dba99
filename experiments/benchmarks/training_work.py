"""Weights, tokenizer and rows of the training benchmark, and the FLOPs that an algorithm needs for them."""

import argparse
import dataclasses
import json
import math
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from experiments.benchmarks import generation
from experiments.benchmarks.training_turns import Work
from rlhf_jax.data import pipeline
from rlhf_jax.data.rows import limited, load_rows
from rlhf_jax.loading.export import export
from rlhf_jax.loading.models import Policy, as_reward_model
from rlhf_jax.models.model_config import ModelConfig
from rlhf_jax.text.hf_tokenizer import as_pretrained
from rlhf_jax.text.tokenizer import SPECIAL_TOKENS, UNKNOWN, TokenizerConfig, TrainedTokenizer, train_tokenizer
from rlhf_jax.types import RlhfError

CONSTANT = 100.0
"""Value of the first channel of the embeddings."""

BPE_VOCABULARY = 4096


class Passes(NamedTuple):
    """Passes over a sequence, in units of a forward pass."""

    body: int
    head: int  # at the response tokens


PASSES = {
    "sft": Passes(body=3, head=3),
    "reward_model": Passes(body=3, head=0),
    "dpo": Passes(body=4, head=4),  # 3 of the policy, 1 of the reference
    "kto": Passes(body=6, head=6),  # as DPO, and 1 of each on the mismatched pairs of the KL estimate
    # Sampling, old policy, reference, and 3 of the update; also the reward, the old values, and 3 of their update.
    "ppo": Passes(body=11, head=6),
    "grpo": Passes(body=5, head=5),  # sampling, reference, update; with one update, the old policy is the policy
}
ONLINE = ("ppo", "grpo")


class Pair(NamedTuple):
    """Token ids of a preference pair, and the text of its prompt."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    text: str


class Prepared(NamedTuple):
    """Files for both sides, and the (prompt, response) lengths of all sequences of an epoch."""

    work: Work
    config: ModelConfig
    vocab_size: int
    lengths: list[tuple[float, float]]  # of responses that are sampled: the mean of prompts, and 0


def prepare(kind: str, shape: str, args: argparse.Namespace, directory: Path) -> Prepared:
    """Write weights, tokenizer and rows."""
    model = generation.load(shape, None, "float32", "xla")
    vocab_size = model.policy.vocab_size
    unit = {"kto": args.batch // 2, "grpo": args.batch // args.group}.get(kind, args.batch)  # pairs per step
    if args.data is None:
        tokenizer = word_tokenizer(vocab_size)
        rows = random_rows(args.rows or 4 * unit, vocab_size, args.prompt, args.response)
    else:
        rows = load_rows(args.data)
        if "chosen" not in rows[0]:
            raise RlhfError(f"--data={args.data} has no preference pairs: give a file with prompt, chosen and rejected")
        tokenizer = train_tokenizer(
            TokenizerConfig("byte_bpe", min(vocab_size, BPE_VOCABULARY)), pipeline.training_texts(rows)
        )
        random.Random(0).shuffle(rows)
        rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows[: args.rows]]
    steps = len(rows) // unit
    if not steps:
        raise RlhfError(f"{len(rows)} pairs do not fill a batch of {args.batch}: lower --batch or raise --rows")
    rows = rows[: steps * unit]
    write_lines(directory / "train.jsonl", rows)
    write_lines(directory / "eval.jsonl", rows[:unit])
    pairs = encode(rows, tokenizer, args)
    write_lines(directory / "ids.jsonl", [pair._asdict() for pair in pairs])

    network = dataclasses.replace(model.policy, suppressed=tokenizer.suppressed)
    policy = Policy(network, model.params, as_pretrained(tokenizer), model.hf_config)
    policy = with_lengths(policy, None if args.data is None else args.response / 2)
    work = Work(
        kind=kind,
        policy=str(export(policy, directory / "policy")),
        reward_model=str(export(as_reward_model(policy, jax.random.key(1)), directory / "reward_model")),
        train=str(directory / "train.jsonl"),
        eval=str(directory / "eval.jsonl"),
        ids=str(directory / "ids.jsonl"),
        batch=args.batch,
        group=args.group,
        prompt=args.prompt,
        response=args.response,
        steps=steps,
        rounds=args.rounds,
        threads=args.threads,
    )
    return Prepared(work, network.config, vocab_size, lengths_of(work, pairs))


def word_tokenizer(vocab_size: int) -> TrainedTokenizer:
    """Tokenizer of random rows, whose texts are words t4, t5, ..."""
    vocabulary = {token: i for i, token in enumerate(SPECIAL_TOKENS)}
    vocabulary |= {f"t{i}": i for i in range(len(vocabulary), vocab_size)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return TrainedTokenizer(backend)


def random_rows(count: int, vocab_size: int, prompt: int, response: int) -> list[dict[str, str]]:
    """Random pairs whose prompts with BOS, and responses with EOS, have these numbers of tokens."""
    draw = np.random.default_rng(0)

    def text(length: int) -> str:
        return " ".join(f"t{i}" for i in draw.integers(len(SPECIAL_TOKENS), vocab_size, length))

    sides = ("chosen", "rejected")
    return [{"prompt": text(prompt - 1)} | {side: " " + text(response - 1) for side in sides} for _ in range(count)]


def encode(rows: list[dict[str, str]], tokenizer: TrainedTokenizer, args: argparse.Namespace) -> list[Pair]:
    """Encode pairs as our stages do."""
    prompts, config = [row["prompt"] for row in rows], limited(args.prompt, args.response)
    chosen, rejected = (
        pipeline.tokenise(prompts, [row[side] for row in rows], tokenizer, config) for side in ("chosen", "rejected")
    )
    return [
        Pair(one.prompt, one.response, other.response, text)
        for one, other, text in zip(chosen, rejected, prompts, strict=True)
    ]


def lengths_of(work: Work, pairs: list[Pair]) -> list[tuple[float, float]]:
    """Lengths of prompt and response of all sequences of an epoch; sampled responses count as 0."""
    if work.kind in ONLINE:
        return [(statistics.mean(len(pair.prompt) for pair in pairs), 0)] * (work.batch * work.steps)
    sides = ("chosen",) if work.kind == "sft" else ("chosen", "rejected")
    return [(len(pair.prompt), len(getattr(pair, side))) for pair in pairs for side in sides]


def with_lengths(policy: Policy, mean: float | None) -> Policy:
    """Give EOS the probability 1 / mean at every position, or almost none; pad, BOS and unknown have almost none.

    A large first channel of the embeddings is nearly constant after the final norm, so that differences between tied
    embeddings there are differences between logits.
    """
    embedding, eos_id, never = policy.params["embedding"], policy.tokenizer.eos_id, policy.tokenizer.suppressed
    vocab_size = len(embedding)
    logits = jnp.zeros(vocab_size).at[jnp.array([eos_id, *never])].set(-20)
    if mean is not None:
        logits = logits.at[eos_id].set(math.log((vocab_size - len(never) - 1) / (mean - 1)))
    params = {**policy.params, "embedding": embedding.at[:, 0].set(CONSTANT)}
    tokens = jax.random.randint(jax.random.key(0), (1, 64), 0, vocab_size)
    channel = jnp.mean(policy.network.apply(params, tokens, jnp.ones(tokens.shape, bool))[..., 0])
    return policy._replace(params={**params, "embedding": embedding.at[:, 0].set(CONSTANT + logits / channel)})


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def model_flops(kind: str, config: ModelConfig, vocab_size: int, lengths: Sequence[tuple[float, float]]) -> float:
    """FLOPs that an algorithm needs for sequences of these (prompt, response) lengths; see the module's docstring."""
    heads = config.n_heads * config.head_width
    attention = 2 * config.d_model * (heads + config.kv_heads * config.head_width)
    weights = config.n_layers * (attention + 3 * config.d_model * config.d_ff)
    passes, flops = PASSES[kind], 0.0
    for prompt, response in lengths:
        tokens = prompt + response
        flops += passes.body * (2 * tokens * weights + 2 * tokens**2 * config.n_layers * heads)
        flops += passes.head * 2 * response * config.d_model * vocab_size
    return flops
