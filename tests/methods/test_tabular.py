"""Training on a space that can be listed ends at the optimum in closed form, and slopes are those of the losses."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.core import preference_losses
from rlhf_jax.methods import tabular
from rlhf_jax.methods.preference_table import PreferenceLossConfig

COUNT, BETA = 6, 0.5
REWARDS = jnp.linspace(-1.0, 1.0, COUNT)
REFERENCE = jax.nn.log_softmax(jnp.array([0.3, -0.2, 1.0, 0.1, -0.7, 0.4]))
OPTIMUM = tabular.optimum(REFERENCE, REWARDS, beta=BETA)
ONES = jnp.ones(COUNT, jnp.int32)


def objective(logprobs: jax.Array) -> float:
    return float(tabular.mean(logprobs, REWARDS) - BETA * tabular.divergence(logprobs, REFERENCE))


def on_all_pairs(loss: str, *, beta: float, lengths: jax.Array = ONES, steps: int = 600) -> jax.Array:
    return tabular.train_on_pairs(
        tabular.all_pairs(tabular.win_probabilities(REWARDS)),
        REFERENCE,
        jnp.eye(COUNT),
        lengths,
        loss=PreferenceLossConfig(losses=(loss,)),
        beta=beta,
        learning_rate=0.05,
        steps=steps,
    )


def test_no_other_policy_is_better_than_the_optimum():
    reference, rewards = (np.asarray(x, np.float64) for x in (REFERENCE, REWARDS))
    np.testing.assert_allclose(objective(OPTIMUM), BETA * np.log(np.exp(reference + rewards / BETA).sum()), rtol=1e-5)
    for seed, size in itertools.product(range(20), (0.03, 0.3, 3.0)):
        moved = OPTIMUM + size * jax.random.normal(jax.random.key(seed), (COUNT,))
        assert objective(jax.nn.log_softmax(moved)) < objective(OPTIMUM)


def test_moments_of_several_policies_are_sums():
    both = jnp.stack([REFERENCE, OPTIMUM])
    chances = np.exp(np.asarray(both, np.float64))
    np.testing.assert_allclose(tabular.mean(both, REWARDS), chances @ np.asarray(REWARDS), rtol=1e-5)
    expected = (chances * np.asarray(both - REFERENCE[None])).sum(axis=1)
    np.testing.assert_allclose(tabular.divergence(both, REFERENCE), expected, rtol=1e-4, atol=1e-6)


def test_pairs_have_the_share_of_their_labels():
    wins = tabular.win_probabilities(REWARDS)
    pairs = tabular.all_pairs(wins)
    assert len(pairs.share) == COUNT * (COUNT - 1) and not np.any(pairs.chosen == pairs.rejected)
    np.testing.assert_allclose(wins + wins.T, 1, rtol=1e-6)
    better = np.asarray(pairs.share)[np.asarray(REWARDS)[pairs.chosen] > np.asarray(REWARDS)[pairs.rejected]]
    assert pairs.share.sum() == pytest.approx(1) and better.sum() > 0.6


def test_dpo_ends_at_the_optimum_of_its_beta():
    curve = on_all_pairs("sigmoid", beta=BETA)
    np.testing.assert_allclose(curve[0], REFERENCE, atol=1e-6)
    assert tabular.divergence(curve[-1], OPTIMUM) < 1e-5
    other = tabular.optimum(REFERENCE, REWARDS, beta=1.1 * BETA)
    assert tabular.divergence(curve[-1], other) > 1e-3


def test_lengths_reach_the_losses_that_divide_by_them():
    short, long = (on_all_pairs("ipo", beta=BETA, lengths=length * ONES, steps=300)[-1] for length in (1, 2))
    np.testing.assert_allclose((long - REFERENCE).std(), 2 * (short - REFERENCE).std(), rtol=0.05)


def test_ppo_ends_at_the_optimum_of_its_penalty():
    curve = tabular.train_ppo(
        jax.random.key(0),
        REWARDS,
        REFERENCE,
        kl_coef=BETA,
        clip_ratio=0.2,
        learning_rate=0.05,
        batch_size=128,
        epochs=2,
        iterations=300,
    )
    np.testing.assert_allclose(curve[0], REFERENCE, atol=1e-6)
    assert tabular.divergence(curve[-1], OPTIMUM) < 1e-3
    assert tabular.divergence(curve[-1], tabular.optimum(REFERENCE, REWARDS, beta=1.3 * BETA)) > 5e-3


def test_shared_features_move_the_chosen_response_down():
    """Dot products of features decide: the chosen response falls if its own square is less than its product."""
    for similar, sign in ((2.0, -1), (0.5, 1)):
        features = jnp.array([[1.0], [similar], [-1.0]])
        curve = tabular.train_on_pairs(
            tabular.Pairs(jnp.array([0]), jnp.array([1]), jnp.ones(1)),
            jnp.full(3, -jnp.log(3.0)),
            features,
            ONES[:3],
            loss=PreferenceLossConfig(losses=("sigmoid",)),
            beta=0.1,
            learning_rate=0.01,
            steps=1,
        )
        margin = curve[:, 0] - curve[:, 1]
        assert margin[1] > margin[0] and np.sign(curve[1, 0] - curve[0, 0]) == sign


def test_slopes_are_derivatives_of_the_loss():
    chosen, rejected = jnp.array([-2.0, 0.0, 3.0]), jnp.array([1.0, 0.0, -1.0])
    found = tabular.slopes(
        PreferenceLossConfig(losses=("sigmoid",)), chosen, rejected, ref_logprob=-5.0, tokens=3, beta=0.3
    )
    expected = preference_losses.sigmoid_loss(chosen, rejected, beta=0.3)
    np.testing.assert_allclose(found.loss, expected, rtol=1e-5)
    force = 0.3 * np.asarray(jax.nn.sigmoid(-0.3 * (chosen - rejected)))
    np.testing.assert_allclose(found.chosen, -force, rtol=1e-5)
    np.testing.assert_allclose(found.rejected, force, rtol=1e-5)
