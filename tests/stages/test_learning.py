"""Each stage's step, repeated, learns what it is for.

The trained parameters are evaluated by separate forward passes: a step that exchanges chosen and rejected responses, or
shapes scores wrongly, logs metrics that look right.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.core.sequences import joined
from rlhf_jax.data.pipeline import Prompts
from rlhf_jax.data.prompts import PromptSource, at_round
from rlhf_jax.methods import dpo
from rlhf_jax.methods.offline import Updates
from rlhf_jax.methods.policy_parts import Sampled
from rlhf_jax.stages import reward_model, sft
from rlhf_jax.types import Rollout, TokenBatch
from tests.support import tiny
from tests.support.programs import QUICK, learn, log_ratios, score, token_logprobs


def preferred_token_pairs(seed: int):
    """Pairs that differ in one thing: only the chosen response ends in token 5."""
    pairs = tiny.preferences(16, seed)
    return pairs._replace(
        chosen=tiny.with_last_token(pairs.chosen, np.ones(16, bool)),
        rejected=tiny.with_last_token(pairs.rejected, np.zeros(16, bool)),
    )


def test_sft_learns_a_sequence():
    tokens = np.tile(np.array([1, 4, 5, 6, 7, 8, 2, 0], np.int32), (16, 1))
    mask = tokens != 0
    batch = TokenBatch(tokens, mask, mask & (np.arange(8) > 0))
    params, metrics, _ = learn(
        sft.make_step(Updates(tiny.POLICY, QUICK, 60, ())), {"policy": tiny.policy_params()}, (), [batch] * 60
    )
    assert metrics["loss"][0] > 1.5
    assert metrics["loss"][-1] < 0.1
    assert metrics["mean_token_accuracy"][-1] == 1
    assert metrics["num_tokens"].tolist() == [16 * 6] * 60
    sequence = joined(Rollout(tokens[:, :1], mask[:, :1], tokens[:, 1:], mask[:, 1:]))
    assert np.exp(token_logprobs(params["policy"], sequence)).min() > 0.9


def test_the_reward_model_learns_what_is_preferred():
    batches = [preferred_token_pairs(seed) for seed in range(60)]
    params, metrics, _ = learn(
        reward_model.make_step(Updates(tiny.REWARD, QUICK, 60, ())), {"reward": tiny.reward_params()}, (), batches
    )
    assert metrics["accuracy"][:5].mean() < 0.9
    assert metrics["accuracy"][-5:].mean() > 0.95
    chosen, rejected = preferred_token_pairs(1000)
    assert np.mean(score(params["reward"], chosen) > score(params["reward"], rejected)) > 0.9


def test_dpo_learns_what_is_preferred():
    reference = tiny.policy_params()
    frozen = {"reference": reference, "beta": jnp.float32(0.1)}
    batches = [preferred_token_pairs(seed % 4) for seed in range(100)]
    params, metrics, _ = learn(
        dpo.make_step(Updates(tiny.POLICY, QUICK, 100, ())), {"policy": tiny.policy_params()}, frozen, batches
    )
    np.testing.assert_allclose(metrics["loss"][0], np.log(2), atol=1e-6)  # the policy is still its reference
    assert metrics["rewards/accuracies"][-5:].mean() > 0.95
    assert metrics["rewards/margins"][-1] > metrics["rewards/margins"][1] > 0
    chosen, rejected = (log_ratios(params["policy"], reference, rows) for rows in preferred_token_pairs(0))
    assert np.mean(chosen > rejected) > 0.9


@functools.cache
def trained_by_ppo(kl_coef: float):
    """Metrics and samples of 40 iterations."""
    config = tiny.with_config(kl_coef=kl_coef, optimizer=QUICK, iterations=40, missing_eos_penalty=0.0)
    params = {"policy": tiny.policy_params(), "value": tiny.REWARD.init_value(tiny.reward_params())}
    frozen = {"reference": tiny.policy_params(), "reward": tiny.reward_params()}
    return learn(tiny.ppo_step(config), params, frozen, [tiny.online(16, seed) for seed in range(40)])[1:]


@pytest.mark.nightly
def test_a_penalty_holds_ppo_back():
    (free, _), (held, _) = map(trained_by_ppo, (0.0, 1.0))
    assert free["objective/kl"][-5:].mean() > 2 * held["objective/kl"][-5:].mean()


def test_ppo_pleases_the_reward_model():
    free, samples = trained_by_ppo(0.0)
    scores = samples.scores.mean(axis=1)
    last = jax.tree.map(lambda leaf: leaf[-1], samples)
    np.testing.assert_allclose(last.scores, score(tiny.reward_params(), joined(last.rollout)), rtol=1e-4)
    np.testing.assert_allclose(free["objective/kl"][0], 0, atol=1e-5)  # the policy is still its reference
    assert scores[-5:].mean() > scores[:5].mean() + 3 * scores[:5].std()
    assert free["val/explained_variance"][-10:].mean() > 0.2  # 0 if the value function does not learn
    np.testing.assert_allclose(free["objective/rlhf_reward"], scores + free["objective/non_score_reward"], atol=1e-5)
    lengths = samples.rollout.response_mask.sum(axis=-1)
    assert samples.scores.shape == lengths.shape == (40, 16)


@pytest.mark.nightly
def test_a_missing_eos_is_penalised_and_nothing_else():
    params = {"policy": tiny.policy_params(), "value": tiny.REWARD.init_value(tiny.reward_params())}
    frozen = {"reference": tiny.policy_params(2), "reward": tiny.reward_params()}
    rollout = Rollout(
        jnp.asarray(tiny.prompts(2).tokens),
        jnp.asarray(tiny.prompts(2).mask),
        jnp.array([[4, 5, tiny.EOS, 0, 0, 0], [4, 5, 6, 7, 8, 9]], jnp.int32),
        jnp.array([[True] * 3 + [False] * 3, [True] * 6]),
    )

    def scored(penalty: float):
        config = tiny.with_config(missing_eos_penalty=penalty, kl_coef=0.0, gae_lambda=1.0)

        @jax.jit
        def prepared(params, frozen):
            scores = tiny.REWARD.scores(frozen["reward"], joined(rollout))
            at = tiny.iteration(config)
            responses = at.scored(Sampled(rollout, jnp.zeros(rollout.response.shape), None), scores)
            evaluated = at.evaluate(params, frozen, responses, joined(rollout))
            batch, _ = at.method.learner.prepare(at, evaluated, frozen, 0.0)
            return evaluated.ended, batch.values.returns, scores

        ended, returns, scores = prepared(params, frozen)
        assert ended.sum() == 1
        return returns, scores

    (plain, scores), (lowered, _) = scored(0.0), scored(3.0)
    # The value function starts at 0, so returns are the rewards to go: the score, from the first token to the last.
    np.testing.assert_allclose(plain[0, :3], scores[0], rtol=1e-5)
    np.testing.assert_allclose(plain[0, 3:], 0)
    np.testing.assert_allclose(plain - lowered, [[0.0] * 6, [3.0] * 6], atol=1e-5)


def test_prompts_are_drawn_by_key_and_step_alone():
    pool = Prompts(np.arange(40, dtype=np.int32)[:, None], np.ones((40, 1), bool))
    keys = (jax.random.key(1), jax.random.key(2))
    source = PromptSource(pool, keys, 64)
    batch = source(3)
    assert batch.tokens.shape == (2, 64, 1)
    np.testing.assert_array_equal(batch.rows[0], np.arange(64))
    for k, key in enumerate(keys):
        alone = PromptSource(pool, (key,), 64)
        np.testing.assert_array_equal(alone(3).tokens, batch.tokens[k])
        assert not np.array_equal(alone(4).tokens, batch.tokens[k])
    # With rounds the first one draws the same, and more rounds change none of those before them.
    for rounds in (1, 3):
        several = PromptSource(pool, keys, 64, rounds=rounds)(3)
        assert several.tokens.shape == (2, 64, rounds, 1)
        assert sorted(several.rows[1].ravel().tolist()) == list(range(64 * rounds))
        for leaf, first in zip(at_round(several, 0), batch, strict=True):
            np.testing.assert_array_equal(leaf, first)
    assert not np.array_equal(at_round(several, 1).tokens, at_round(several, 2).tokens)
    drawn = np.concatenate([source(step).tokens.ravel() for step in range(20)])
    counts = np.bincount(drawn, minlength=40)
    assert len(counts) == 40
    assert np.abs(counts - 64).max() < 5 * np.sqrt(64)
