"""One step gives the same numbers on one device, on every mesh, and under pmap; several seeds are several runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.core.sequences import joined
from rlhf_jax.methods import dpo, two_steps
from rlhf_jax.methods.offline import Updates
from rlhf_jax.runtime import optimizers
from rlhf_jax.runtime.programs import SEED_AXIS, RuntimeConfig, make_placement
from rlhf_jax.runtime.two_programs import Scored, TwoPrograms
from rlhf_jax.types import RlhfError
from tests.support import tiny
from tests.support.compilations import compilations
from tests.support.programs import PLACEMENTS, assert_close, run_ppo, runtime


def run_dpo(config: RuntimeConfig):
    """Three optimiser steps of DPO on three uneven batches."""
    placement = make_placement(config, seeds=1)
    step = dpo.make_step(Updates(tiny.POLICY, tiny.OPTIMIZER, 3, placement.axes))
    state = placement.put_state(tiny.dpo_state())
    frozen = placement.put_frozen({"reference": tiny.policy_params(2), "beta": jnp.float32(0.1)})
    batches = tiny.several([tiny.preferences(16, seed) for seed in range(3)])
    state, metrics, _ = placement.compile(step, state)(state, frozen, batches, jax.random.key(0))
    return jax.device_get((placement.whole(state).params, metrics))


@functools.cache
def dpo_gradient(config: RuntimeConfig):
    """Negative gradient and loss of DPO on one batch."""
    optimizer = optimizers.Optimizer(optax.sgd(1.0), "masters")
    placement = make_placement(config, seeds=1)

    def step(state, frozen, batch, run_key):
        def loss_fn(params):
            reference = dpo.pair_logps(dpo.SIGMOID, tiny.POLICY, frozen["reference"], batch)
            rows, axes = dpo.ReferencedBatch(batch, reference), placement.axes
            mean = dpo.tokens_per_pair(batch, axes)
            return dpo.pair_loss(
                dpo.SIGMOID, tiny.POLICY, params["policy"], rows, None, beta=0.1, axes=axes, tokens_per_pair=mean
            )[0]

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        zeros = jax.tree.map(jnp.zeros_like, state.params)
        minus_grads, opt_state, _ = optimizers.update(
            optimizer, grads, zeros, state.opt_state, placement.axes, key=run_key
        )
        return state._replace(params=minus_grads, opt_state=opt_state), {"loss": loss}, ()

    start = tiny.dpo_state()
    state = placement.put_state(start._replace(opt_state=optimizer.init(start.params)))
    frozen = placement.put_frozen({"reference": tiny.policy_params(2)})
    batches = tiny.several([tiny.preferences(16)])
    state, metrics, _ = placement.compile(step, state)(state, frozen, batches, jax.random.key(0))
    return jax.device_get((placement.whole(state).params, metrics["loss"]))


@pytest.fixture(scope="module")
def dpo_on_one_device():
    return run_dpo(tiny.ONE_DEVICE)


@pytest.fixture(scope="module")
def ppo_on_one_device():
    return run_ppo(tiny.ONE_DEVICE)


@pytest.mark.nightly_rest
@pytest.mark.parametrize("name", PLACEMENTS)
def test_three_dpo_steps_equal_one_device(name, dpo_on_one_device):
    assert_close(run_dpo(PLACEMENTS[name]), dpo_on_one_device)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["one device", *PLACEMENTS])
def test_a_policy_may_start_as_the_very_arrays_of_its_reference(name):
    """Its memory is reused by the first step; the reference's must not be. After the first call it has moved."""
    placement = make_placement(PLACEMENTS.get(name, tiny.ONE_DEVICE), seeds=1)
    start = tiny.dpo_state()
    state = placement.put_state(start)
    frozen = placement.put_frozen({"reference": start.params["policy"], "beta": jnp.float32(0.1)})
    program = placement.compile(dpo.make_step(Updates(tiny.POLICY, tiny.OPTIMIZER, 3, placement.axes)), state)
    losses = []
    for _ in range(2):  # calls of the program that `run_dpo` compiled
        batches = tiny.several([tiny.preferences(16, seed) for seed in range(3)])
        state, metrics, _ = program(state, frozen, batches, jax.random.key(0))
        losses.append(float(metrics["loss"][0]))
    np.testing.assert_allclose(losses[0], np.log(2), rtol=1e-5)
    assert abs(losses[1] - np.log(2)) > 1e-5
    assert_close(jax.device_get(start.params["policy"]), jax.device_get(tiny.policy_params()), tolerance=0)


@pytest.mark.nightly
@pytest.mark.parametrize("name", PLACEMENTS)
def test_dpo_gradients_equal_one_device(name):
    """A step of plain gradient descent at rate 1 moves by the gradient itself."""

    assert_close(dpo_gradient(PLACEMENTS[name]), dpo_gradient(tiny.ONE_DEVICE))


@pytest.mark.parametrize(
    "name", [name if name == "pmap=8" else pytest.param(name, marks=pytest.mark.nightly) for name in PLACEMENTS]
)
def test_one_ppo_iteration_equals_one_device(name, ppo_on_one_device):
    params, metrics, samples = run_ppo(PLACEMENTS[name])
    one_params, one_metrics, one_samples = ppo_on_one_device
    np.testing.assert_array_equal(samples.rollout.response, one_samples.rollout.response)
    np.testing.assert_array_equal(samples.rollout.response_mask, one_samples.rollout.response_mask)
    assert_close(params, one_params)
    assert_close(metrics, one_metrics)


@pytest.mark.nightly
def test_scores_from_the_host_give_the_same_iterations():
    """Two iterations of two seeds, scored by the same network on the host between two programs, and within one."""
    seeds, frozen = 2, tiny.ppo_frozen()
    placement = make_placement(tiny.ONE_DEVICE, seeds=seeds)
    axes = (placement.axes, (SEED_AXIS,))
    start = jax.tree.map(lambda leaf: jnp.stack([leaf] * seeds), tiny.ppo_state())
    batches = tiny.several([tiny.online(16, seed) for seed in range(2)])
    batches = jax.tree.map(lambda leaf: np.stack([leaf] * seeds, axis=1), batches)
    keys = jnp.stack([jax.random.key(seed) for seed in range(seeds)])
    scored = []

    def score(rollout):
        scored.append(len(rollout.response))
        assert isinstance(rollout.response, np.ndarray)
        return Scored(np.asarray(jax.jit(tiny.REWARD.scores)(frozen["reward"], joined(rollout))), {})

    def run(program):
        state = placement.put_state(start)
        state, metrics, samples = program(state)(state, placement.put_frozen(frozen), batches, keys)
        return jax.device_get((placement.whole(state).params, metrics, samples))

    step = tiny.ppo_step(tiny.PPO, *axes)
    steps = two_steps.scored_on_host(tiny.iteration(tiny.PPO, *axes), score, two_steps.LONGEST)
    assert_close(
        run(lambda state: TwoPrograms(placement, steps)),
        run(lambda state: placement.compile(step, state)),
    )
    assert scored == [16 * seeds] * 2


def test_masks_of_the_compared_iteration_are_uneven(ppo_on_one_device):
    _, _, samples = ppo_on_one_device
    lengths = samples.rollout.response_mask[0].sum(axis=1)
    assert len(set(lengths.tolist())) > 2


@pytest.mark.nightly
def test_first_ratio_is_one():
    """Before the first update the learner is the policy that sampled: with one minibatch and one epoch, always."""
    config = tiny.with_config(minibatches=1, epochs=1)
    _, metrics, _ = run_ppo(tiny.ONE_DEVICE, config, iterations=3)
    np.testing.assert_allclose(metrics["val/ratio"], 1.0, atol=1e-5)
    np.testing.assert_allclose(metrics["val/ratio_var"], 0.0, atol=1e-9)
    np.testing.assert_allclose(metrics["policy/approxkl_avg"], 0.0, atol=1e-9)


def test_fsdp_and_tensor_split_the_weights():
    placement = make_placement(PLACEMENTS["fsdp=4 x tensor=2"], seeds=1)
    state = placement.put_state(tiny.ppo_state())
    matrices = [leaf for leaf in jax.tree.leaves((state.params["policy"], state.opt_state)) if leaf.ndim > 1]
    assert len(matrices) > 20
    for leaf in matrices:
        pieces = 1 if leaf.shape == (16, 1) else 8  # the value head is too small to split
        assert leaf.addressable_shards[0].data.size == leaf.size // pieces


@pytest.mark.nightly
def test_the_program_compiles_once_and_stays_on_the_device():
    placement = make_placement(tiny.ONE_DEVICE, seeds=1)
    state = placement.put_state(tiny.ppo_state())
    frozen = placement.put_frozen(tiny.ppo_frozen())
    step = tiny.ppo_step(tiny.PPO, placement.axes)
    program = placement.compile(step, state)
    run_key = jax.random.key(0)
    batches = [jax.device_put(tiny.several([tiny.online(16, 3 * i + j) for j in range(3)])) for i in range(3)]

    with compilations() as compiled:
        text = program.compiled.lower(state, frozen, batches[0], run_key).compile().as_text()  # type: ignore[attr-defined]
        assert not talks_to_host(text)
        with jax.transfer_guard("disallow"):
            for batch in batches:
                state, metrics, _ = program(state, frozen, batch, run_key)
                assert metrics["loss"].shape == (3,)
    assert sum(compiled.values()) == 1, compiled
    assert int(state.step) == 9


def test_a_callback_in_a_step_would_be_noticed():
    def step(x):
        jax.debug.callback(lambda value: None, x)
        return x + 1

    assert talks_to_host(jax.jit(step).lower(jnp.float32(0)).compile().as_text())


def talks_to_host(compiled_text: str | None) -> bool:
    assert compiled_text
    return any(word in compiled_text for word in ("callback", "infeed", "outfeed", "SendToHost", "RecvFromHost"))


@pytest.mark.nightly
def test_scanned_iterations_equal_single_calls():
    placement = make_placement(tiny.ONE_DEVICE, seeds=1)
    step = tiny.ppo_step(tiny.PPO, placement.axes)
    frozen = placement.put_frozen(tiny.ppo_frozen())
    batches = [tiny.online(16, seed) for seed in range(3)]

    together = placement.put_state(tiny.ppo_state())
    together, _, samples = placement.compile(step, together)(together, frozen, tiny.several(batches), jax.random.key(0))
    single = placement.put_state(tiny.ppo_state())
    program = placement.compile(step, single)
    for index, batch in enumerate(batches):
        single, _, one = program(single, frozen, tiny.several([batch]), jax.random.key(0))
        np.testing.assert_array_equal(one.rollout.response[0], samples.rollout.response[index])
    assert_close(jax.device_get(together.params), jax.device_get(single.params), 1e-6)


@pytest.mark.nightly
def test_seed_k_of_several_is_the_single_run_with_that_seed():
    """Over 20 iterations: the same tokens, parameters within 1e-5."""
    seeds, iterations = 3, 20
    keys = [jax.random.key(100 + seed) for seed in range(seeds)]
    batches = [[tiny.online(16, 1000 * seed + i) for i in range(iterations)] for seed in range(seeds)]

    placement = make_placement(runtime("jit", data=2, fsdp=1, tensor=1), seeds=seeds)
    step = tiny.ppo_step(tiny.PPO, placement.axes, (SEED_AXIS,))
    state = placement.put_state(jax.tree.map(lambda leaf: jnp.stack([leaf] * seeds), tiny.ppo_state()))
    frozen = placement.put_frozen(tiny.ppo_frozen())
    per_iteration = tiny.several([tiny.several([batches[k][i] for k in range(seeds)]) for i in range(iterations)])
    state, metrics, samples = placement.compile(step, state)(state, frozen, per_iteration, jnp.stack(keys))
    assert metrics["loss"].shape == (iterations, seeds)
    assert not np.array_equal(samples.rollout.response[:, 0], samples.rollout.response[:, 1])

    alone = make_placement(tiny.ONE_DEVICE, seeds=1)
    single_step = tiny.ppo_step(tiny.PPO, alone.axes)
    program = alone.compile(single_step, alone.put_state(tiny.ppo_state()))
    for k in range(seeds):
        one, given = alone.put_state(tiny.ppo_state()), alone.put_frozen(tiny.ppo_frozen())
        for i, batch in enumerate(batches[k]):
            one, _, expected = program(one, given, tiny.several([batch]), keys[k])
            np.testing.assert_array_equal(samples.rollout.response[i, k], expected.rollout.response[0])
        assert_close(jax.tree.map(lambda leaf, k=k: leaf[k], jax.device_get(state.params)), jax.device_get(one.params))


def test_too_few_devices_and_rows_that_do_not_divide_are_named():
    with pytest.raises(RlhfError, match=r"requires 16 devices.*only 8 are available"):
        make_placement(runtime("jit", data=16, fsdp=1, tensor=1), seeds=1)
    with pytest.raises(RlhfError, match="12 rows does not divide over 8 devices"):
        run_ppo(PLACEMENTS["pmap=8"], tiny.with_config(batch_size=12))
    with pytest.raises(ValueError, match="pmap"):
        runtime("pmap", data=4, fsdp=2, tensor=1)
