"""Any number of rows through functions of fixed batches: the batch size changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.core.sequences import joined
from rlhf_jax.data.ragged import Ragged, token_table
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.scalars import ScalarNetwork
from rlhf_jax.sampling import batches
from rlhf_jax.sampling.choice import Sampling
from rlhf_jax.sampling.generate import generate
from rlhf_jax.types import PromptBatch, Rollout, TokenBatch
from tests.support.compilations import compilations
from tests.support.networks import EOS, SUPPRESSED, config, padded, random_params, random_tokens

VOCAB, SHAPE = 12, config(n_layers=1)
POLICY = PolicyNetwork(SHAPE, VOCAB, SUPPRESSED)
PARAMS, OTHER = random_params(POLICY), random_params(POLICY, 1)
ROWS, LIMIT = 7, 5
SAMPLING = Sampling(LIMIT, 0.9, (EOS,))


def draw(seed=0, rows=ROWS):
    """Rows of three prompt tokens and five of response, of which any number is padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(4, VOCAB, (rows, 8)).astype(np.int32)
    prompt_lengths, lengths = rng.integers(1, 4, rows), rng.integers(1, LIMIT + 1, rows)
    prompt_mask = np.arange(3)[::-1] < prompt_lengths[:, None]
    mask = np.arange(LIMIT) < lengths[:, None]
    tokens[np.arange(rows), 2 + lengths] = EOS
    return Rollout(tokens[:, :3], prompt_mask, tokens[:, 3:], mask)


@pytest.mark.parametrize("batch_size", [1, 3, ROWS, 10])
def test_map_batches_gives_every_row_once_and_in_order(batch_size):
    seen = []

    def function(batch):
        seen.append(batch["x"])
        return {"double": jnp.asarray(2 * batch["x"]), "sum": (jnp.asarray(batch["x"].sum(axis=1) + batch["y"]),)}

    x, y = np.arange(ROWS * 2).reshape(ROWS, 2).astype(np.int32), np.arange(ROWS, dtype=np.int32)
    result = batches.map_batches(function, {"x": x, "y": y}, batch_size)
    np.testing.assert_array_equal(result["double"], 2 * x)
    np.testing.assert_array_equal(result["sum"][0], x.sum(axis=1) + y)
    assert isinstance(result["double"], np.ndarray)
    assert [len(batch) for batch in seen] == [batch_size] * -(-ROWS // batch_size)  # one shape, compiled once
    assert np.all(seen[-1][(ROWS - 1) % batch_size :] == x[-1])


def sample_all(batch_size, samples=3, seed=0):
    prompts = padded([np.array(text, np.int32) for text in ([5, 6], [7], [8, 9, 10])], [1, 2, 0], 3)
    key = jax.random.key(seed)
    return batches.sample_all(POLICY, PARAMS, prompts, key, SAMPLING, samples=samples, batch_size=batch_size)


def test_samples_are_grouped_by_prompt_and_drawn_by_their_number_whatever_the_batch_size():
    rollout = sample_all(batch_size=4)
    assert rollout.response.shape == (9, LIMIT) and isinstance(rollout.response, np.ndarray)
    np.testing.assert_array_equal(rollout.prompt[:, -1], [6, 6, 6, 7, 7, 7, 10, 10, 10])
    jax.tree.map(np.testing.assert_array_equal, sample_all(batch_size=9), rollout)
    prompts = PromptBatch(*map(jnp.asarray, (rollout.prompt, rollout.prompt_mask, np.arange(9, dtype=np.int32))))
    at_once = jax.jit(lambda params, prompts, key: generate(POLICY, params, prompts, key, SAMPLING).rollout)
    jax.tree.map(np.testing.assert_array_equal, at_once(PARAMS, prompts, jax.random.key(0)), rollout)
    for group in np.split(rollout.response, 3):
        assert len(np.unique(group, axis=0)) > 1
    assert np.any(sample_all(batch_size=4, seed=1).response != rollout.response)


@pytest.mark.nightly_rest
@pytest.mark.parametrize("eos", [EOS, None], ids=["batches", "queue"])
def test_prompts_are_sampled_longest_first_at_the_width_of_their_batch_and_returned_in_order(eos):
    lengths, width = [40, 3, 70, 33, 10], 72
    prompts = padded([4 + random_tokens(n, n) % (VOCAB - 4) for n in lengths], [width - n for n in lengths], width)
    limits = np.array([1, 3, LIMIT, LIMIT, 2]) if eos is None else np.full(5, LIMIT)  # the first batch is uneven
    sampling, key = Sampling(LIMIT, 0.9, () if eos is None else (eos,)), jax.random.key(0)
    with compilations() as counts:
        found = batches.sample_all(POLICY, PARAMS, prompts, key, sampling, samples=2, batch_size=4, limits=limits)
    # Widths of 72 (70 and 40 tokens), 64 (33 and 10) and 32 (3); the rest of an uneven one is one queue.
    assert (counts["generate_batch"], counts["sample_queue"]) == ((1, 1) if eos is None else (3, 0))
    padded_batch = PromptBatch(*map(jnp.asarray, (*prompts, np.arange(5, dtype=np.int32))))
    options = {"samples": 2, "limits": jnp.asarray(limits, jnp.int32)}
    at_once = jax.jit(lambda params, prompts: generate(POLICY, params, prompts, key, sampling, **options).rollout)
    jax.tree.map(np.testing.assert_array_equal, at_once(PARAMS, padded_batch), found)


@pytest.mark.nightly
def test_where_lengths_are_uneven_the_rest_goes_through_a_queue_and_nothing_else_changes(monkeypatch):
    rng, samples = np.random.default_rng(0), 3
    prompts = padded(
        [rng.integers(4, VOCAB, 1 + i % 3).astype(np.int32) for i in range(17)], [2 - i % 3 for i in range(17)], 3
    )
    limits = 1 + (LIMIT - 1) * (np.arange(17) // 3 % 2)  # uneven among the longest prompts, which are sampled first
    queued, run = [], batches.sample_queue
    monkeypatch.setattr(batches, "sample_queue", lambda *args: queued.append(len(args[2].rows)) or run(*args))
    monkeypatch.setattr(batches, "QUEUE", 2)

    def sampled(batch_size=8, limits=limits, first=0):
        part, key, sampling = (prompts[0][first:], prompts[1][first:]), jax.random.key(1), Sampling(LIMIT, 0.9, ())
        sizes = {"samples": samples, "batch_size": batch_size, "first": first}
        return batches.sample_all(POLICY, PARAMS, part, key, sampling, limits=limits[first:], **sizes)

    found = sampled()
    assert queued == [4] * 4  # prompts, of 15 that are left; the same program for all
    np.testing.assert_array_equal(found.response_mask.sum(axis=1), np.repeat(limits, samples))
    queued.clear()
    jax.tree.map(np.testing.assert_array_equal, sampled(batch_size=100), found)
    later = jax.tree.map(lambda leaf: leaf[samples * 5 :], found)
    jax.tree.map(np.testing.assert_array_equal, sampled(first=5), later)
    # Samples of a prompt that do not fit into a batch.
    jax.tree.map(np.testing.assert_array_equal, sampled(batch_size=2), found)
    queued.clear()
    even = sampled(limits=np.full(17, LIMIT))
    assert not queued and np.all(even.response_mask)


def test_sequence_kl_and_k3_are_sums_over_the_response_of_functions_of_the_difference_of_logprobs():
    rollout, temperature = draw(), 0.8
    got = batches.sequence_kl(POLICY, PARAMS, (POLICY, OTHER), rollout, batch_size=3, temperature=temperature)
    both = batches.sequence_divergences(POLICY, PARAMS, (POLICY, OTHER), rollout, batch_size=3, temperature=temperature)
    np.testing.assert_array_equal(both.k1, got)
    stats = jax.jit(
        lambda params: POLICY.response_stats(params, joined(as_jax(rollout)), temperature=temperature).logprobs
    )
    own, reference = (np.asarray(stats(params), np.float64) for params in (PARAMS, OTHER))
    for row in range(ROWS):
        length = rollout.response_mask[row].sum()
        assert rollout.response[row, length - 1] == EOS
        ratios = reference[row, :length] - own[row, :length]
        np.testing.assert_allclose(got[row], -ratios.sum(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(both.k3[row], (np.exp(ratios) - 1 - ratios).sum(), rtol=1e-4, atol=1e-5)
    assert got.dtype == np.float32 and np.std(got) > 0.1
    itself = batches.sequence_kl(POLICY, PARAMS, (POLICY, PARAMS), rollout, batch_size=3, temperature=temperature)
    np.testing.assert_array_equal(itself, 0)


def test_sequence_kl_is_not_changed_by_padding():
    rollout = draw()
    filled = rollout._replace(response=np.where(rollout.response_mask, rollout.response, 11).astype(np.int32))
    kl, other = (
        batches.sequence_divergences(POLICY, PARAMS, (POLICY, OTHER), x, batch_size=3, temperature=0.8)
        for x in (rollout, filled)
    )
    jax.tree.map(np.testing.assert_array_equal, kl, other)


def as_jax(batch):
    return jax.tree.map(jnp.asarray, batch)


def test_scores_and_statistics_are_those_of_the_networks():
    rollout = draw()
    network = ScalarNetwork(SHAPE, VOCAB, "last")
    params = random_params(network)
    expected = jax.jit(network.scores)(params, joined(rollout))
    np.testing.assert_allclose(batches.score_all(network, params, rollout, 3), expected, rtol=1e-5, atol=1e-5)

    mask, lengths = rollout.response_mask, rollout.response_mask.sum(axis=1)
    sequences = TokenBatch(rollout.response, mask, mask & (rollout.response != EOS))
    stats = jax.jit(POLICY.sequence_stats)(PARAMS, as_jax(sequences))
    trained = sequences.loss_mask[:, 1:]
    table = token_table(
        Ragged(rollout.response[mask], np.cumsum(lengths)), Ragged(sequences.loss_mask[mask], np.cumsum(lengths))
    )
    sums = batches.sequence_sums(POLICY, PARAMS, table, 3)
    np.testing.assert_allclose(sums.nll, -np.where(trained, stats.logprobs, 0).sum(axis=1), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(sums.correct, (np.asarray(stats.correct) & trained).sum(axis=1))
    np.testing.assert_array_equal(sums.tokens, trained.sum(axis=1))
