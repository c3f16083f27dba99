"""Details of the policy-gradient iteration, each by its config field: what it changes, and nothing else."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.core import kl, masking
from rlhf_jax.core.metrics import values
from rlhf_jax.core.policy_losses import AGGREGATIONS
from rlhf_jax.core.sequences import joined
from rlhf_jax.loading.models import Policy, RewardModel
from rlhf_jax.methods.kl_controller import AdaptiveKL
from rlhf_jax.methods.policy_metrics import objective_metrics
from rlhf_jax.methods.policy_parts import Experience, OnlineBatch, Sampled
from rlhf_jax.methods.pretraining_mix import PretrainingMix
from rlhf_jax.models import value_head
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.runtime.checkpoints import Checkpoints, abstract
from rlhf_jax.runtime.optimizers import gradients
from rlhf_jax.stages.ppo import start_value
from rlhf_jax.types import RlhfError, Rollout
from tests.support import tiny
from tests.support.programs import assert_close
from tests.support.tiny import demonstrations, with_micro_batch

SHARED = dataclasses.replace(tiny.NETWORKS, value="shared")
ROLLOUT = Rollout(
    jnp.asarray(tiny.prompts(4).tokens),
    jnp.asarray(tiny.prompts(4).mask),
    jnp.array([[4, 5, 2, 0, 0, 0], [4, 5, 6, 7, 8, 9], [7, 2, 0, 0, 0, 0], [9, 9, 4, 5, 2, 0]], jnp.int32),
    jnp.arange(6)[None] < jnp.array([3, 6, 2, 5])[:, None],
)
ENDED = np.array([True, False, True, True])
SCORES = jnp.array([0.5, -0.25, 3.0, 0.125])


def score(**changes):
    config = tiny.with_config(missing_eos_penalty=0.0)
    config = dataclasses.replace(config, **changes)
    lengths, ended = masking.lengths(ROLLOUT.response_mask), tiny.NETWORKS.has_ended(joined(ROLLOUT))
    shaping = tiny.build_method(config).shaping
    return np.asarray(shaping(SCORES, lengths, ended, max_tokens=tiny.RESPONSE))


def test_scores_are_scaled_clipped_and_lowered():
    np.testing.assert_array_equal(score(), SCORES)
    np.testing.assert_allclose(score(score_scale=2.0, score_clip=1.5), [1.0, -0.5, 1.5, 0.25])
    np.testing.assert_allclose(score(missing_eos_score=-1.0), [0.5, -1.0, 3.0, 0.125])
    np.testing.assert_allclose(score(missing_eos_penalty=2.0), [0.5, -2.25, 3.0, 0.125])
    # L_cache is 3 of 6 tokens: lengths 3, 6, 2 and 5 lose 0, 1, 0 and 2/3.
    np.testing.assert_allclose(score(overlong_buffer=0.5), SCORES - np.array([0, 1, 0, 2 / 3]), rtol=1e-6)


def experience(config, networks=tiny.NETWORKS):
    """Experience, the rewards that its advantages were made of, and metrics."""
    method = tiny.build_method(config)

    def prepare(params, frozen):
        rewards = []

        def spy(*args):
            rewards.append(args[0])
            return method.learner.advantages(*args)

        spied = dataclasses.replace(method, learner=dataclasses.replace(method.learner, advantages=spy))
        at = tiny.iteration(config, networks=networks, method=spied)
        responses = at.scored(Sampled(ROLLOUT, jnp.full(ROLLOUT.response.shape, -2.0), None), SCORES)
        evaluated = at.evaluate(params, frozen, responses, joined(ROLLOUT))
        batch, _ = spied.learner.prepare(at, evaluated, frozen, method.kl_coef)
        return batch, rewards[0], objective_metrics(evaluated, method.kl_coef, ()) | values(evaluated.old.metrics)

    value = value_head.init_normal(16, jax.random.key(0)) if networks.value == "shared" else tiny.reward_params()
    return jax.device_get(jax.jit(prepare)({"policy": tiny.policy_params(), "value": value}, tiny.ppo_frozen()))


@functools.cache
def logprobs():
    stats = jax.jit(functools.partial(tiny.POLICY.response_stats, temperature=1.0))
    return [np.asarray(stats(tiny.policy_params(seed), joined(ROLLOUT)).logprobs) for seed in (0, 2)]


@pytest.mark.filterwarnings("ignore:kl_estimator = 'k3' in the reward")
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_logged_divergence_is_the_penalised_one_and_the_score_is_on_the_last_token(estimator):
    config = tiny.with_config(kl_estimator=estimator, missing_eos_penalty=0.0, kl_coef=0.3, reject_truncated=True)
    config = dataclasses.replace(config, importance_cap=1.5)
    batch, rewards, metrics = experience(config)
    mask = np.asarray(ROLLOUT.response_mask)
    divergence = np.where(mask, kl.ESTIMATORS[estimator](*map(jnp.asarray, (*logprobs(), logprobs()[0]))), 0)
    assert abs(divergence).max() > 0.1
    expected = -0.3 * divergence
    for row, length in enumerate([3, 6, 2, 5]):
        expected[row, length - 1] += SCORES[row]
    assert np.issubdtype(rewards.dtype, np.floating)  # a score added to integers would be rounded
    np.testing.assert_allclose(rewards, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics["objective/kl"], divergence.sum(axis=1).mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["objective/rlhf_reward"], expected.sum(axis=1).mean(), rtol=1e-4)
    # What was cut off is left out of the losses, and of the whitening.
    np.testing.assert_array_equal(batch.loss_mask, mask & ENDED[:, None])
    np.testing.assert_allclose(batch.advantages[batch.loss_mask].std(), 1, rtol=1e-3)
    # The sampler's log-probabilities are said to be -2.
    apart = np.where(mask, logprobs()[0] + 2, 0)
    np.testing.assert_allclose(batch.weights, np.minimum(np.exp(apart), 1.5), rtol=1e-5)
    np.testing.assert_allclose(metrics["sampling/sampling_logp_difference/mean"], abs(apart)[mask].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["sampling/sampling_logp_difference/max"], abs(apart).max(), rtol=1e-5)


def test_the_samplers_logprobs_save_a_forward_pass_and_are_the_old_ones_everywhere(monkeypatch):
    passes, forward = [], PolicyNetwork.response_hidden

    def counted(*args, **kwargs):
        passes.append(args)
        return forward(*args, **kwargs)

    monkeypatch.setattr(PolicyNetwork, "response_hidden", counted)

    def by(program, networks):
        config = tiny.with_config(old_logprobs=program, kl_coef=0.3, missing_eos_penalty=0.0)
        passes.clear()
        return *experience(config, networks), len(passes)

    batch, rewards, metrics, count = by("sampler", tiny.NETWORKS)
    learners, _, _, with_learners = by("learner", tiny.NETWORKS)
    assert (count, with_learners) == (1, 2)  # the reference's is left
    np.testing.assert_allclose(batch.values.old, learners.values.old, rtol=1e-6)
    mask, reference = np.asarray(ROLLOUT.response_mask), logprobs()[1]
    np.testing.assert_array_equal(batch.logprobs, np.full(mask.shape, -2.0))
    assert batch.weights is None
    penalty = np.where(mask, -0.3 * (-2 - reference), 0)
    np.testing.assert_allclose(rewards.sum(axis=1), penalty.sum(axis=1) + SCORES, rtol=1e-5)
    np.testing.assert_allclose(metrics["objective/kl"], -penalty.sum(axis=1).mean() / 0.3, rtol=1e-5)
    np.testing.assert_allclose(metrics["objective/entropy"], 2 * mask.sum() / 4, rtol=1e-6)
    assert not any(name.startswith("sampling/") for name in metrics)  # the first minibatch has it
    # Values on the policy's own trunk need the pass all the same.
    (batch, _, _, count), (learners, _, _, with_learners) = (by(program, SHARED) for program in ("sampler", "learner"))
    assert count == with_learners == 2
    np.testing.assert_allclose(batch.values.old, learners.values.old, rtol=1e-6)


def random_batch(rows: int = 8) -> Experience:
    """Responses of very different lengths, off-policy, with weights and a penalty in the loss."""
    rng = np.random.default_rng(0)
    prompts, mask = tiny.prompts(rows), tiny.prefix_mask(rng, rows, tiny.RESPONSE)
    arrays = [jnp.asarray(rng.normal(size=mask.shape), jnp.float32) for _ in range(5)]
    old, ref = (-2 + 0.3 * array for array in arrays[:2])
    response = rng.integers(4, tiny.VOCAB, mask.shape).astype(np.int32)
    rollout = Rollout(*map(jnp.asarray, (prompts.tokens, prompts.mask, response, mask)))
    weights = jnp.exp(0.1 * arrays[4])
    return Experience(joined(rollout), old, arrays[2], jnp.asarray(mask), None, ref, weights)


@functools.cache
def loss_and_gradient(aggregation, micro_batch, entropy_coef=0.3):
    config = tiny.with_config(entropy_coef=entropy_coef, kl_in="loss", kl_estimator="k3")
    method = tiny.build_method(config)
    learner = dataclasses.replace(method.learner, aggregation=AGGREGATIONS[aggregation])
    at = tiny.iteration(config, networks=tiny.CRITIC_FREE, method=dataclasses.replace(method, learner=learner))

    def run(params, batch):
        value, metrics, grads = gradients(
            with_micro_batch(micro_batch),
            lambda params, rows: learner.loss(at, params, rows, None, whole=batch, kl_coef=0.5),
            params,
            batch,
            lambda rows: learner.weight(rows, ()),
            (),
        )
        return value, values(metrics), grads

    return jax.device_get(jax.jit(run)({"policy": tiny.policy_params()}, random_batch()))


@pytest.mark.nightly
@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_micro_batches_of_unequal_lengths_give_the_whole_gradient(aggregation):
    whole, parts = loss_and_gradient(aggregation, None), loss_and_gradient(aggregation, 2)
    whole[1].pop("val/ratio_var"), parts[1].pop("val/ratio_var")  # a variance within parts is not the batch's
    assert_close(parts, whole)


def test_the_loss_is_its_terms_and_pads_count_in_none():
    loss, metrics, _ = loss_and_gradient("token", None)
    batch, mask = random_batch(), np.asarray(random_batch().loss_mask)
    stats = jax.jit(functools.partial(tiny.POLICY.response_stats, temperature=1.0))
    stats = stats(tiny.policy_params(), batch.sequences)
    ratio = np.exp(np.asarray(stats.logprobs) - batch.logprobs)
    bounded = np.clip(ratio, 0.8, 1.2)
    policy = np.asarray(batch.weights) * -np.minimum(ratio * batch.advantages, bounded * batch.advantages)
    clipped = (bounded * batch.advantages < ratio * batch.advantages)[mask]
    assert batch.ref_logprobs is not None
    divergence = kl.k3(stats.logprobs, batch.ref_logprobs)
    np.testing.assert_allclose(metrics["loss/policy_avg"], policy[mask].mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["loss/kl_avg"], np.asarray(divergence)[mask].mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["policy/entropy_avg"], np.asarray(stats.entropy)[mask].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["policy/clipfrac_avg"], clipped.mean(), rtol=1e-5)
    terms = metrics["loss/policy_avg"] + 0.5 * metrics["loss/kl_avg"] - 0.3 * metrics["policy/entropy_avg"]
    np.testing.assert_allclose(loss, terms, rtol=1e-5)


def test_the_estimator_chooses_the_penaltys_value_and_gradient_and_reads_no_padding():
    rng, mask = np.random.default_rng(0), jnp.asarray(tiny.prefix_mask(np.random.default_rng(1), 4, 5))
    logprobs, old, ref = (jnp.where(mask, -2 + 0.4 * rng.normal(size=(4, 5)), jnp.nan) for _ in range(3))
    batch = {"logprobs": old, "advantages": jnp.zeros(mask.shape), "loss_mask": mask, "ref_logprobs": ref}

    def found(estimator):
        config = tiny.group_config("grpo", kl_estimator=estimator, aggregation="token", kl_coef=0.5)
        loss = functools.partial(tiny.given_loss, config, batch=batch)
        (_, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.where(mask, logprobs, 0))
        assert np.isfinite(gradient).all() and not np.asarray(gradient)[~np.asarray(mask)].any()
        return metrics["loss/kl_avg"], gradient

    (k2, of_k2), (k3, of_k3), (straight, of_straight), (weighted, of_weighted) = map(
        found, ("k2", "k3", "k3+", "k3_weighted")
    )
    assert straight == k3 and abs(k2 - k3) > 1e-3 and abs(weighted - k3) > 1e-3
    np.testing.assert_array_equal(of_straight, of_k2)
    ratio, tokens = jnp.exp(logprobs - old), jnp.sum(mask)
    np.testing.assert_allclose(
        of_weighted, jnp.where(mask, 0.5 * ratio * (logprobs - ref), 0) / tokens, rtol=1e-4, atol=1e-6
    )
    assert np.abs(of_k3 - of_k2).max() > 1e-3


def test_the_bonus_is_the_gradient_of_the_entropy():
    with_bonus, without = (loss_and_gradient("token", None, coef)[2] for coef in (0.3, 0.0))
    batch = random_batch()

    def entropy(params):
        logits = batch_logits(params["policy"], batch.sequences)
        logprobs = jax.nn.log_softmax(logits)
        each = -jnp.sum(jnp.exp(logprobs) * jnp.where(logits < -1e30, 0, logprobs), axis=-1)
        return jnp.sum(jnp.where(batch.loss_mask, each, 0)) / jnp.sum(batch.loss_mask)

    expected = jax.jit(jax.grad(entropy))({"policy": tiny.policy_params()})
    difference = jax.tree.map(lambda a, b: (b - a) / 0.3, with_bonus, without)
    assert_close(difference, jax.device_get(expected), 1e-4)


def batch_logits(params, sequences):
    hidden = tiny.POLICY.response_hidden(params, sequences)
    logits = jnp.einsum("btd,vd->btv", hidden, params["embedding"])
    return jnp.where(tiny.POLICY.allowed[None, None], logits, -1e31)


@pytest.mark.nightly
def test_warm_up_of_the_values_a_shared_trunk_and_the_pretraining_mix():
    """The first iteration moves the value head alone; a mix with a large coefficient then learns the demonstrations."""
    controller, mix = AdaptiveKL(6.0, 100.0), PretrainingMix(coef=10.0, batch_size=16)
    optimizer = dataclasses.replace(tiny.OPTIMIZER, learning_rate=1e-2, weight_decay=0.1)
    config = tiny.with_config(
        value_trunk="shared", value_warmup=1, ptx=mix, kl_controller=controller, optimizer=optimizer
    )
    start = start_value(config, Policy(tiny.POLICY, tiny.policy_params(), None), None, jax.random.key(0))  # type: ignore[arg-type]
    assert start.network == "shared"
    step = jax.jit(tiny.ppo_step(config, networks=SHARED))
    state = tiny.iteration(config).init_state({"policy": tiny.policy_params(), "value": start.params})
    states, losses = [state], []
    for _ in range(8):
        state, metrics, _ = step(
            state, tiny.ppo_frozen(), OnlineBatch(tiny.prompts(16), demonstrations()), jax.random.key(0)
        )
        states.append(state)
        losses.append(float(metrics["loss/ptx_avg"]))

    def moved(name, first, second):
        changes = jax.tree.map(
            lambda a, b: float(jnp.abs(a - b).max()), states[first].params[name], states[second].params[name]
        )
        return max(jax.tree.leaves(changes))

    assert moved("policy", 0, 1) == 0 and moved("value", 0, 1) > 0
    assert moved("policy", 1, 2) > 0 and moved("value", 1, 2) > 0
    assert losses[0] > losses[1] - 1e-6 > losses[-1] + 0.1
    assert float(states[-1].controller["kl_coef"]) != config.kl_coef


def test_a_controllers_state_is_saved_and_read_back(tmp_path):
    config = tiny.with_config(kl_controller=AdaptiveKL(6.0, 100.0))
    state = tiny.ppo_state(config)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(state._replace(step=jnp.int32(3), controller={"kl_coef": jnp.float32(0.12345679)}))
    checkpoints.close()
    again = Checkpoints(tmp_path / "checkpoints", keep=1)
    restored = again.restore(3, abstract(state))
    again.close()
    assert float(restored.controller["kl_coef"]) == float(np.float32(0.12345679))
    assert_close(jax.device_get(restored.params), jax.device_get(state.params), 0)


def test_where_a_value_function_starts():
    policy: Any = Policy(tiny.POLICY, tiny.policy_params(), None)  # type: ignore[arg-type]
    reward: Any = RewardModel(tiny.REWARD, tiny.reward_params(), None)  # type: ignore[arg-type]

    def start(judge=reward, **changes):
        return start_value(tiny.with_config(**changes), policy, judge, jax.random.key(0))

    def body(value):
        return np.asarray(value.params["body"]["embedding"])

    default, own = start(), start(value_trunk="policy")
    np.testing.assert_array_equal(body(default), reward.params["body"]["embedding"])
    np.testing.assert_array_equal(body(own), policy.params["embedding"])
    for value in (default, own):
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(value.params["head"]))
    drawn = np.asarray(start(value_head="normal").params["head"]["kernel"])
    assert 0.1 < drawn.std() < 0.5  # 17 ** -0.5 is 0.24
    whole = start(value_head="reward_model")
    assert_close(jax.device_get(whole.params), jax.device_get(reward.params), 0)
    with pytest.raises(RlhfError, match="does not read the policy's tokens"):
        start(None, value_head="reward_model")
    with pytest.raises(ValueError, match="value_head = 'reward_model' reads the reward model's trunk"):
        tiny.with_config(value_trunk="shared", value_head="reward_model")


def test_whitening_and_clipping_are_choices():
    plain, white = (experience(tiny.with_config(kl_coef=0.3, whiten_rewards=flag))[0] for flag in (False, True))
    mask = np.asarray(ROLLOUT.response_mask)
    np.testing.assert_allclose(white.advantages[mask].mean(), 0, atol=1e-5)
    assert np.abs(plain.advantages - white.advantages).max() > 1e-3
    raw = experience(tiny.with_config(whiten_advantages=False))[0]
    assert abs(raw.advantages[mask].mean()) > 0.1
    learner = tiny.build_method(tiny.with_config(clip_ratio_high=0.3, value_clip=None)).learner
    assert learner.value_clip == np.inf
    assert learner.policy_loss.keywords == {"clip_ratio": 0.2, "clip_ratio_high": 0.3, "dual_clip": np.inf}
    assert tiny.build_method(tiny.with_config(dual_clip=3.0)).learner.policy_loss.keywords["dual_clip"] == 3.0
    with pytest.raises(ValueError, match=r"dual_clip = 1.25 must be above 1 \+ clip_ratio_high = 1.3"):
        tiny.with_config(dual_clip=1.25, clip_ratio_high=0.3)
