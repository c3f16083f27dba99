import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given

from rlhf_jax.core import unpaired_losses
from tests.support.padded_arrays import normal, seeds, with_values

ROWS = 7
SETTINGS = {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.7}
kto = jax.jit(with_values(functools.partial(unpaired_losses.kto_loss, **SETTINGS, axes=())))
gradients = jax.jit(jax.grad(lambda *args, baseline: kto(*args, baseline=baseline)[0], argnums=(0, 1)))
apo = jax.jit(with_values(functools.partial(unpaired_losses.apo_zero_unpaired_loss, **SETTINGS, axes=())))


def case(seed):
    logprobs, ref_logprobs = (-20 + 3 * normal(seed + i, ROWS) for i in range(2))
    desirable = np.random.default_rng(seed).random(ROWS) < 0.5
    desirable[:2] = [True, False]
    return logprobs, ref_logprobs, jnp.asarray(desirable)


def slowly(logprobs, ref_logprobs, desirable, baseline):
    """The loss and its derivative by each log-probability, one response after another."""
    losses, slopes = [], []
    rows = (np.asarray(x, np.float64) for x in (logprobs, ref_logprobs, desirable))
    for own, reference, good in zip(*rows, strict=True):
        sign, weight = (1, 1.3) if good else (-1, 0.7)
        utility = 1 / (1 + np.exp(-0.3 * sign * (own - reference - baseline)))
        losses.append(weight * (1 - utility))
        slopes.append(-weight * sign * 0.3 * utility * (1 - utility) / ROWS)
    return np.mean(losses), np.array(slopes)


@given(seeds)
def test_kto_and_its_gradients_are_those_of_the_formula(seed):
    args, baseline = case(seed), abs(float(normal(seed, 1)[0]))
    loss, metrics = kto(*args, baseline=jnp.float32(baseline))
    expected, slopes = slowly(*args, baseline)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for got, sign in zip(gradients(*args, baseline=jnp.float32(baseline)), (1, -1), strict=True):
        np.testing.assert_allclose(got, sign * slopes, rtol=1e-4, atol=1e-6)
    own, reference, good = map(np.asarray, args)
    chosen, rejected = (0.3 * np.mean((own - reference)[mask]) for mask in (good, ~good))
    expected = {
        "kl": baseline,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "logps/chosen": np.mean(own[good]),
        "logps/rejected": np.mean(own[~good]),
    }
    assert metrics.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-4, atol=1e-5, err_msg=key)


@given(seeds)
def test_without_a_baseline_kto_is_apo_zero(seed):
    args = case(seed)
    loss, metrics = apo(*args)
    np.testing.assert_allclose(loss, slowly(*args, 0.0)[0], rtol=1e-5)
    assert "kl" not in metrics


def test_the_baseline_is_the_mean_log_ratio_or_zero_and_has_no_gradient():
    logprobs, ref_logprobs, desirable = case(3)
    baseline = jax.jit(functools.partial(unpaired_losses.kto_baseline, axes=()))
    gap = float(np.mean(np.asarray(logprobs) - np.asarray(ref_logprobs)))
    np.testing.assert_allclose(baseline(logprobs, ref_logprobs - 30), gap + 30, rtol=1e-5)
    assert baseline(logprobs, ref_logprobs + 30) == 0

    for through in (
        lambda shift: baseline(logprobs + shift, ref_logprobs - 30),
        lambda shift: kto(logprobs, ref_logprobs, desirable, baseline=shift)[0],
    ):
        assert jax.jit(jax.grad(through))(jnp.float32(1)) == 0


def test_of_no_desirable_response_the_means_are_zero():
    logprobs, ref_logprobs, _ = case(0)
    loss, metrics = kto(logprobs, ref_logprobs, jnp.zeros(ROWS, bool), baseline=jnp.float32(0))
    assert np.isfinite(loss)
    assert metrics["rewards/chosen"] == metrics["logps/chosen"] == 0
    assert metrics["logps/rejected"] < 0
