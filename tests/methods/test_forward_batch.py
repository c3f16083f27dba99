"""Forward passes of an iteration in slices of `forward_batch` responses: the same results in less memory."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import config as configs
from rlhf_jax.methods import two_steps
from rlhf_jax.methods.offline import Updates
from rlhf_jax.runtime.programs import SEED_AXIS, make_placement
from rlhf_jax.runtime.two_programs import TwoPrograms
from rlhf_jax.sampling import buckets
from rlhf_jax.stages import kto, online_dpo
from rlhf_jax.types import RlhfError, UnpairedBatch
from tests.support import tiny
from tests.support.programs import PLACEMENTS, assert_close, run_ppo

ROWS = 16
STOPS = (2, 4, 5, 6, 7, 8)  # about half of all tokens end a response
ONLINE_DPO = online_dpo.OnlineDPOConfig(
    **{name: getattr(tiny.PPO, name) for name in ("policy", "reward_model", "iterations", "optimizer", "loop")},
    **{"minibatches": 1, "epochs": 2, "temperature": 1.0, "samples_every": 1, "samples_written": 4},
    kind="online_dpo",
    batch_size=ROWS // 2,
    beta=0.1,
)
CASES = {
    "ppo": tiny.with_config(minibatches=1, epochs=1),
    "grpo": tiny.group_config("grpo", minibatches=2),
    "sampler": tiny.with_config(old_logprobs="sampler"),
    "dapo": tiny.group_config("dapo", dynamic_sampling_rounds=2),
    "online_dpo": ONLINE_DPO,
}


def iteration_of(name: str, loop_axes=(), **changes):
    config: Any = dataclasses.replace(CASES[name], **changes)
    method = online_dpo.build_method(config) if name == "online_dpo" else tiny.build_method(config)
    networks = dataclasses.replace(tiny.NETWORKS, stop_ids=STOPS)
    if name not in ("ppo", "sampler"):
        networks = dataclasses.replace(networks, value=None)
    return tiny.iteration(config, (), loop_axes, networks, method)


def run(iteration, *, packs=False, seeds=1):
    """Parameters, metrics and samples of one iteration, in one program, or in two with packed rows."""
    params = {"policy": tiny.policy_params()}
    if iteration.networks.value is not None:
        params["value"] = tiny.REWARD.init_value(tiny.reward_params())
    group, rounds = iteration.method.num_generations, iteration.method.dynamic_sampling
    batch = tiny.online(ROWS // group * (2 if rounds else 1))
    if rounds:
        batch = jax.tree.map(lambda leaf: leaf.reshape(2, -1, *leaf.shape[1:]).swapaxes(0, 1), batch)
    state, key = iteration.init_state(params), jax.random.key(0)
    if seeds > 1:
        state, batch = jax.tree.map(lambda leaf: jnp.stack([leaf] * seeds), (state, batch))
        key = jnp.stack([jax.random.key(seed) for seed in range(seeds)])
    placement = make_placement(tiny.ONE_DEVICE, seeds)
    state, frozen = placement.put_state(state), placement.put_frozen(tiny.ppo_frozen())
    if packs:
        steps = two_steps.scored_by_network(iteration, tiny.REWARD, two_steps.fit_of(iteration, 1))
        program = TwoPrograms(placement, steps)
    else:
        program = placement.compile(iteration.step(tiny.REWARD), state)
    state, metrics, samples = program(state, frozen, tiny.several([jax.device_get(batch)]), key)
    return jax.device_get((state.params, metrics, samples))


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found[2].rollout, expected[2].rollout)
    uneven = ("rewards/accuracies", "token_share")  # equal responses of a pair win or lose by rounding
    one, other = (({k: v for k, v in each[1].items() if k not in uneven}, each[0]) for each in (found, expected))
    assert_close(one, other, 1e-4)


SLOW = ("sampler", "dapo", "online_dpo", "grpo", "ppo")
EACH = [pytest.param(name, marks=pytest.mark.nightly) if name in SLOW else name for name in CASES]


@pytest.mark.parametrize("name", EACH)
def test_slices_give_the_iteration_of_the_whole_batch(name):
    assert_same(run(iteration_of(name, forward_batch=4)), run(iteration_of(name)))


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_packed_slices_are_groups_of_their_own(name, monkeypatch):
    monkeypatch.setattr(buckets, "LEAST", 1)
    iteration = iteration_of(name, forward_batch=8)
    assert_same(run(iteration, packs=True), run(iteration_of(name)))


@pytest.mark.nightly
@pytest.mark.parametrize("packs", [False, True])
def test_seeds_that_train_at_once_have_slices(packs, monkeypatch):
    monkeypatch.setattr(buckets, "LEAST", 1)
    sliced = run(iteration_of("ppo", (SEED_AXIS,), forward_batch=4), packs=packs, seeds=2)
    assert_same(sliced, run(iteration_of("ppo", (SEED_AXIS,)), seeds=2))


@pytest.mark.nightly
@pytest.mark.parametrize("where", PLACEMENTS)
def test_devices_have_a_share_of_every_slice(where):
    config = tiny.with_config(forward_batch=8)
    assert_same(run_ppo(PLACEMENTS[where], config), run_ppo(tiny.ONE_DEVICE))


WIDE = dataclasses.replace(tiny.MODEL, d_ff=2048)
MANY = 64
ACTIVATIONS = MANY * (tiny.PROMPT + tiny.RESPONSE) * WIDE.d_ff * 4
"""Bytes of the widest activations of all rows."""


def temporary(step, *args) -> int:
    """Bytes of the temporary arrays of a compiled step."""
    analysis = jax.jit(step).lower(*args, jax.random.key(0)).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


@pytest.mark.nightly
def test_memory_of_an_iteration_is_that_of_a_slice():
    policy = dataclasses.replace(tiny.POLICY, config=WIDE)
    value = reward = dataclasses.replace(tiny.REWARD, config=WIDE)
    networks = dataclasses.replace(tiny.NETWORKS, policy=policy, value=value)
    params = jax.eval_shape(lambda key: {"policy": policy.init(key), "value": value.init(key)}, jax.random.key(0))
    frozen = {"reference": params["policy"], "reward": params["value"]}

    def of(forward_batch: int | None) -> int:
        optimizer = tiny.with_micro_batch(4, name="sgd", epsilon=1e-8)
        config = tiny.with_config(
            batch_size=MANY, minibatches=1, epochs=1, optimizer=optimizer, forward_batch=forward_batch
        )
        iteration = tiny.iteration(config, networks=networks)
        state = jax.eval_shape(iteration.init_state, params)
        return temporary(iteration.step(reward), state, frozen, tiny.online(MANY))

    assert of(4) < 0.5 * ACTIVATIONS < ACTIVATIONS < of(None)


@pytest.mark.nightly
def test_kto_reads_its_reference_point_in_micro_batches():
    policy = dataclasses.replace(tiny.POLICY, config=WIDE)
    params = jax.eval_shape(lambda key: {"policy": policy.init(key)}, jax.random.key(0))
    frozen = {"reference": params["policy"], "beta": jnp.float32(0.1)}
    chosen, rejected = tiny.preferences(MANY)
    batch = UnpairedBatch(chosen, rejected, np.arange(MANY) % 2 == 0)

    def of(micro_batch: int | None) -> int:
        updates = Updates(policy, tiny.with_micro_batch(micro_batch, name="sgd", epsilon=1e-8), 1, ())
        return temporary(kto.make_step(updates), jax.eval_shape(updates.init, params), frozen, batch)

    assert of(4) < 0.5 * ACTIVATIONS < ACTIVATIONS < of(None)


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(RlhfError, match="a batch of 16 rows does not divide into slices of 6: change forward_batch"):
        iteration_of("ppo", forward_batch=6).forward_slices(ROWS, 1)
    with pytest.raises(RlhfError, match="slices of 4 over 8 devices: change forward_batch"):
        iteration_of("ppo", forward_batch=4).forward_slices(ROWS, 8)
    with pytest.raises(RlhfError, match=r"config.ppo.forward_batch = 0 must be at least 1"):
        section = {**dataclasses.asdict(tiny.PPO), "forward_batch": 0}
        configs.build(type(tiny.PPO), section, "config.ppo")
