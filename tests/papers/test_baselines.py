"""Losses of baselines, against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.papers import baselines

LOGPS, OTHERS = jnp.array([-20.0, -3.0, -9.0]), jnp.array([-10.0, -30.0, -9.0])


def test_unlikelihood_is_a_difference_of_log_probabilities():
    np.testing.assert_allclose(baselines.unlikelihood_005(LOGPS, OTHERS), [19.5, 1.5, 8.55], rtol=1e-6)
    np.testing.assert_allclose(baselines.unlikelihood_05(LOGPS, OTHERS), [15.0, -12.0, 4.5], rtol=1e-6)


def test_bonbons_target_is_the_mean_margin_of_best_of_8():
    ranks = np.sort(np.random.default_rng(0).random((400_000, 8)), axis=1)
    # Best-of-8 has the density 8 u^7 of ranks, so that log-ratios to the policy differ by 7 (log u_best - log u_worst).
    margin = float(np.mean(7 * np.log(ranks[:, -1] / ranks[:, 0])))
    margins = jnp.linspace(margin - 5, margin + 5, 1001)
    zero = jnp.zeros_like(margins)
    losses = baselines.bonbon_8(zero, margins, zero)
    assert abs(float(margins[jnp.argmin(losses)]) - margin) < 0.05
    likelier = jax.grad(lambda chosen: jnp.sum(baselines.bonbon_8(chosen, zero, zero)))(zero)
    np.testing.assert_allclose(likelier, -0.005, rtol=1e-6)
