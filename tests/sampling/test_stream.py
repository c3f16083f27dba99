"""Responses a token at a time: those of `generate`, by few programs for many lengths."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data.pipeline import pad_left
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.sampling import stream as streams
from rlhf_jax.sampling.batches import response_logprobs_all
from rlhf_jax.sampling.buckets import bucket, prompt_and_slots
from rlhf_jax.sampling.choice import Sampling
from rlhf_jax.sampling.generate import generate
from rlhf_jax.sampling.stream import Stream
from rlhf_jax.types import PromptBatch, Rollout
from tests.models.cases import EOS, SUPPRESSED, config, random_params

VOCAB, NEW = 12, 9
POLICY = PolicyNetwork(config(n_layers=1), VOCAB, SUPPRESSED)
PARAMS = random_params(POLICY)
KEY = jax.random.key(3)


def prompts(lengths: list[int]) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(4, VOCAB, length).tolist() for length in lengths]


def collect(stream: Stream, rows: int) -> list[list[int]]:
    responses: list[list[int]] = [[] for _ in range(rows)]
    for step in stream:
        for response, token in zip(responses, step, strict=True):
            if token is not None:
                response.append(token)
    return responses


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(NEW, 1.0, (EOS,)),
        Sampling(NEW, 0.7, (EOS, 7), top_k=6, top_p=0.9),
        Sampling(NEW, 1.3, (EOS,), min_p=0.1),
        Sampling(NEW, 0.0, ()),
    ],
)
def test_what_generate_gives_for_the_same_rows(sampling):
    asked, rows = prompts([1, 3, 40, 2, 17]), np.array([4, 0, 9, 2, 11], np.int32)
    tokens, mask = pad_left(asked, 40)
    batch = PromptBatch(jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(rows))
    whole = jax.jit(lambda params: generate(POLICY, params, batch, KEY, sampling).rollout)(PARAMS)
    expected = [np.asarray(row)[np.asarray(mask)].tolist() for row, mask in zip(*whole[2:], strict=True)]
    assert len({len(response) for response in expected}) > 1 or not sampling.stop_ids
    assert collect(Stream(POLICY, PARAMS, asked, KEY, sampling, rows=rows.tolist()), 5) == expected
    alone = collect(Stream(POLICY, PARAMS, asked[2:3], KEY, sampling, rows=[9]), 1)
    assert alone == expected[2:3]


def test_rows_end_when_they_are_told_to():
    asked, sampling = prompts([2, 3, 4]), Sampling(NEW, 1.0, ())
    whole = collect(Stream(POLICY, PARAMS, asked, KEY, sampling), 3)
    assert [len(response) for response in whole] == [NEW] * 3
    stream = Stream(POLICY, PARAMS, asked, KEY, sampling)
    steps = []
    for step in stream:
        steps.append(step)
        if len(steps) == 2:
            stream.end(1)
        if len(steps) == 4:
            stream.end(0)
            stream.end(2)
    assert len(steps) == 4  # nobody is left
    assert [row[1] for row in steps] == [*whole[1][:2], None, None]
    assert [row[2] for row in steps] == whole[2][:4]


def test_buckets_hold_what_they_are_for():
    for length in range(1, 3000):
        assert length <= bucket(length) < max(2 * length, 33)
        for new_tokens in (1, 60, 512):
            width, slots = prompt_and_slots(length, new_tokens)
            assert length <= width
            assert width + new_tokens <= slots == bucket(length + new_tokens)


def test_mixed_lengths_compile_a_handful_of_programs():
    programs: list[Any] = [streams._prefill, streams._decode, streams._choose]
    before = [program._cache_size() for program in programs]
    policy = PolicyNetwork(config(n_layers=1, d_ff=24), VOCAB, SUPPRESSED)  # no other test's
    params = random_params(policy)
    for length in range(1, 250, 6):
        for temperature in (0.0, 1.0):
            collect(Stream(policy, params, prompts([length]), KEY, Sampling(8, temperature, (EOS,))), 1)
    prefill, decode, choose = (program._cache_size() - size for program, size in zip(programs, before, strict=True))
    assert prefill <= 7
    assert decode <= 4  # 32, 64, 128, 256
    assert choose <= 2


def test_log_probabilities_are_those_of_one_row_in_any_batch():
    rng = np.random.default_rng(1)
    rollout = Rollout(
        rng.integers(4, VOCAB, (5, 6)).astype(np.int32),
        np.arange(6)[None] >= rng.integers(0, 5, 5)[:, None],
        rng.integers(4, VOCAB, (5, 4)).astype(np.int32),
        np.ones((5, 4), bool),
    )
    found = response_logprobs_all(POLICY, PARAMS, rollout, 2)
    expected = POLICY.response_stats(PARAMS, Rollout(*map(jnp.asarray, rollout)), temperature=1.0).logprobs
    np.testing.assert_allclose(found, expected, atol=1e-5)
