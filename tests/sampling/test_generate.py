"""Responses: their distribution, where they end, and that a row's text depends on nothing but its key and prompt."""

import dataclasses
import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from jax.extend.core import jaxprs_in_params

from rlhf_jax.core.sequences import joined
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.transformer import Transformer, empty_cache
from rlhf_jax.sampling.choice import Sampling, row_uniforms
from rlhf_jax.sampling.generate import generate
from rlhf_jax.types import PromptBatch, Rollout
from tests.support.networks import EOS, SUPPRESSED, config, padded, random_params

VOCAB = 12
POLICY = PolicyNetwork(config(n_layers=1), VOCAB, SUPPRESSED)
PARAMS = random_params(POLICY)
KEY = jax.random.key(0)
ROWS, PROMPT, LIMIT = 16, 4, 7
TEMPERATURE = 0.9


def draw_prompts(rows=ROWS, width=PROMPT):
    rng = np.random.default_rng(0)
    texts = [rng.integers(4, VOCAB, 1 + i % PROMPT).astype(np.int32) for i in range(rows)]
    tokens, mask = padded(texts, [width - len(text) for text in texts], width, filling=5)
    return PromptBatch(tokens, mask, np.arange(rows, dtype=np.int32))


def run(policy, params, prompts, key=KEY, *, limit=LIMIT, temperature=TEMPERATURE):
    prompts = PromptBatch(*map(jnp.asarray, prompts))
    return jitted(policy, limit, temperature)(params, prompts, key)


@functools.cache
def jitted(policy, limit, temperature, loop_axes=()):
    return jax.jit(
        lambda params, prompts, key: (
            generate(
                policy,
                params,
                prompts,
                key,
                Sampling(limit, temperature, (EOS,)),
                loop_axes=loop_axes,
            ).rollout
        )
    )


@functools.cache
def whole_run():
    return run(POLICY, PARAMS, draw_prompts())


def take(batch, rows):
    return type(batch)(*(np.asarray(leaf)[np.asarray(rows)] for leaf in batch))


@dataclasses.dataclass(frozen=True)
class Countdown(PolicyNetwork):
    """After token v comes v - 1, and EOS, which is 2, at last; it tells of each step."""

    told: list = dataclasses.field(default_factory=list, hash=False, compare=False)

    def start(self, params, tokens, mask, slots, room=None):
        return self._logits_after(tokens[:, -1]), empty_cache(self.config, len(tokens), slots)

    def step(self, params, tokens, cache, slot, active=None):
        jax.debug.callback(lambda tokens, slot: self.told.append((tokens.tolist(), int(slot))), tokens, slot)
        return self._logits_after(tokens), cache

    def _logits_after(self, tokens):
        return jnp.where(jnp.arange(VOCAB)[None, :] == (tokens - 1)[:, None], 0.0, -1e9)


def test_a_row_ends_with_eos_or_at_the_limit_and_the_loop_when_all_have():
    policy = Countdown(POLICY.config, VOCAB, SUPPRESSED)
    last = np.array([5, 3, 7, 6], np.int32)
    prompts = PromptBatch(last[:, None], np.ones((4, 1), bool), np.arange(4, dtype=np.int32))
    responses = [[4, 3, 2], [2], [6, 5, 4, 3, 2], [5, 4, 3, 2]]
    for limit in (8, 4):
        policy.told.clear()
        result = run(policy, {}, prompts, limit=limit)
        jax.effects_barrier()
        tokens, mask = padded([np.array(row[:limit]) for row in responses], [0] * 4, limit)
        np.testing.assert_array_equal(result.response, tokens)
        np.testing.assert_array_equal(result.response_mask, mask)
        assert result.response.dtype == jnp.int32 and result.response_mask.dtype == bool
        # As many steps as the longest response needs after its first token, each with the slot of the token given.
        expected = [(tokens[:, t].tolist(), 1 + t) for t in range(min(limit, 5) - 1)]
        assert policy.told == expected
    np.testing.assert_array_equal(result.prompt, prompts.tokens)
    np.testing.assert_array_equal(result.prompt_mask, prompts.mask)


def test_every_token_is_drawn_given_all_tokens_before_it():
    """Equal to sampling a row at a time, with the whole forward pass at each token and no cache."""
    prompts, result = draw_prompts(), whole_run()
    uniforms = np.asarray(row_uniforms(KEY, jnp.asarray(prompts.rows), LIMIT), np.float64)
    width = PROMPT + LIMIT

    @jax.jit
    def logits_after(tokens, count):
        tokens, mask = tokens[None], (jnp.arange(width) < count)[None]
        hidden: Any = Transformer(POLICY.config, VOCAB).apply({"params": PARAMS}, tokens, mask)
        return hidden[0, count - 1] @ PARAMS["embedding"].T

    for row in range(ROWS):
        text, response = prompts.tokens[row, prompts.mask[row]], []
        while len(response) < LIMIT and response[-1:] != [EOS]:
            sequence = np.array([*text, *response], np.int32)
            logits = np.array(logits_after(np.pad(sequence, (0, width - len(sequence))), len(sequence)), np.float64)
            logits[list(SUPPRESSED)] = -np.inf
            ends = np.cumsum(scipy.special.softmax(logits / TEMPERATURE))
            response.append(int(np.searchsorted(ends, uniforms[row, len(response)], side="right")))
        assert np.asarray(result.response[row, result.response_mask[row]]).tolist() == response


def test_responses_are_distributed_as_their_log_probabilities_say():
    """A chi-square test over every possible response of at most two tokens to one prompt."""
    prompt, rows = np.array([[5, 8]], np.int32), 20_000
    tokens, mask = np.tile(prompt, (rows, 1)), np.ones((rows, 2), bool)
    result = run(POLICY, PARAMS, PromptBatch(tokens, mask, np.arange(rows, dtype=np.int32)), limit=2)
    emitted = [token for token in range(VOCAB) if token not in SUPPRESSED]
    possible = [(EOS, 0), *itertools.product([token for token in emitted if token != EOS], emitted)]
    counts = [np.sum(np.all(np.asarray(result.response) == pair, axis=1)) for pair in possible]
    assert sum(counts) == rows  # and nothing else, suppressed tokens least of all

    response = np.array(possible, np.int32)
    batch = Rollout(np.tile(prompt, (len(possible), 1)), np.ones((len(possible), 2), bool), response, response != 0)
    logprobs = jax.jit(POLICY.response_stats, static_argnames="temperature")

    def p_value(temperature):
        stats = logprobs(PARAMS, joined(batch), temperature=temperature)
        probabilities = np.exp(np.where(batch.response_mask, stats.logprobs, 0).sum(axis=1, dtype=np.float64))
        np.testing.assert_allclose(probabilities.sum(), 1, rtol=1e-4)
        expected = rows * probabilities / probabilities.sum()
        common = expected > 5
        assert common.sum() > 25
        groups = [[*x[common], x[~common].sum()] for x in (np.array(counts), expected)]
        return scipy.stats.chisquare(*groups).pvalue

    assert p_value(TEMPERATURE) > 0.01
    assert p_value(1.1 * TEMPERATURE) < 1e-6


def test_responses_are_prefixes_that_vary_in_length_and_end_with_eos_unless_cut_off():
    result = whole_run()
    response, mask = np.asarray(result.response), np.asarray(result.response_mask)
    lengths = mask.sum(axis=1)
    np.testing.assert_array_equal(mask, np.arange(LIMIT) < lengths[:, None])
    assert lengths.min() >= 1 and len(set(lengths)) >= 4 and lengths.max() == LIMIT
    for row, length in zip(response, lengths, strict=True):
        assert EOS not in row[: length - 1] and not np.any(row[length:])
        assert length == LIMIT or row[length - 1] == EOS
        assert not set(row[:length].tolist()) & set(SUPPRESSED)


@pytest.mark.parametrize(
    "rows", [[9, 5, 2], np.random.default_rng(0).permutation(ROWS), [3, 3, 3]], ids=["subset", "permuted", "repeated"]
)
def test_a_rows_text_does_not_depend_on_its_batch(rows):
    part = run(POLICY, PARAMS, take(draw_prompts(), rows))
    jax.tree.map(np.testing.assert_array_equal, part, take(whole_run(), rows))


def test_a_rows_text_does_not_depend_on_padding_nor_on_the_limit():
    wide = run(POLICY, PARAMS, draw_prompts(width=PROMPT + 3))
    np.testing.assert_array_equal(wide.response, whole_run().response)
    np.testing.assert_array_equal(wide.response_mask, whole_run().response_mask)
    short = run(POLICY, PARAMS, draw_prompts(), limit=1)
    np.testing.assert_array_equal(short.response, whole_run().response[:, :1])


def test_other_rows_and_other_keys_give_other_texts():
    prompts = draw_prompts()
    moved = run(POLICY, PARAMS, prompts._replace(rows=prompts.rows + ROWS))
    other = run(POLICY, PARAMS, prompts, jax.random.key(1))
    for result in (moved, other):
        assert np.mean(np.any(np.asarray(result.response != whole_run().response), axis=1)) > 0.7


def test_a_low_temperature_takes_the_most_likely_token():
    result = run(POLICY, PARAMS, draw_prompts(), temperature=1e-4)
    stats = jax.jit(lambda params, rollout: POLICY.response_stats(params, rollout, temperature=1.0))
    stats = stats(PARAMS, joined(result))
    assert np.all(np.asarray(stats.correct)[np.asarray(result.response_mask)])


SEEDS = 2


def over_seeds(loop_axes):
    """The same prompts for several seeds, each with its own parameters and key; and these."""
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(random_params(POLICY, seed) for seed in range(SEEDS)))
    prompts = jax.tree.map(lambda leaf: jnp.stack([leaf] * SEEDS), draw_prompts())
    keys = jnp.stack([jax.random.key(10 + seed) for seed in range(SEEDS)])
    function = jitted(POLICY, LIMIT, TEMPERATURE, loop_axes)
    return jax.vmap(function, axis_name="seed"), (params, prompts, keys)


@pytest.mark.nightly
def test_seeds_under_vmap_sample_what_they_sample_alone():
    function, arguments = over_seeds(("seed",))
    together = jax.jit(function)(*arguments)
    for seed in range(SEEDS):
        alone = run(POLICY, random_params(POLICY, seed), draw_prompts(), jax.random.key(10 + seed))
        jax.tree.map(lambda a, b, seed=seed: np.testing.assert_array_equal(a[seed], b), together, alone)


def test_a_seed_that_has_ended_waits_for_the_others():
    policy = Countdown(POLICY.config, VOCAB, SUPPRESSED)
    last = jnp.array([[3, 4], [7, 3]])[..., None]
    prompts = PromptBatch(last, jnp.ones(last.shape, bool), jnp.zeros(last.shape[:2], jnp.int32))
    function = jax.vmap(jitted(policy, 8, TEMPERATURE, ("seed",)), in_axes=(None, 0, None), axis_name="seed")
    result = jax.jit(function)({}, prompts, KEY)
    np.testing.assert_array_equal(result.response_mask.sum(axis=2), last[..., 0] - 2)
    np.testing.assert_array_equal(result.response[1, 0], [6, 5, 4, 3, 2, 0, 0, 0])


@pytest.mark.parametrize("loop_axes", [("seed",), ()], ids=["reduced", "batched"])
def test_under_vmap_the_loop_has_one_predicate_and_selects_nothing_over_the_cache(loop_axes):
    function, arguments = over_seeds(loop_axes)
    loops = [equation for equation in equations(jax.make_jaxpr(function)(*arguments).jaxpr) if is_decoding(equation)]
    (loop,) = loops
    (predicate,) = loop.params["cond_jaxpr"].out_avals
    program = jax.jit(function).lower(*arguments).as_text()
    shape = next(variable.aval.shape for variable in loop.outvars if variable.aval.ndim == 5)
    assert sorted(shape) == sorted((SEEDS, ROWS, 2, PROMPT + LIMIT, 8))
    selects = re.findall(rf"stablehlo.select .*tensor<{'x'.join(map(str, shape))}xf32>", program)
    if loop_axes:
        assert predicate.shape == () and not selects
    else:  # what the reduction is for: keys and values are copied at every token
        assert predicate.shape == (SEEDS,) and len(selects) == 2


def is_decoding(equation):
    return equation.primitive.name == "while" and any(variable.aval.ndim == 5 for variable in equation.outvars)


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def test_samples_of_one_prompt_share_its_prefill_and_are_those_of_the_prompt_repeated():
    prompts, sampling = PromptBatch(*map(jnp.asarray, draw_prompts())), Sampling(LIMIT, TEMPERATURE, (EOS,))
    together = jax.jit(lambda params: generate(POLICY, params, prompts, KEY, sampling, samples=3))(PARAMS)
    repeated = PromptBatch(
        jnp.repeat(prompts.tokens, 3, axis=0), jnp.repeat(prompts.mask, 3, axis=0), jnp.arange(3 * ROWS)
    )
    apart = jax.jit(lambda params: generate(POLICY, params, repeated, KEY, sampling))(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, together.rollout, apart.rollout)
    np.testing.assert_allclose(together.logprobs, apart.logprobs, atol=1e-5)


def test_log_probabilities_are_those_that_the_whole_pass_gives():
    prompts, sampling = PromptBatch(*map(jnp.asarray, draw_prompts())), Sampling(LIMIT, TEMPERATURE, (EOS,))
    result = jax.jit(lambda params: generate(POLICY, params, prompts, KEY, sampling))(PARAMS)
    stats = jax.jit(POLICY.response_stats, static_argnames="temperature")
    mask = np.asarray(result.rollout.response_mask)
    for got, temperature in ((result.logprobs, TEMPERATURE), (result.model_logprobs, 1.0)):
        expected = stats(PARAMS, joined(result.rollout), temperature=temperature).logprobs
        np.testing.assert_allclose(got, np.where(mask, expected, 0), atol=1e-4)


def test_every_row_has_its_own_limit_and_any_stop_token_ends_it():
    prompts = PromptBatch(*map(jnp.asarray, draw_prompts()))
    limits = jnp.asarray(1 + np.arange(ROWS) % LIMIT, jnp.int32)
    free = jax.jit(lambda params: generate(POLICY, params, prompts, KEY, Sampling(LIMIT, TEMPERATURE, ())))(PARAMS)
    assert np.all(free.rollout.response_mask)
    stops = (EOS, int(free.rollout.response[0, 2]))
    sampling = Sampling(LIMIT, TEMPERATURE, stops)
    result = jax.jit(lambda params: generate(POLICY, params, prompts, KEY, sampling, limits=limits))(PARAMS)
    for row in range(ROWS):
        text = np.asarray(free.rollout.response[row]).tolist()
        ends = [t + 1 for t, token in enumerate(text) if token in stops]
        length = min([*ends, int(limits[row])])
        assert np.asarray(result.rollout.response_mask[row]).sum() == length
        assert np.asarray(result.rollout.response[row, :length]).tolist() == text[:length]


def test_the_token_that_completes_a_stop_string_ends_a_response():
    prompts, sampling = PromptBatch(*map(jnp.asarray, draw_prompts())), Sampling(LIMIT, TEMPERATURE, ())
    function = jax.jit(
        lambda params, table: generate(POLICY, params, prompts, KEY, sampling, stop_strings=table).rollout
    )
    free = np.asarray(function(PARAMS, jnp.zeros((2, VOCAB), jnp.int32)).response)
    first, second = free[0, 2:4].tolist()
    table = np.zeros((2, VOCAB), np.int32)
    table[:, first] = 1
    table[1, second] = -1
    result = function(PARAMS, jnp.asarray(table))
    lengths = []
    for row, text in enumerate(free.tolist()):
        ends = [t + 1 for t in range(1, LIMIT) if text[t - 1 : t + 1] == [first, second]]
        lengths.append(min([*ends, LIMIT]))
        assert np.asarray(result.response_mask[row]).sum() == lengths[-1]
        assert np.asarray(result.response[row, : lengths[-1]]).tolist() == text[: lengths[-1]]
    assert lengths[0] == 4 and max(lengths) == LIMIT
