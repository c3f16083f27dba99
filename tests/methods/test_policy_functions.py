"""A user's own policy loss and advantage estimator, from files, as `group_rl` runs them."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from rlhf_jax import experiment
from rlhf_jax.config import FunctionSource
from rlhf_jax.methods.policy_functions import find_advantage, find_policy_loss
from rlhf_jax.types import RlhfError
from tests.support import experiments, tiny
from tests.support.padded_arrays import WIDTH, normal, prefix_mask

EXAMPLES = Path(__file__).parents[2] / "examples"
LOSS = FunctionSource(f"{EXAMPLES}/policy_loss.py:tapered")
ADVANTAGE = FunctionSource(f"{EXAMPLES}/advantage.py:optimal_baseline")
OWN = """
import jax.numpy as jnp
from rlhf_jax.core.policy_losses import TokenLosses, ppo_clip

def as_ppo(logprobs, old_logprobs, advantages, response_mask, *, clip_ratio, clip_ratio_high):
    bounds = {"clip_ratio": clip_ratio, "clip_ratio_high": clip_ratio_high, "dual_clip": jnp.inf}
    return ppo_clip(logprobs, old_logprobs, advantages, response_mask, **bounds)

def summed(logprobs, old_logprobs, advantages, response_mask):
    return jnp.sum(logprobs)

def discounted(rewards, response_mask, *, gamma): return gamma * rewards
def a_response(rewards, response_mask): return rewards[:, 0]
def misspelt(rewards, mask): return rewards
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    return lambda name: FunctionSource(f"{tmp_path}/mine.py:{name}")


def arrays():
    mask = prefix_mask([WIDTH, 3, 1, 2, 5, 4])
    logprobs, old, advantages = (jnp.where(mask, normal(seed, 6, WIDTH), jnp.nan) for seed in range(3))
    return logprobs, old, advantages, mask


def test_the_example_of_a_loss_is_its_formula():
    logprobs, old, advantages, mask = arrays()
    weigh = find_policy_loss(LOSS).function
    total, gradient = jax.value_and_grad(lambda x: jnp.sum(weigh(x, old, advantages, mask).losses))(logprobs)
    expected = np.zeros(mask.shape)
    for row, token in np.argwhere(np.asarray(mask)):
        tokens = np.asarray(mask)[row]
        ratio = np.exp((np.asarray(logprobs)[row] - np.asarray(old)[row])[tokens].sum())
        advantage = float(advantages[row, token])
        expected[row, token] = -(1 if advantage > 0 else min(ratio, 1)) * advantage
    np.testing.assert_allclose(gradient, expected, rtol=1e-4)
    np.testing.assert_allclose(total, np.nansum(expected * np.asarray(logprobs)), rtol=1e-4)


def test_the_example_of_an_estimator_is_its_formula():
    rewards, _, _, mask = arrays()
    spec = find_advantage(ADVANTAGE)
    assert (spec.needs_groups, spec.discounted) == (True, False)
    found = spec.function(rewards, mask, num_generations=3, axes=())
    returns, lengths = np.nansum(np.asarray(rewards), axis=1), np.asarray(mask).sum(axis=1)
    for rows in (slice(0, 3), slice(3, 6)):
        baseline = (lengths * returns)[rows].sum() / lengths[rows].sum()
        expected = np.where(np.asarray(mask)[rows], (returns[rows] - baseline)[:, None], 0)
        np.testing.assert_allclose(found[rows], expected, rtol=1e-4, atol=1e-5)


def test_a_users_functions_train_as_the_packages_own_do(own):
    """PPO's loss from a user's file gives the numbers of the package's; the examples change the update."""

    def step(**changes):
        config = tiny.group_config("grpo", iterations=1, **changes)
        at = tiny.iteration(config)
        state, frozen = at.init_state({"policy": tiny.policy_params()}), tiny.ppo_frozen()
        state, metrics, _ = jax.jit(at.step(tiny.REWARD))(state, frozen, tiny.online(4), jax.random.key(0))
        assert all(np.isfinite(value) for value in metrics.values())
        return jax.device_get((state.params, metrics))

    builtin, mine, examples = step(), step(policy_loss=own("as_ppo")), step(policy_loss=LOSS, advantage=ADVANTAGE)
    jax.tree.map(np.testing.assert_array_equal, mine, builtin)
    change = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), examples[0], builtin[0])
    assert max(jax.tree.leaves(change)) > 1e-4


def test_options_reach_an_own_function_and_those_it_does_not_read_are_refused(own):
    config = tiny.group_config("grpo", policy_loss=own("as_ppo"), clip_ratio=0.1)
    assert tiny.build_method(config).learner.policy_loss.keywords == {"clip_ratio": 0.1, "clip_ratio_high": 0.2}
    config = tiny.group_config("grpo", advantage=own("discounted"), gamma=0.5, num_generations=1)
    rewards, mask = jnp.ones((2, 3)), jnp.ones((2, 3), bool)
    advantages = tiny.build_method(config).learner.advantages(rewards, rewards, mask, mask, ())
    np.testing.assert_array_equal(advantages.advantages, 0.5)
    for changes, message in (
        ({"policy_loss": own("as_ppo"), "dual_clip": 3.0}, r"dual_clip has no effect with policy_loss = '.*:as_ppo'"),
        ({"policy_loss": LOSS, "clip_ratio": 0.1}, r"clip_ratio has no effect with policy_loss = '.*:tapered'"),
        ({"advantage": ADVANTAGE, "gamma": 0.5}, r"gamma has no effect with advantage = '.*:optimal_baseline'"),
        ({"advantage": ADVANTAGE, "num_generations": 1}, "num_generations = 1 must be at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny.group_config("grpo", **changes)


def test_a_wrong_function_is_one_message_with_what_it_should_be(own):
    expected = r"mine.py:misspelt has the signature \(rewards, mask\): write `def misspelt\(rewards, response_mask, \*"
    with pytest.raises(RlhfError, match=f"advantage estimator .*{expected}"):
        tiny.group_config("grpo", advantage=own("misspelt"))
    signature = (
        r"write `def discounted\(logprobs, old_logprobs, advantages, response_mask, \*, ...\)`, where ... may be"
    )
    with pytest.raises(RlhfError, match=f"policy loss .*{signature} clip_ratio, clip_ratio_high, dual_clip"):
        tiny.group_config("grpo", policy_loss=own("discounted"))
    logprobs, old, advantages, mask = arrays()
    with pytest.raises(
        RlhfError, match=r"mine.py:summed returned an array of shape \(\) for .* \(6, 6\): return .*\.TokenLosses"
    ):
        find_policy_loss(own("summed")).function(logprobs, old, advantages, mask)
    with pytest.raises(RlhfError, match=r"mine.py:a_response returned an array of shape \(6,\) for rewards of shape"):
        find_advantage(own("a_response")).function(logprobs, mask, num_generations=3, axes=())


def test_a_changed_file_is_another_stage(own, tmp_path, monkeypatch):
    """Relative paths are read from the working directory, as those of rewards."""
    own("as_ppo")
    monkeypatch.chdir(tmp_path)
    model, judge = experiments.models(tmp_path)
    section = {name: value for name, value in tiny.GROUP_RL.items() if name not in ("optimizer", "loop")}
    section |= {"optimizer": experiments.OPTIMIZER, "loop": experiments.LOOP, "policy": model, "reward_model": judge}
    section |= {"method": "grpo", "policy_loss": "mine.py:as_ppo", "advantage": ADVANTAGE, "iterations": 4}
    data = experiments.questions(tmp_path / "questions.jsonl", 4)
    common: dict[str, Any] = {"seed": 0, "seeds": 1, "stages": ("rl",), "runtime": experiments.RUNTIME}
    common["data"] = dataclasses.asdict(experiments.data_config(data))

    def inputs():
        return experiment.parse(ConfigDict({**common, "rl": section})).identity("rl", str).inputs

    before = inputs()
    assert {"mine.py:as_ppo", ADVANTAGE} <= before.keys()
    (tmp_path / "mine.py").write_text(OWN + "# changed")
    changed = {name for name, found in inputs().items() if before[name] != found}
    assert changed == {"mine.py:as_ppo"}
