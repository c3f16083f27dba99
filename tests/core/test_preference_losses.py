"""Every preference loss against its formula, written out in float64 for one pair after another, and common properties.

Those that TRL has are held against TRL as well, with their gradients: see tests/support/against_trl.py.
"""

import functools
import math
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from rlhf_jax.core import divergences, reference_free_losses
from rlhf_jax.core import logprobs as token_logprobs
from rlhf_jax.methods.preference_table import LOSSES, PreferenceLossConfig
from tests.support.padded_arrays import (
    ROWS,
    WIDTH,
    assert_padding_is_inert,
    normal,
    prefix_mask,
    row_lengths,
    seeds,
    with_values,
)
from tests.support.pairs import loss_of

OF_MARGINS = ("aot", "alpha_dpo")  # read margins of each model, not log-ratios
PAIRS, BETA, EPSILON, GAMMA, ALPHA, TAU, LAMBDA, SHAPE = 6, 0.3, 0.1, 0.4, 0.6, 0.2, 0.7, 0.05
OPTIONS: dict[str, Any] = {
    "label_smoothing": EPSILON,
    "simpo_gamma": GAMMA,
    "cpo_alpha": ALPHA,
    "discopop_tau": TAU,
    "dpop_lambda": LAMBDA,
    "alpha_dpo_alpha": ALPHA,
    "alphapo_alpha": SHAPE,
}
SMOOTHED = ("cdpo", "robust", "exo_pair", "aot", "aot_unpaired", "cpo", "simpo")
READ = {**{name: ["label_smoothing"] for name in SMOOTHED}, "discopop": ["discopop_tau"]}
READ |= {"dpop": ["dpop_lambda"], "alpha_dpo": ["label_smoothing", "simpo_gamma", "alpha_dpo_alpha"]}
READ["alphapo"] = ["label_smoothing", "simpo_gamma", "alphapo_alpha"]
READ |= {"simpo": ["label_smoothing", "simpo_gamma"], "cpo": ["label_smoothing", "cpo_alpha"]}
CONFIGS = {
    name: PreferenceLossConfig(losses=(name,), **{option: OPTIONS[option] for option in READ.get(name, ())})
    for name in LOSSES
}


def every_loss(logprobs, tokens):
    """Loss and metrics, and gradients by the four log-probabilities, of every one, in NumPy."""
    return jax.device_get(_every_loss(logprobs, tokens))


@jax.jit  # one program for all of them
def _every_loss(logprobs, tokens):

    def loss(logprobs, config):
        return with_values(loss_of)(config, logprobs, tokens, beta=BETA)

    return {name: jax.value_and_grad(loss, has_aux=True)(logprobs, config) for name, config in CONFIGS.items()}


def case(seed):
    """Log-probabilities of chosen and rejected responses under the policy, then under the reference; their lengths."""
    rng = np.random.default_rng(seed)
    tokens = tuple(jnp.asarray(rng.integers(1, 30, PAIRS), jnp.int32) for _ in range(2))
    return tuple(-20 + 5 * normal(seed + i, PAIRS) for i in range(4)), tokens


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def smoothed(margin):
    return -(1 - EPSILON) * log_sigmoid(margin) - EPSILON * log_sigmoid(-margin)


def odds(logprob):
    return math.exp(logprob) / (1 - math.exp(logprob))


def of_pair(name, w, l, ref_w, ref_l, n_w, n_l, n_mean):  # noqa: E741
    """One pair's loss, as its paper has it: w and l are the winner and the loser."""
    rho_w, rho_l = w - ref_w, l - ref_l
    m = BETA * (rho_w - rho_l)
    formulas = {
        "sigmoid": lambda: math.log1p(math.exp(-m)),
        "cdpo": lambda: smoothed(m),
        "robust": lambda: (
            ((1 - EPSILON) * math.log1p(math.exp(-m)) - EPSILON * math.log1p(math.exp(m))) / (1 - 2 * EPSILON)
        ),
        "hinge": lambda: max(0.0, 1 - m),
        "ipo": lambda: (rho_w / n_w - rho_l / n_l - 1 / (2 * BETA)) ** 2,
        "sigmoid_norm": lambda: -log_sigmoid(BETA * (rho_w / n_w - rho_l / n_l)),
        "exo_pair": lambda: (
            sigmoid(m) * math.log(sigmoid(m) / (1 - EPSILON)) + sigmoid(-m) * math.log(sigmoid(-m) / EPSILON)
        ),
        "nca_pair": lambda: (
            -log_sigmoid(BETA * rho_w) - log_sigmoid(-BETA * rho_w) / 2 - log_sigmoid(-BETA * rho_l) / 2
        ),
        "bco_pair": lambda: -log_sigmoid(BETA * rho_w) - log_sigmoid(-BETA * rho_l),
        "sppo_hard": lambda: (rho_w - 1 / BETA * (1 - 0.5)) ** 2 + (rho_l - 1 / BETA * (0 - 0.5)) ** 2,
        "apo_zero": lambda: 1 - sigmoid(BETA * rho_w) + sigmoid(BETA * rho_l),
        "apo_down": lambda: sigmoid(BETA * rho_w) + 1 - sigmoid(m),
        "discopop": lambda: -log_sigmoid(m) * (1 - sigmoid(m / TAU)) + math.exp(-m) * sigmoid(m / TAU),
        "dpop": lambda: -log_sigmoid(m - BETA * LAMBDA * max(0.0, -rho_w)),
        "sft": lambda: -w / n_mean,
        "cpo": lambda: smoothed(BETA * (w - l)) - ALPHA * w / n_mean,
        "simpo": lambda: smoothed(BETA * (w / n_w - l / n_l) - GAMMA),
        "alphapo": lambda: smoothed(BETA * (math.exp(-SHAPE * l / n_l) - math.exp(-SHAPE * w / n_w)) / SHAPE - GAMMA),
        "orpo": lambda: -w / n_mean - BETA * log_sigmoid(math.log(odds(w / n_w) / odds(l / n_l))),
    }
    return formulas[name]()


def slowly(name, logprobs, tokens, constant=None):
    """Args: constant are the log-probabilities of terms without a gradient; None: logprobs."""
    w, l, ref_w, ref_l = (np.asarray(x, np.float64) for x in logprobs)  # noqa: E741
    n_w, n_l = (np.asarray(x, np.float64) for x in tokens)
    if name == "alpha_dpo":
        c_w, c_l, c_ref_w, c_ref_l = (np.asarray(x, np.float64) for x in constant or logprobs)
        gaps = (c_w - c_ref_w) / n_w - (c_l - c_ref_l) / n_l
        z = (gaps - gaps.mean()) / gaps.std(ddof=1)
        return np.mean([smoothed(BETA * x - GAMMA) for x in w / n_w - l / n_l - ALPHA * z])
    if name == "aot":
        return np.mean([smoothed(BETA * x) for x in np.sort(w - l) - np.sort(ref_w - ref_l)])
    if name == "aot_unpaired":
        return np.mean([smoothed(BETA * x) for x in np.sort(w - ref_w) - np.sort(l - ref_l)])
    means = np.full(len(w), np.mean(n_w))
    return np.mean([of_pair(name, *row) for row in zip(w, l, ref_w, ref_l, n_w, n_l, means, strict=True)])


@given(seeds)
def test_every_loss_is_its_formula(seed):
    logprobs, tokens = case(seed)
    for name, ((loss, _), _) in every_loss(logprobs, tokens).items():
        np.testing.assert_allclose(loss, slowly(name, logprobs, tokens), rtol=1e-4, atol=1e-5, err_msg=name)


@given(seeds)
def test_every_gradient_is_that_of_its_formula(seed):
    logprobs, tokens = case(seed)
    direction = np.random.default_rng(seed).normal(size=(4, PAIRS))
    for name, (_, grads) in every_loss(logprobs, tokens).items():
        by_differences = [
            slowly(
                name,
                [np.asarray(x, np.float64) + h * d for x, d in zip(logprobs, direction, strict=True)],
                tokens,
                constant=logprobs,
            )
            for h in (1e-6, -1e-6)
        ]
        expected = (by_differences[0] - by_differences[1]) / 2e-6
        np.testing.assert_allclose(np.sum(direction * np.stack(grads)), expected, rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("seed", range(5))
def test_shifts_cancel_where_they_must_and_nowhere_else(seed):
    """A number for each pair: added to policy and reference it says nothing, nor to both responses in a difference."""
    (w, l, ref_w, ref_l), tokens = case(seed)  # noqa: E741
    shift = 1 + jnp.abs(3 * normal(seed + 9, PAIRS))  # of one sign, so that no mean of them is 0 by chance
    before = every_loss((w, l, ref_w, ref_l), tokens)
    both_models = every_loss((w + shift, l, ref_w + shift, ref_l), tokens)
    both_responses = every_loss((w + shift, l + shift, ref_w, ref_l), tokens)
    for name in CONFIGS:
        same = functools.partial(np.isclose, before[name][0][0], rtol=1e-4, atol=1e-5)
        assert same(both_models[name][0][0]) == (LOSSES[name].needs_reference and name not in OF_MARGINS), name
        difference = LOSSES[name].any_divergence or name == "aot"
        cancels = difference and name not in ("ipo", "sigmoid_norm", "sft")  # two divide by lengths, one reads no ratio
        assert same(both_responses[name][0][0]) == cancels, name


@hypothesis.settings(max_examples=5)
@given(seeds)
def test_permuting_the_pairs_permutes_the_gradients(seed):
    logprobs, tokens = case(seed)
    order = np.random.default_rng(seed).permutation(PAIRS)
    whole = every_loss(logprobs, tokens)
    for name, ((loss, _), grads) in every_loss(*jax.tree.map(lambda x: x[order], (logprobs, tokens))).items():
        np.testing.assert_allclose(loss, whole[name][0][0], rtol=1e-5, err_msg=name)
        for got, expected in zip(grads, whole[name][1], strict=True):
            np.testing.assert_allclose(got, expected[order], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("margin", [1e4, -1e4])
def test_extreme_margins_overflow_nowhere(margin):
    zeros = jnp.zeros(PAIRS)
    low = zeros - 2e4
    (_, tokens), logprobs = case(0), (low + margin, low - margin, low, low)
    for name, ((loss, _), grads) in every_loss(logprobs, tokens).items():
        assert np.isfinite(loss), name
        assert all(np.all(np.isfinite(grad)) for grad in grads), name


def sigmoid_loss(logprobs, beta=BETA):
    ones = jnp.ones(len(logprobs[0]), jnp.int32)
    return with_values(loss_of)(PreferenceLossConfig(), logprobs, (ones, ones), beta=beta)


def test_loss_is_log_2_where_the_policy_is_the_reference_whatever_beta():
    (chosen, rejected, *_), _ = case(0)
    for beta in (0.01, 0.3, 5.0):
        loss, metrics = sigmoid_loss((chosen, rejected, chosen, rejected), beta)
        np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
        assert metrics["rewards/accuracies"] == 0.5
        assert metrics["rewards/margins"] == metrics["rewards/chosen"] == metrics["rewards/rejected"] == 0


def test_beta_may_be_an_array_so_that_several_train_at_once():
    logprobs, betas = case(0)[0], jnp.asarray([0.05, 0.3, 1.0])
    losses = jax.vmap(lambda beta: sigmoid_loss(logprobs, beta)[0])(betas)
    np.testing.assert_allclose(losses, [sigmoid_loss(logprobs, float(beta))[0] for beta in betas], rtol=1e-6)


@hypothesis.settings(max_examples=5)
@given(seeds)
def test_metrics(seed):
    logprobs, tokens = case(seed)
    w, l, ref_w, ref_l = (np.asarray(x, np.float64) for x in logprobs)  # noqa: E741
    for name, ((_, metrics), _) in every_loss(logprobs, tokens).items():
        chosen, rejected = (w - ref_w, l - ref_l) if LOSSES[name].needs_reference else (w, l)
        if LOSSES[name].per_token:
            chosen, rejected = chosen / np.asarray(tokens[0]), rejected / np.asarray(tokens[1])
        expected = {
            "rewards/chosen": np.mean(BETA * chosen),
            "rewards/rejected": np.mean(BETA * rejected),
            "rewards/margins": np.mean(BETA * (chosen - rejected)),
            "rewards/accuracies": np.mean(chosen > rejected),
            "logps/chosen": np.mean(w),
            "logps/rejected": np.mean(l),
        }
        assert metrics.keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_allclose(metrics[key], value, rtol=1e-4, atol=1e-5, err_msg=f"{name} {key}")


def test_a_tie_is_half_right():
    zeros = jnp.zeros(4)
    for margins, accuracy in (([1.0, 0.0, -1.0, 0.0], 0.5), ([1.0, 0.0, 1.0, 0.0], 0.75)):
        _, metrics = sigmoid_loss((jnp.asarray(margins), zeros, zeros, zeros))
        assert metrics["rewards/accuracies"] == accuracy


def test_a_mixture_is_the_weighted_sum_and_a_pairs_weight_multiplies_its_loss():
    logprobs, tokens = case(1)
    config = PreferenceLossConfig(losses=("hinge", "sft", "bco_pair"), loss_weights=(0.8, 0.5, 2.0))
    parts = {name: slowly(name, logprobs, tokens) for name in config.losses}
    loss, metrics = loss_of(config, logprobs, tokens, beta=BETA)
    np.testing.assert_allclose(loss, 0.8 * parts["hinge"] + 0.5 * parts["sft"] + 2 * parts["bco_pair"], rtol=1e-5)
    for name, part in parts.items():
        np.testing.assert_allclose(metrics[f"loss/{name}"].value, part, rtol=1e-5)
    weights = jnp.asarray([2.0, 0, 0, 0, 0, 1.0])
    loss, _ = loss_of(CONFIGS["hinge"], logprobs, tokens, beta=BETA, weights=weights)
    alone = [slowly("hinge", [x[i : i + 1] for x in logprobs], [x[i : i + 1] for x in tokens]) for i in (0, 5)]
    np.testing.assert_allclose(loss, (2 * alone[0] + alone[1]) / PAIRS, rtol=1e-5)


def test_certain_responses_have_finite_odds():
    certain, likely, tokens = jnp.zeros(2), jnp.full(2, -0.5), jnp.full(2, 3)

    def loss(chosen, rejected):
        terms = reference_free_losses.orpo_loss(
            chosen, rejected, tokens, tokens, beta=BETA, tokens_per_pair=jnp.asarray(3.0)
        )
        return jnp.mean(terms)

    better, gradients = jax.value_and_grad(loss, argnums=(0, 1))(certain, likely)
    worse = loss(likely, certain)
    assert better < 1e-4 < worse < jnp.inf
    assert np.all(np.isfinite(gradients))


@given(seeds)
def test_divergences_are_the_derivatives_of_their_functions(seed):
    """f' of Wang et al. 2023, up to a constant that is 0 at a ratio of 1; difference quotients of f itself."""
    ratios = np.asarray(normal(seed, PAIRS), np.float64)
    functions = {
        "reverse_kl": lambda u: u * np.log(u),
        "forward_kl": lambda u: -np.log(u),
        "js_divergence": lambda u: u * np.log(u) - (u + 1) * np.log((u + 1) / 2),
        "alpha_divergence": lambda u: (u ** (1 - ALPHA) - (1 - ALPHA) * u - ALPHA) / (ALPHA * (ALPHA - 1)),
    }
    ours = {
        "reverse_kl": lambda x: x,
        "forward_kl": divergences.forward_kl,
        "js_divergence": divergences.js_divergence,
        "alpha_divergence": functools.partial(divergences.alpha_divergence, alpha=ALPHA),
    }
    for name, f in functions.items():

        def slope(u, f=f):
            return (f(u + 1e-6) - f(u - 1e-6)) / 2e-6

        expected = slope(np.exp(ratios)) - slope(1.0)
        np.testing.assert_allclose(ours[name](jnp.asarray(ratios, jnp.float32)), expected, rtol=1e-3, atol=1e-4)


def test_divergences_do_not_overflow():
    far = jnp.asarray([-1e4, 1e4])
    for function in (
        divergences.forward_kl,
        divergences.js_divergence,
        functools.partial(divergences.alpha_divergence, alpha=0.5),
    ):
        assert np.all(np.isfinite(function(far)))


LD = jax.jit(token_logprobs.length_desensitised, static_argnames="alpha")
WPO = jax.jit(token_logprobs.on_policy_weights)
SHARED = jnp.asarray([3, 1, 6, 0, 2], jnp.int32)


def desensitised(logprobs, mask):
    shared = jnp.minimum(SHARED, jnp.sum(mask, axis=1, dtype=jnp.int32))
    return jnp.sum(token_logprobs.length_desensitised(logprobs, mask, shared, alpha=0.4) * jnp.arange(1.0, 6.0))


def weighted(logprobs, mask):
    weights = token_logprobs.on_policy_weights(logprobs, jnp.where(mask, -jnp.square(logprobs), jnp.nan), mask)
    return jnp.sum(weights) + jnp.sum(jnp.where(mask, logprobs, 0))  # a gradient that is not 0


@given(seeds, row_lengths)
def test_padding_is_inert(seed, lengths):
    logprobs, mask = -1 - jnp.abs(normal(seed, ROWS, WIDTH)), prefix_mask(lengths)
    for function in (desensitised, weighted):
        assert_padding_is_inert(function, [logprobs], mask, seed)


@given(seeds, row_lengths)
def test_desensitised_logprobs_and_weights_are_their_formulas(seed, lengths):
    logprobs, squares, mask = normal(seed, ROWS, WIDTH), -(normal(seed + 1, ROWS, WIDTH) ** 2), prefix_mask(lengths)
    expected, weights = [], []
    for row, length in enumerate(lengths):
        own, shared = np.asarray(logprobs[row, :length], np.float64), min(int(SHARED[row]), length)
        expected.append(own[:shared].sum() + 0.4 * own[shared:].sum())
        weights.append(np.exp(np.mean(own - np.asarray(squares[row, :length])) if length else 0.0))
    shared = jnp.minimum(SHARED, jnp.asarray(lengths, jnp.int32))
    np.testing.assert_allclose(LD(logprobs, mask, shared, alpha=0.4), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(WPO(logprobs, squares, mask), weights, rtol=1e-4)


def test_weights_carry_no_gradient():
    mask = prefix_mask([WIDTH] * ROWS)
    grads = jax.grad(lambda x: jnp.sum(token_logprobs.on_policy_weights(x, 2 * x, mask)))(normal(0, ROWS, WIDTH))
    assert not np.any(grads)


def test_the_table_says_what_each_loss_is_at_the_reference():
    (w, l, *_), tokens = case(3)  # noqa: E741
    levels = {name: spec.at_reference for name, spec in LOSSES.items() if spec.at_reference is not None}
    found = every_loss((w, l, w, l), tokens)
    assert len(levels) > 10
    for name, level in levels.items():
        np.testing.assert_allclose(found[name][0][0], level, rtol=1e-5, err_msg=name)


def test_the_table_knows_what_each_loss_reads():
    assert {name for name, spec in LOSSES.items() if not spec.needs_reference} == {
        "sft",
        "cpo",
        "simpo",
        "alphapo",
        "orpo",
    }
    assert {name for name, spec in LOSSES.items() if spec.whole_batch} == {"aot", "aot_unpaired", "alpha_dpo"}
    assert {name for name, spec in LOSSES.items() if not spec.takes("ld_alpha")} == {"sft", "simpo", "alphapo", "orpo"}
