"""A queue of prompts through a few slots: the same texts as all at once, in fewer steps than padding to the longest."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.sampling.choice import Sampling
from rlhf_jax.sampling.continuous import generate_queue
from rlhf_jax.sampling.generate import generate
from rlhf_jax.types import PromptBatch
from tests.support.compilations import compilations
from tests.support.networks import CONFIG, EOS, POLICY, SUPPRESSED, VOCAB, padded, random_params

PROMPT, LIMIT, ROWS = 4, 9, 23
KEY = jax.random.key(3)
FAMILIES = {
    "plain": POLICY,
    "windows": PolicyNetwork(dataclasses.replace(CONFIG, windows=(3, None)), VOCAB, SUPPRESSED),
    "learned positions, grouped": PolicyNetwork(
        dataclasses.replace(CONFIG, positions="learned", context=PROMPT + LIMIT, n_kv_heads=1, norm="layer"), VOCAB, ()
    ),
}


def prompts() -> PromptBatch:
    rng = np.random.default_rng(0)
    texts = [rng.integers(4, VOCAB, 1 + i % PROMPT).astype(np.int32) for i in range(ROWS)]
    tokens, mask = padded(texts, [PROMPT - len(text) for text in texts], PROMPT, filling=5)
    return PromptBatch(jnp.asarray(tokens), jnp.asarray(mask), jnp.arange(100, 100 + ROWS, dtype=jnp.int32))


LIMITS = jnp.asarray(np.random.default_rng(1).integers(1, LIMIT + 1, ROWS), jnp.int32)


STOPS = jnp.zeros((3, VOCAB), jnp.int32).at[:2, : VOCAB // 2].set(jnp.array([[1], [2]])).at[2, : VOCAB // 2].set(-1)
"""A stop string of three tokens: any three of the first half of the vocabulary."""


@functools.cache
def all_at_once(name, sampling, samples, stops):
    policy = FAMILIES[name]
    function = jax.jit(
        lambda params: generate(
            policy,
            params,
            prompts(),
            KEY,
            sampling,
            samples=samples,
            limits=LIMITS,
            stop_strings=STOPS if stops else None,
        )
    )
    return jax.device_get(function(random_params(policy)))


@pytest.mark.nightly_rest
@pytest.mark.parametrize(
    "name, slots, refill, samples, stops",
    [
        *(("plain", *sizes, 1, False) for sizes in ((1, 1), (4, 3), (40, 2))),
        ("plain", 8, 2, 3, True),
        *((name, 4, 3, 1, False) for name in FAMILIES if name != "plain"),
    ],
)
def test_the_texts_are_those_of_all_prompts_at_once(name, slots, refill, samples, stops):
    sampling = Sampling(LIMIT, 0.9, (EOS, 7), top_k=20)
    policy = FAMILIES[name]
    more = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[:2]]), prompts())  # two that are not to be answered
    function = jax.jit(
        lambda params: generate_queue(
            policy,
            params,
            more,
            KEY,
            sampling,
            slots=slots,
            refill=refill,
            samples=samples,
            limits=jnp.pad(LIMITS, (0, 2)),
            stop_strings=STOPS if stops else None,
        )
    )
    got, _ = jax.device_get(function(random_params(policy)))
    expected = all_at_once(name, sampling, samples, stops)
    lengths = expected.rollout.response_mask.sum(axis=1)
    assert len(set(lengths)) > 4 and np.any(lengths < np.repeat(LIMITS, samples))
    assert not np.any(got.rollout.response_mask[-2 * samples :])
    got = jax.tree.map(lambda leaf: leaf[: -2 * samples], got)
    jax.tree.map(np.testing.assert_array_equal, got.rollout, expected.rollout)
    np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=1e-4)
    np.testing.assert_allclose(got.model_logprobs, expected.model_logprobs, atol=1e-4)


@pytest.mark.nightly
def test_idle_slots_stay_within_the_positions_that_there_are():
    """A slot that waits for its next prompt until the others end, longer than its model has positions."""
    policy = FAMILIES["learned positions, grouped"]
    limits = jnp.array([LIMIT, 8, 8, 8, LIMIT, LIMIT, LIMIT, LIMIT, 5, LIMIT], jnp.int32)
    tokens = jnp.asarray(np.random.default_rng(4).integers(4, VOCAB, (len(limits), PROMPT)), jnp.int32)
    full = PromptBatch(tokens, jnp.ones(tokens.shape, bool), jnp.arange(len(limits), dtype=jnp.int32))
    sampling, params = Sampling(LIMIT, 1.0, ()), random_params(policy)
    queued = jax.jit(
        lambda params: generate_queue(policy, params, full, KEY, sampling, slots=4, refill=3, limits=limits)[0]
    )
    at_once = jax.jit(lambda params: generate(policy, params, full, KEY, sampling, limits=limits))
    got, expected = jax.device_get((queued(params), at_once(params)))
    np.testing.assert_array_equal(got.rollout.response_mask, np.arange(LIMIT)[None] < np.asarray(limits)[:, None])
    np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, got.rollout, expected.rollout)


def test_slots_do_not_wait_for_the_longest():
    """Decoding steps, against those of as many batches that each wait for their longest response."""
    sampling = Sampling(LIMIT, 1.0, ())
    lengths = np.minimum(np.random.default_rng(2).geometric(0.3, ROWS), LIMIT).astype(np.int32)
    function = jax.jit(
        lambda params: generate_queue(
            POLICY, params, prompts(), KEY, sampling, slots=4, refill=1, limits=jnp.asarray(lengths)
        )
    )
    result, steps = jax.device_get(function(random_params(POLICY)))
    np.testing.assert_array_equal(result.rollout.response_mask.sum(axis=1), lengths)
    waiting = sum(lengths[i : i + 4].max() - 1 for i in range(0, ROWS, 4))
    assert steps <= np.ceil((lengths - 1).sum() / 4) + LIMIT / 2 < waiting


def test_samples_of_a_prompt_are_begun_together():
    with pytest.raises(ValueError, match="slots = 2 must be at least samples = 3"):
        generate_queue(POLICY, {}, prompts(), KEY, Sampling(LIMIT, 1.0, ()), slots=2, refill=1, samples=3)


def test_one_program_whatever_the_lengths():
    @jax.jit
    def sample(params, limits):
        sampling = Sampling(LIMIT, 1.0, (EOS,))
        return generate_queue(POLICY, params, prompts(), KEY, sampling, slots=4, refill=2, limits=limits)

    with compilations() as compiled:
        for seed in range(3):
            limits = np.random.default_rng(seed).integers(1, LIMIT + 1, ROWS)
            sample(random_params(POLICY), jnp.asarray(limits, jnp.int32))
    assert compiled["sample"] == 1
