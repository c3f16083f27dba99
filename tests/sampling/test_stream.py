"""Responses a token at a time: those of `generate`, by few programs for many lengths."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.core.sequences import joined
from rlhf_jax.data.padding import pad_left
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.sampling import stream as streams
from rlhf_jax.sampling.batches import response_logprobs_all
from rlhf_jax.sampling.buckets import bucket
from rlhf_jax.sampling.choice import Sampling
from rlhf_jax.sampling.generate import generate
from rlhf_jax.sampling.stream import Stream
from rlhf_jax.types import PromptBatch, Rollout
from tests.support.compilations import compilations
from tests.support.networks import EOS, SUPPRESSED, config, random_params

VOCAB, NEW = 12, 9
POLICY = PolicyNetwork(config(n_layers=1), VOCAB, SUPPRESSED)
PARAMS = random_params(POLICY)
KEY = jax.random.key(3)


def prompts(lengths: list[int]) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(4, VOCAB, length).tolist() for length in lengths]


@pytest.mark.nightly_rest
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
    stream = Stream(POLICY, PARAMS)
    found = [
        list(stream.respond(prompt, KEY, sampling, row=row)) for prompt, row in zip(asked, rows.tolist(), strict=True)
    ]
    assert found == expected


@pytest.mark.nightly_rest
@pytest.mark.parametrize("windows", [(None,), (5,)])
def test_a_conversation_is_read_on_where_it_goes_on(windows, monkeypatch):
    policy = PolicyNetwork(config(n_layers=1, windows=windows), VOCAB, SUPPRESSED)
    params, sampling = random_params(policy), Sampling(NEW, 0.0, ())
    read, extend = [], streams.extend

    def recorded(policy, params, tokens, mask, cache, kept):
        read.append((int(kept), int(mask.sum()), tokens.shape[1], cache.positions.shape[1]))
        return extend(policy, params, tokens, mask, cache, kept)

    monkeypatch.setattr(streams, "extend", recorded)
    (first, second, third, other), stream = prompts([30, 8, 34, 3]), Stream(policy, params)

    def answers(prompt: list[int], tokens: int = NEW) -> list[int]:
        alone = list(Stream(policy, params).respond(prompt, KEY, sampling, row=0))
        read.pop()
        assert [*itertools.islice(stream.respond(prompt, KEY, sampling, row=0), tokens)] == alone[:tokens]
        return alone[:tokens]

    turns = [first]
    turns.append([*turns[-1], *answers(turns[-1]), *second])
    turns.append([*turns[-1], *answers(turns[-1], tokens=4), *third])  # the second answer was not read to its end
    turns.append([*turns[-1], *answers(turns[-1])])
    answers(turns[-1])
    answers([*turns[-1][:35], *other])  # what was said is said otherwise; back in a smaller cache
    # 38 tokens are known to the second turn; its padding fits only where some of them are read again.
    assert read == [(0, 30, 32, 64), (32, 15, 32, 64), (0, 85, 128, 128), (93, 1, 32, 128), (0, 38, 64, 64)]


def test_buckets_hold_what_they_are_for():
    for length in range(1, 3000):
        assert length <= bucket(length) < max(2 * length, 33)


def test_mixed_lengths_compile_a_handful_of_programs():
    policy = PolicyNetwork(config(n_layers=1, d_ff=24), VOCAB, SUPPRESSED)  # no other test's
    stream = Stream(policy, random_params(policy))
    with compilations() as compiled:
        for length in range(1, 250, 6):
            for temperature in (0.0, 1.0):
                list(stream.respond(prompts([length])[0], KEY, Sampling(8, temperature, (EOS,)), row=0))
    assert 0 < compiled["extend"] <= 7
    assert 0 < compiled["decode_token"] <= 4  # 32, 64, 128, 256
    assert compiled["choose_token"] <= 2


@pytest.mark.nightly
def test_log_probabilities_are_those_of_one_row_in_any_batch():
    rng = np.random.default_rng(1)
    rollout = Rollout(
        rng.integers(4, VOCAB, (5, 6)).astype(np.int32),
        np.arange(6)[None] >= rng.integers(0, 5, 5)[:, None],
        rng.integers(4, VOCAB, (5, 4)).astype(np.int32),
        np.ones((5, 4), bool),
    )
    found = response_logprobs_all(POLICY, PARAMS, rollout, 2)
    expected = POLICY.response_stats(PARAMS, joined(Rollout(*map(jnp.asarray, rollout))), temperature=1.0).logprobs
    np.testing.assert_allclose(found, expected, atol=1e-5)
