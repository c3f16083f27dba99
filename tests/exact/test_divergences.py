"""The expected gradient of the penalty on the divergence, for every estimator in the reward and in the loss.

Scores are all 0, so that the penalty is all there is. Its true gradient is that of the divergence of whole responses;
the others are those of other objectives, in closed form here and in the docstrings of `core/kl.py`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.core.kl import ESTIMATORS
from rlhf_jax.stages.group_rl import GroupRLConfig
from tests.support import exact_world as exact
from tests.support import tiny
from tests.support.exact_world import World, apart, cosine, every_batch, of_group, world

EXACT, LONGEST, KL_COEF = 1e-4, 3, 0.3


def nightly(value: Any) -> Any:
    return pytest.param(value, marks=pytest.mark.nightly)


def near(distance: float) -> World:
    """The world with a reference at a share of the way from the policy to its own."""
    at = world(LONGEST)
    mixed = jax.tree.map(lambda own, other: own + distance * (other - own), at.policy, at.reference)
    return at._replace(reference=mixed, scores=jnp.zeros_like(at.scores))


def penalty(
    at: World, estimator: str, place: str, *, method: dict[str, Any] | None = None, **fields: Any
) -> np.ndarray:
    """The expected gradient of the penalty in an iteration, over its coefficient."""
    return -every_batch(at, penalty_config(estimator, place, **fields), **(method or {})).mean() / KL_COEF


def penalty_config(estimator: str, place: str, **fields: Any) -> GroupRLConfig:
    """A config whose only term is the penalty."""
    given = {"kl_estimator": estimator, "kl_in": place, "policy_loss": "ppo", "aggregation": "sequence_sum", **fields}
    return of_group("rloo", 2, kl_coef=KL_COEF, **given)


def whole(at: World) -> np.ndarray:
    r"""The gradient of $KL(\pi \| \pi_{ref})$ of whole responses."""
    return exact.gradient(exact.divergence, at)


def state_by_state(policy: Any, at: World) -> jax.Array:
    r"""$KL(\pi \| \pi_{ref})$ of next tokens, over the states of the sampler's responses, whatever the policy is."""
    visits, _ = exact.next_tokens(at.sampler, LONGEST)
    own, reference = (exact.next_tokens(params, LONGEST)[1] for params in (policy, at.reference))
    return visits @ jnp.sum(jnp.exp(own) * (own - reference), axis=1)


def other_way(policy: Any, at: World) -> jax.Array:
    r"""As `state_by_state`, of $KL(\pi_{ref} \| \pi)$."""
    visits, _ = exact.next_tokens(at.sampler, LONGEST)
    own, reference = (exact.next_tokens(params, LONGEST)[1] for params in (policy, at.reference))
    return visits @ jnp.sum(jnp.exp(reference) * (reference - own), axis=1)


def mean_of_k2(policy: Any, at: World) -> jax.Array:
    """The expected sum of k2 over a response's tokens."""
    tokens = exact.token_logprobs(policy, at.responses)
    reference = exact.token_logprobs(at.reference, at.responses)
    return jnp.exp(jnp.sum(tokens, axis=1)) @ jnp.sum(0.5 * jnp.square(tokens - reference), axis=1)


def test_k1_in_the_reward_is_exact():
    at = near(1.0)
    assert apart(penalty(at, "k1", "reward"), whole(at)) < EXACT


@pytest.mark.nightly
@pytest.mark.parametrize("estimator", ["k2", nightly("k3+"), nightly("k3_weighted")])
def test_in_the_loss_what_a_token_does_to_later_ones_is_left_out(estimator):
    at = near(1.0)
    gradient = penalty(at, estimator, "loss")
    assert apart(gradient, exact.gradient(state_by_state, at)) < EXACT
    assert 0.98 < cosine(gradient, whole(at)) < 0.999


@pytest.mark.nightly
def test_k3_in_the_loss_is_the_other_divergence_state_by_state():
    for distance, least, most in ((1.0, 0.95, 0.99), (0.1, 0.998, 0.9999)):  # divergences of 0.45 and 0.03 nats
        at = near(distance)
        gradient = penalty(at, "k3", "loss")
        assert apart(gradient, exact.gradient(other_way, at)) < EXACT
        assert least < cosine(gradient, whole(at)) < most


@pytest.mark.nightly
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_k2_and_k3_in_the_reward_hardly_hold_a_policy_near_its_reference(estimator):
    """They are held fixed there: what their own gradient would add is missing, and next to all of it where near."""
    for distance, share in ((1.0, 0.3), (0.2, 0.12), (0.1, 0.06)):  # divergences of 0.45, 0.1 and 0.03 nats
        at = near(distance)
        with pytest.warns(UserWarning, match=f"kl_estimator = '{estimator}' in the reward"):
            gradient = penalty(at, estimator, "reward")
        if estimator == "k2":
            expected = exact.gradient(mean_of_k2, at) - exact.gradient(state_by_state, at)
        else:
            expected = whole(at) - exact.gradient(other_way, at)
        assert apart(gradient, expected) < EXACT
        assert share / 2 < np.linalg.norm(gradient) / np.linalg.norm(whole(at)) < share
        assert cosine(gradient, whole(at)) < 0.4


def test_weighted_k3_holds_off_policy_too():
    at = near(1.0)
    at = at._replace(sampler=jax.tree.map(lambda own, other: own + 0.5 * (other - own), at.policy, at.reference))
    gradient = penalty(at, "k3_weighted", "loss", old_logprobs="sampler")
    assert apart(gradient, exact.gradient(state_by_state, at)) < EXACT


@pytest.mark.nightly
def test_k1_in_the_loss_has_no_gradient():
    """Configs refuse k1 in the loss, for this reason: the learner is given it here."""
    at = near(1.0)
    learner = tiny.build_method(penalty_config("k2", "loss")).learner
    with_k1 = dataclasses.replace(learner, loss_penalty=ESTIMATORS["k1"])
    gradient = penalty(at, "k2", "loss", method={"learner": with_k1})
    assert np.linalg.norm(gradient) < EXACT * np.linalg.norm(whole(at))
