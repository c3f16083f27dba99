"""One optimiser for policy and values or one each, and a warm-up of the values that costs the policy nothing."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.interop import hf
from rlhf_jax.methods.policy_optimizer import learning_rates, make_optimizer
from rlhf_jax.runtime.optimizers import NORMS_AND_BIASES, learning_rate, update
from rlhf_jax.stages import ppo
from tests.support import experiments, tiny
from tests.support.programs import PLACEMENTS, assert_close, run_ppo

ADAM = dataclasses.replace(tiny.OPTIMIZER, learning_rate=1e-2, epsilon=1e-8, weight_decay=0.1)
KEY = jax.random.key(0)


def config_of(**changes) -> ppo.PPOConfig:
    return tiny.with_config(**{"minibatches": 1, "epochs": 1, "optimizer": ADAM, **changes})


def optimizer_of(config: ppo.PPOConfig):
    return make_optimizer(config, tiny.build_method(config))


def normal(seed: int, scale: float = 1.0):
    draw = np.random.default_rng(seed).normal
    return {"kernel": jnp.float32(scale * draw(size=(3, 2))), "bias": jnp.float32(scale * draw(size=2))}


PARAMS = {"policy": normal(0), "value": normal(1)}


def steps(config: ppo.PPOConfig, gradients: list) -> list:
    """The parameters after each update, those before the first one first."""
    optimizer, states = optimizer_of(config), [PARAMS]
    state = optimizer.init(PARAMS)
    step = jax.jit(lambda grads, params, state: update(optimizer, grads, params, state, (), key=KEY)[:2])
    for grads in gradients:
        params, state = step(grads, states[-1], state)
        states.append(params)
    return states


def moved(states: list, name: str, index: int):
    """Return the change of a network in one update; a negative index counts from the end."""
    return jax.tree.map(lambda a, b: np.asarray(b - a), states[index - 1][name], states[index][name])


def assert_equal(one, other, tolerance: float = 0.0):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=1e-7 * bool(tolerance)), one, other)


@pytest.mark.parametrize("value_optimizer", [None, dataclasses.replace(ADAM, learning_rate=3e-2)])
@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_after_a_warm_up_of_the_values_the_policys_optimiser_is_fresh(schedule, value_optimizer):
    """Moments, counts and schedule: the next updates are those of a run of as many iterations without warm-up."""
    own = dataclasses.replace(ADAM, schedule=schedule, warmup_steps=2)
    policy_grads = [normal(10 + k) for k in range(4)]
    zeros = jax.tree.map(jnp.zeros_like, PARAMS["policy"])
    warm = config_of(iterations=204, value_warmup=200, optimizer=own, value_optimizer=value_optimizer)
    cold = config_of(iterations=4, optimizer=own, value_optimizer=value_optimizer)
    small = jax.tree.map(lambda leaf: 1e-3 * leaf, normal(20))
    warming, training = ([{"policy": g, "value": small} for g in each] for each in ([zeros] * 200, policy_grads))
    after, fresh = steps(warm, warming + training), steps(cold, training)
    assert_equal(after[200]["policy"], PARAMS["policy"])
    assert not np.allclose(after[200]["value"]["kernel"], PARAMS["value"]["kernel"])
    for index in range(-4, 0):
        assert_equal(moved(after, "policy", index), moved(fresh, "policy", index), 1e-5)


@pytest.mark.nightly
def test_the_first_update_after_a_warm_up_has_the_size_of_adams_first_one():
    """Every weight moves by the learning rate, whatever its gradient; with spent bias corrections, by 0.55 of it."""
    config = config_of(iterations=6, value_warmup=4, optimizer=dataclasses.replace(ADAM, weight_decay=0.0))
    step, state = jax.jit(tiny.ppo_step(config)), tiny.ppo_state(config)
    said = []
    for _ in range(5):
        state, metrics, _ = step(state, tiny.ppo_frozen(), tiny.online(16), KEY)
        said.append((float(metrics["learning_rate"]), float(metrics["grad_norm/policy"])))
    change = jax.tree.map(lambda a, b: np.abs(a - b).max(), tiny.policy_params(), state.params["policy"])
    np.testing.assert_allclose(max(jax.tree.leaves(change)), ADAM.learning_rate, rtol=0.01)
    assert said[:4] == [(0.0, 0.0)] * 4 and said[4][0] == np.float32(ADAM.learning_rate) and said[4][1] > 0


def test_the_shared_optimiser_is_what_it_was_bit_for_bit():
    config = config_of(iterations=5)
    plain = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            learning_rate(ADAM, 5),
            eps=1e-8,
            weight_decay=0.1,
            mask={name: {"kernel": True, "bias": False} for name in PARAMS},
        ),
    )
    given = [{"policy": normal(k), "value": normal(k + 50, 30.0)} for k in range(5)]
    params, state = PARAMS, plain.init(PARAMS)

    @jax.jit
    def step(grads, params, state):
        updates, state = plain.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for grads in given:
        params, state = step(grads, params, state)
    assert_equal(steps(config, given)[-1], params)
    assert NORMS_AND_BIASES in ADAM.no_decay


def test_a_large_gradient_of_the_values_shrinks_the_policys_update_only_where_they_share_a_bound():
    plain = dataclasses.replace(ADAM, name="sgd", epsilon=1e-8, weight_decay=0.0)
    value = dataclasses.replace(plain, learning_rate=1e-3, max_grad_norm=0.5, schedule="linear")
    policy_grads = normal(3, 0.1)

    def policy_moves(value_optimizer, scale):
        states = steps(
            config_of(optimizer=plain, value_optimizer=value_optimizer),
            [{"policy": policy_grads, "value": normal(4, scale)}],
        )
        return moved(states, "policy", 1), moved(states, "value", 1)

    alone = jax.tree.map(lambda leaf: -plain.learning_rate * leaf, policy_grads)
    assert_equal(policy_moves(None, 1e-3)[0], alone, 1e-5)
    ratio = optax.tree.norm(policy_moves(None, 1e3)[0]) / optax.tree.norm(alone)
    assert ratio < 1e-2
    apart, of_value = policy_moves(value, 1e3)
    assert_equal(apart, alone, 1e-5)
    np.testing.assert_allclose(optax.tree.norm(of_value), 1e-3 * 0.5, rtol=1e-5)  # its own rate and bound


def test_both_rates_are_logged():
    value = dataclasses.replace(ADAM, learning_rate=0.5, schedule="linear")
    config = config_of(iterations=10, epochs=2, value_warmup=4, value_optimizer=value)
    method = tiny.build_method(config)
    for step, own in ((0, 0.0), (3, 0.0), (4, 1e-2), (9, 1e-2)):
        found = learning_rates(config, method, jnp.int32(step))
        np.testing.assert_allclose(
            [found["learning_rate"], found["learning_rate/value"]], [own, 0.5 * (1 - step / 10)], rtol=1e-6
        )
    shared = config_of(iterations=10)
    assert set(learning_rates(shared, tiny.build_method(shared), jnp.int32(0))) == {"learning_rate"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"value_optimizer": dataclasses.replace(ADAM, micro_batch=4)},
            "value_optimizer.micro_batch = 4 has no effect",
        ),
        (
            {"value_optimizer": dataclasses.replace(ADAM, freeze=("x",))},
            "value_optimizer.freeze = ('x',) has no effect",
        ),
        (
            {"value_optimizer": dataclasses.replace(ADAM, low_precision="stochastic")},
            "value_optimizer.low_precision = 'stochastic' has no effect",
        ),
        ({"value_warmup": 20}, "value_warmup = 20 leaves none of iterations = 20 to the policy"),
    ],
)
def test_what_would_do_nothing_is_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config_of(**changes)


def test_frozen_parameters_of_both_networks_are_named_in_one_place():
    frozen = dataclasses.replace(ADAM, freeze=("policy/bias", "value/kernel"))
    value = dataclasses.replace(ADAM, learning_rate=3e-2)
    for changes in ({}, {"value_optimizer": value}, {"value_warmup": 1}):
        config = config_of(optimizer=frozen, **changes)
        after = steps(config, [{"policy": normal(5), "value": normal(6)}] * 2)[-1]
        same = {(n, k) for n in PARAMS for k in PARAMS[n] if np.array_equal(PARAMS[n][k], after[n][k])}
        assert same == {("policy", "bias"), ("value", "kernel")}


@pytest.mark.nightly
@pytest.mark.parametrize("where", ["fsdp=4 x tensor=2", "pmap=8"])
def test_a_critic_of_its_own_and_a_warm_up_on_several_devices(where):
    config = config_of(iterations=3, value_warmup=1, value_optimizer=dataclasses.replace(ADAM, learning_rate=3e-3))
    one, several = (run_ppo(each, config, 2) for each in (tiny.ONE_DEVICE, PLACEMENTS[where]))
    assert_close(several[:2], one[:2], 1e-4)


@pytest.mark.nightly
def test_two_seeds_from_bfloat16_checkpoints_with_a_critic_of_their_own_resume_exactly(tmp_path):
    """PPO as a stage: policy and critic are float32, the warm-up holds the policy, and a killed run goes on."""
    places = []
    kinds: tuple[hf.Role, ...] = ("policy", "reward")
    for kind, place in zip(kinds, map(Path, experiments.models(tmp_path)), strict=True):
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), hf.load_pretrained(str(place)).params)
        places.append(tmp_path / f"half {kind}")
        hf.save_pretrained(places[-1], kind, params, hf.read_config(place))
        for file in place.iterdir():
            if not (places[-1] / file.name).exists():
                shutil.copy(file, places[-1])
    section = {
        "kind": "ppo",
        "policy": str(places[0]),
        "reward_model": str(places[1]),
        "iterations": 4,
        "batch_size": 8,
        "minibatches": 2,
        "epochs": 1,
        "temperature": 1.0,
        "kl_coef": 0.1,
        "gamma": 1.0,
        "gae_lambda": 0.95,
        "clip_ratio": 0.2,
        "value_clip": 0.2,
        "vf_coef": 0.1,
        "value_warmup": 2,
        "value_optimizer": experiments.OPTIMIZER | {"learning_rate": 1e-2},
        "optimizer": experiments.OPTIMIZER,
        "samples_every": 1,
        "samples_written": 2,
        "loop": {"steps_per_call": 1, "checkpoint_every": 3},
    }
    data = experiments.questions(tmp_path / "questions.jsonl", 24)
    stage = experiments.run(tmp_path / "run", data, {"ppo": section}, seeds=2).find("ppo")
    items = experiments.final_state(stage)[1]
    leaves = jax.tree.leaves((items["policy"], items["value"], items["rest"]["opt_state"]))
    assert {leaf.dtype.name for leaf in leaves} == {"float32", "int32"}
    assert json.loads((stage / "model.json").read_text())["config"]["param_dtype"] == "float32"
    rows = experiments.rows(stage / "metrics.jsonl")
    assert [row["learning_rate"] > 0 for row in rows if row["seed"] == 1] == [False, False, True, True]
    assert all(row["update_survived"] > 0.99 and row["grad_norm/value"] > 0 for row in rows)
    experiments.assert_resumes(tmp_path / "run", data, {"ppo": section}, seeds=2)
