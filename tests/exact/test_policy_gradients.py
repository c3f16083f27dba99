"""The expected gradient of each method's first update: that of the objective it claims, or with the bias it states.

Expectations are over all batches of all 40 responses, or of 13 or 4 where batches are large. Gradients are of float32:
1e-4 of the expected one's norm is a hundred times what rounding gives.
"""

import functools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.core.sequences import joined
from rlhf_jax.models.scalars import ScalarNetwork
from rlhf_jax.stages.ppo import PPOConfig
from tests.support import exact_world as exact
from tests.support.exact_world import COMMON, EOS, MODEL, VOCAB, World, apart, cosine, every_batch, of_group, world

EXACT = 1e-4


def of_ppo(size: int, **fields) -> PPOConfig:
    given = {
        **COMMON,
        "kl_coef": 0.0,
        "gamma": 1.0,
        "gae_lambda": 1.0,
        "clip_ratio": 0.2,
        "value_clip": 0.2,
        "vf_coef": 0.1,
        "whiten_advantages": False,
        **fields,
    }
    return PPOConfig(kind="ppo", batch_size=size, **given)  # type: ignore[arg-type]


def lengths(at: World) -> np.ndarray:
    return at.responses.response_mask.sum(axis=1)


def expected_score(at: World) -> float:
    return float(exact.chances(at.policy, at.responses) @ np.asarray(at.scores, np.float64))


@functools.cache
def of_score(longest: int) -> np.ndarray:
    return exact.gradient(exact.mean_score, world(longest))


@functools.cache
def of_divergence(longest: int) -> np.ndarray:
    return exact.gradient(exact.divergence, world(longest))


def surrogate(longest: int, weights: np.ndarray) -> np.ndarray:
    """The gradient of expected weights, [N] or [N, T], that do not depend on the policy."""
    at, each = world(longest), exact.score_functions(longest)
    of_tokens = np.broadcast_to(weights if weights.ndim == 2 else weights[:, None], each.shape[:2])
    return np.einsum("n,nt,ntd->d", exact.chances(at.policy, at.responses), of_tokens, each)


def test_the_responses_are_all_there_are():
    for longest, count in ((1, 4), (2, 13), (3, 40)):
        at = world(longest)
        found = {tuple(ids[mask]) for ids, mask in zip(*at.responses[2:], strict=True)}
        assert len(found) == len(at.scores) == count
        assert all(len(text) == longest or text[-1] == EOS for text in found)
        chances = exact.chances(at.policy, at.responses)  # which sum to 1
        np.testing.assert_allclose(exact.next_tokens(at.policy, longest)[0].sum(), chances @ lengths(at), rtol=1e-5)
        expected = surrogate(longest, np.asarray(at.scores, np.float64))
        assert apart(expected, of_score(longest)) < EXACT


def test_rloo_follows_the_gradient_of_the_score_less_the_divergence():
    batches = every_batch(world(3), of_group("rloo", 2, kl_coef=0.3))
    np.testing.assert_allclose(batches.ratio, 1, atol=1e-5)
    assert apart(batches.mean(), of_score(3) - 0.3 * of_divergence(3)) < EXACT


@pytest.mark.nightly
@pytest.mark.parametrize("loss", ["ppo", "reinforce", "cispo"])
def test_every_loss_has_the_same_gradient_in_the_first_update(loss):
    config = of_group("rloo", 3, policy_loss=loss, aggregation="sequence_sum")
    assert apart(every_batch(world(2), config).mean(), of_score(2)) < EXACT


@pytest.mark.nightly
def test_the_sequence_ratio_corrects_for_another_sampler():
    at = world(3)
    at = at._replace(sampler=at.reference)
    bounds = {"clip_ratio": 0.9999, "clip_ratio_high": 1e6}
    batches = every_batch(at, of_group("rloo", 2, old_logprobs="sampler", **bounds))
    assert apart(batches.mean(), of_score(3)) < EXACT


def test_dr_grpo_follows_a_fixed_share_of_the_gradient():
    found = every_batch(world(3), of_group("dr_grpo", 2)).mean()
    assert apart(found, (1 - 1 / 2) / 3 * of_score(3)) < EXACT


def test_grpo_of_two_makes_a_response_that_beats_another_more_likely_and_a_short_one_more_so():
    """The deviation of two scores leaves the sign of their difference, and the mean over tokens one over the length."""
    at = world(3)
    scores = np.asarray(at.scores, np.float64)
    gaps = scores[:, None] - scores[None, :]
    deviation = np.abs(gaps) / math.sqrt(2)
    advantages = (gaps / 2 / (deviation + 1e-4)) @ exact.chances(at.policy, at.responses)
    wins = np.sign(gaps) @ exact.chances(at.policy, at.responses) / math.sqrt(2)
    np.testing.assert_allclose(advantages, wins, atol=1e-3)  # but for the 1e-4 beside the deviation
    found = every_batch(at, of_group("grpo", 2)).mean()
    assert apart(found, surrogate(3, advantages / lengths(at))) < EXACT
    # How far that is from the gradient of the score; without the length, and without the deviation.
    mean = (scores - expected_score(at)) / 2
    biases = [cosine(surrogate(3, x), of_score(3)) for x in (wins / lengths(at), wins, mean / lengths(at))]
    np.testing.assert_allclose(biases, [0.82, 0.81, 0.97], atol=0.01)


@pytest.mark.nightly
@pytest.mark.parametrize("loss", ["ppo", "gspo"])
def test_gspos_ratio_and_grpos_mean_over_tokens_divide_by_the_length_alike(loss):
    at = world(3)
    mean = (np.asarray(at.scores, np.float64) - expected_score(at)) / 2
    found = every_batch(at, of_group("dr_grpo", 2, policy_loss=loss, aggregation="sequence")).mean()
    assert apart(found, surrogate(3, mean / lengths(at))) < EXACT


def test_grpo_weighs_a_prompt_by_how_often_it_is_answered_right():
    """With scores of 0 and 1 the gradient is that of the chance p to be right, times a factor of p."""
    factors = {}
    for right in (1, 2, 3):
        at = world(1)._replace(scores=jnp.asarray(np.arange(4) < right, jnp.float32))
        chance, exactly = expected_score(at), exact.gradient(exact.mean_score, at)
        found = every_batch(at, of_group("grpo", 5)).mean()
        factors[chance] = float(found @ exactly / (exactly @ exactly))
        assert apart(found, factors[chance] * exactly) < EXACT
        np.testing.assert_allclose(factors[chance], weight_of_a_prompt(chance, 5), rtol=1e-4)
    assert max(factors.values()) > 1.02 * min(factors.values())
    # In small groups it is the same for all prompts, and in large ones 1 / sqrt(p (1 - p)).
    for size in (2, 3):
        same = [weight_of_a_prompt(chance, size) for chance in (0.01, 0.3, 0.5)]
        np.testing.assert_allclose(same, same[0], rtol=1e-3)
    np.testing.assert_allclose(weight_of_a_prompt(0.1, 4000), 1 / math.sqrt(0.1 * 0.9), rtol=5e-3)


def weight_of_a_prompt(chance: float, size: int) -> float:
    """The mean advantage of a right response less that of a wrong one, by the number of others that are right."""
    right = np.arange(size)
    ways = np.array([math.lgamma(size) - math.lgamma(k + 1) - math.lgamma(size - k) for k in right])
    weights = np.exp(ways + right * math.log(chance) + (size - 1 - right) * math.log1p(-chance))

    def advantage(score: int) -> float:
        mean = (right + score) / size
        deviation = np.sqrt(mean * (1 - mean) * size / (size - 1))
        return float(weights @ ((score - mean) / (deviation + 1e-4)))

    return advantage(1) - advantage(0)


@pytest.mark.nightly
def test_whitening_over_the_batch_is_biased_less_in_a_larger_batch():
    """REINFORCE++: a response's own rewards are in the mean and in the deviation that its advantage is made with."""
    at, found = world(2), {}
    objective = of_score(2) - 0.3 * of_divergence(2)
    penalty = np.asarray(exact.token_logprobs(at.policy, at.responses), np.float64)
    penalty = 0.3 * (penalty - np.asarray(exact.token_logprobs(at.reference, at.responses), np.float64))
    to_go = np.asarray(at.scores, np.float64)[:, None] - np.cumsum(penalty[:, ::-1], axis=1)[:, ::-1]
    for size in (2, 3):
        batches = every_batch(at, of_group("reinforce_plus_plus", size, kl_coef=0.3))
        rewards, mask = to_go[batches.rows], at.responses.response_mask[batches.rows]
        tokens = mask.sum(axis=(1, 2), keepdims=True)
        centred = np.where(mask, rewards - np.where(mask, rewards, 0).sum(axis=(1, 2), keepdims=True) / tokens, 0)
        whitened = centred / np.sqrt(np.square(centred).sum(axis=(1, 2), keepdims=True) / tokens + 1e-8)
        each = np.einsum("kit,kitd->kd", whitened / tokens, exact.score_functions(2)[batches.rows])
        assert apart(batches.mean(), batches.chances @ each) < EXACT
        found[size] = 1 - cosine(batches.mean(), objective)
    assert 1e-3 < found[3] < 0.9 * found[2]


def of_batches(name: str, rewards: np.ndarray) -> np.ndarray:
    """Advantages of batches of two groups of two, float64[K, 4], from their definitions."""
    groups = rewards.reshape(-1, 2, 2)
    centred = (groups - groups.mean(axis=2, keepdims=True)).reshape(-1, 4)
    if name == "grpo_batch_std":
        return centred / (rewards.std(axis=1, ddof=1, keepdims=True) + 1e-4)
    if name == "rloo_normalized":  # differences have mean 0
        return 2 * centred / ((2 * centred).std(axis=1, ddof=1, keepdims=True) + 1e-4)
    return centred / np.sqrt(np.square(centred).mean(axis=1, keepdims=True) + 1e-8)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["reinforce_plus_plus_baseline", "grpo_batch_std", "rloo_normalized"])
def test_a_deviation_of_the_whole_batch_is_biased_as_well(name):
    at = world(1)
    found = every_batch(at, of_group("dr_grpo", 2, batch_size=4, advantage=name, aggregation="sequence_sum"))
    advantages = of_batches(name, np.asarray(at.scores, np.float64)[found.rows])
    each = exact.score_functions(1)[:, 0][found.rows]
    assert apart(found.mean(), np.einsum("k,ki,kid->d", found.chances, advantages, each) / 4) < EXACT
    assert 0.9 < cosine(found.mean(), of_score(1)) < 0.9999


@pytest.mark.nightly
def test_the_mean_over_a_batchs_tokens_is_biased_less_in_a_larger_batch():
    """Without the number of a batch's tokens in the denominator there is no bias."""
    at, found = world(2), {}
    for size in (1, 2, 3):
        batches = every_batch(at, of_ppo(size), value=CRITIC, value_params={"table": jnp.zeros(STATES)})
        tokens = lengths(at)[batches.rows].sum(axis=1)
        assert apart(batches.mean(tokens), size * of_score(2)) < EXACT
        mean_length = exact.chances(at.policy, at.responses) @ lengths(at)
        found[size] = apart(batches.mean(), of_score(2) / mean_length)
    assert 0.01 < found[3] < 0.8 * found[2] < 0.8 * 0.8 * found[1]


class Critic(ScalarNetwork):
    """A value function that is a table over the states of a response."""

    def values(self, params, sequences, *, dropout_keys=None):
        """The table's entry for the tokens before each one."""
        places, place = [], jnp.zeros(len(sequences.response), jnp.int32)
        for token in sequences.response.T:
            places.append(place)
            place = VOCAB * place + token + 1
        return params["table"][jnp.stack(places, axis=1)]


CRITIC, STATES = Critic(MODEL, VOCAB, "last"), (VOCAB**3 - 1) // (VOCAB - 1)


def places(at: World) -> np.ndarray:
    """Index of each token's state in the table, [N, T]."""
    found = Critic.values(CRITIC, {"table": jnp.arange(STATES)}, joined(at.responses))
    return np.asarray(found)


def rewards_to_go(at: World, kl_coef: float) -> np.ndarray:
    """The score less the penalty on this and on later tokens, float64[N, T]; 0 at padding."""
    own, reference = (
        np.asarray(exact.token_logprobs(params, at.responses), np.float64) for params in (at.policy, at.reference)
    )
    penalty = np.cumsum(kl_coef * (own - reference)[:, ::-1], axis=1)[:, ::-1]
    return np.where(at.responses.response_mask, np.asarray(at.scores, np.float64)[:, None] - penalty, 0)


def exact_values(at: World, kl_coef: float) -> np.ndarray:
    """The expected rewards to go of every state in the table, float64[STATES]."""
    chances = exact.chances(at.policy, at.responses)[:, None] * at.responses.response_mask
    where, totals, weights = places(at), np.zeros(STATES), np.zeros(STATES)
    np.add.at(totals, where, chances * rewards_to_go(at, kl_coef))
    np.add.at(weights, where, chances)
    return totals / np.where(weights > 0, weights, 1)


def test_ppo_follows_the_gradient_whatever_the_values_are_where_lambda_is_1():
    at = world(3)
    wrong = jnp.asarray(np.random.default_rng(1).normal(size=STATES), jnp.float32)
    batches = every_batch(at, of_ppo(2, kl_coef=0.3), value=CRITIC, value_params={"table": wrong})
    np.testing.assert_allclose(batches.ratio, 1, atol=1e-5)
    tokens = lengths(at)[batches.rows].sum(axis=1)
    assert apart(batches.mean(tokens), 2 * (of_score(3) - 0.3 * of_divergence(3))) < EXACT


def test_with_lambda_below_1_the_errors_of_later_values_are_the_bias():
    at, gae_lambda = world(3), 0.5
    right = exact_values(at, 0.3)
    errors = np.random.default_rng(1).normal(size=STATES)
    following = np.pad(errors[places(at)], ((0, 0), (0, 1)))[:, 1:]
    following = np.where(np.pad(at.responses.response_mask, ((0, 0), (0, 1)))[:, 1:], following, 0)
    later = np.zeros((len(following), 4))
    for t in reversed(range(3)):
        later[:, t] = (1 - gae_lambda) * following[:, t] + gae_lambda * later[:, t + 1]
    objective = of_score(3) - 0.3 * of_divergence(3)
    for share, bias in ((0.0, 0.0), (1.0, surrogate(3, later[:, :3]))):
        table = jnp.asarray(right + share * errors, jnp.float32)
        config = of_ppo(2, kl_coef=0.3, gae_lambda=gae_lambda)
        batches = every_batch(at, config, value=CRITIC, value_params={"table": table})
        tokens = lengths(at)[batches.rows].sum(axis=1)
        assert apart(batches.mean(tokens), 2 * (objective + bias)) < EXACT
