"""Scores and values, by hand from the transformer's hidden states of single unpadded rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.core.sequences import joined
from rlhf_jax.models.scalars import ScalarNetwork
from rlhf_jax.models.transformer import Transformer
from tests.support.networks import CONFIG, VOCAB, config, random_params, random_tokens, rollout, uneven_rollout

MEAN, LAST = ScalarNetwork(CONFIG, VOCAB, "mean"), ScalarNetwork(CONFIG, VOCAB, "last")
PARAMS = random_params(MEAN)


@functools.partial(jax.jit, static_argnums=0)
def scores(network, params, batch):
    return network.scores(params, joined(batch))


@functools.partial(jax.jit, static_argnums=0)
def values(network, params, batch):
    return network.values(params, joined(batch))


@jax.jit
def body(params, tokens):
    return Transformer(CONFIG, VOCAB).apply({"params": params["body"]}, tokens, jnp.ones_like(tokens, bool))


def unit_by_hand(batch, row):
    """The linear unit at every token of one row, as float64: of the prompt's, and of the response's."""
    prompt, response = (np.asarray(x)[row] for x in (batch.prompt, batch.response))
    prompt, response = prompt[batch.prompt_mask[row]], response[batch.response_mask[row]]
    padding = np.zeros(9 - len(prompt) - len(response), np.int32)  # behind all: one shape, compiled once
    hidden = body(PARAMS, np.concatenate([prompt, response, padding])[None])[0]
    unit = np.asarray(hidden, np.float64) @ np.asarray(PARAMS["head"]["kernel"])[:, 0] + float(
        PARAMS["head"]["bias"][0]
    )
    return unit[: len(prompt)], unit[len(prompt) : len(prompt) + len(response)]


@pytest.mark.parametrize("network", [MEAN, LAST], ids=["mean", "last"])
def test_a_score_is_read_from_all_tokens_or_from_the_last(network):
    batch = uneven_rollout(filling=9)
    got = scores(network, PARAMS, batch)
    for row in range(4):
        unit = np.concatenate(unit_by_hand(batch, row))  # the mean of a linear unit is the unit of the mean
        np.testing.assert_allclose(got[row], unit.mean() if network is MEAN else unit[-1], rtol=1e-4, atol=1e-5)


def test_a_value_is_that_of_the_state_before_the_token():
    batch = uneven_rollout(filling=9)
    got = np.asarray(values(MEAN, PARAMS, batch))
    for row in range(4):
        of_prompt, of_response = unit_by_hand(batch, row)
        expected = np.append(of_prompt[-1], of_response[:-1])
        np.testing.assert_allclose(got[row, : len(expected)], expected, rtol=1e-4, atol=1e-5)


def test_a_value_knows_no_token_from_its_own_on():
    prompt, response = random_tokens(0, 3), random_tokens(1, 5)
    changed = [np.append(response[:t], random_tokens(2, 5 - t)) for t in range(5)]
    assert all(np.all(row[t:] != response[t:]) for t, row in enumerate(changed))
    got = np.asarray(values(MEAN, PARAMS, rollout([prompt] * 6, [response, *changed])))
    moved = np.abs(got[1:] - got[0])  # [first changed token, value]
    np.testing.assert_allclose(moved[np.tril_indices(5)], 0, atol=1e-6)
    assert np.all(moved[np.triu_indices(5, 1)] > 1e-3)


def test_a_value_function_starts_as_the_reward_models_body_and_says_0():
    params = MEAN.init_value(PARAMS)
    assert jax.tree.structure(params) == jax.tree.structure(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, params["body"], PARAMS["body"])
    np.testing.assert_array_equal(values(MEAN, params, uneven_rollout()), 0)
    # And can be learnt: the head has a gradient.
    grads = jax.jit(jax.grad(lambda params: jnp.sum(values(MEAN, params, uneven_rollout()))))(params)
    assert np.all(grads["head"]["kernel"] != 0)


def test_padding_is_inert():
    @jax.jit
    def evaluate(batch):
        def loss(params):
            of_tokens = jnp.where(batch.response_mask, MEAN.values(params, joined(batch)), 0)[:, :5]
            out = MEAN.scores(params, joined(batch)), LAST.scores(params, joined(batch)), of_tokens
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in out), out

        return jax.grad(loss, has_aux=True)(PARAMS)

    grads, out = evaluate(uneven_rollout())
    other_grads, other_out = evaluate(uneven_rollout(filling=VOCAB - 1))
    jax.tree.map(np.testing.assert_array_equal, (grads, out), (other_grads, other_out))

    narrow = uneven_rollout()
    wide = type(narrow)(
        *(np.pad(x, ((0, 0), (3, 0))) for x in narrow[:2]), *(np.pad(x, ((0, 0), (0, 2))) for x in narrow[2:])
    )
    wide_grads, wide_out = evaluate(wide)
    for got, expected in zip(jax.tree.leaves((wide_grads, wide_out)), jax.tree.leaves((grads, out)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


def test_permuting_rows_permutes_scores_and_values():
    batch, order = uneven_rollout(), np.array([2, 0, 3, 1])
    permuted = type(batch)(*(leaf[order] for leaf in batch))
    for function, network in ((scores, MEAN), (scores, LAST), (values, MEAN)):
        np.testing.assert_allclose(
            function(network, PARAMS, permuted), function(network, PARAMS, batch)[order], rtol=1e-5, atol=1e-6
        )


def test_the_head_starts_as_in_stiennon_et_al():
    params = jax.jit(ScalarNetwork(config(d_model=1024, n_heads=1, n_layers=1, d_ff=1), 2, "mean").init)(
        jax.random.key(0)
    )
    np.testing.assert_allclose(np.std(params["head"]["kernel"]), 1025**-0.5, rtol=0.1)
    np.testing.assert_array_equal(params["head"]["bias"], 0)
