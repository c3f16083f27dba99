"""Stages that train an adapter on a base in 8 or 4 bits: what they hold, learn and leave."""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.loading.export import export
from rlhf_jax.loading.pretrained import load_policy
from rlhf_jax.loading.trainable import init_trainable
from rlhf_jax.methods import dpo
from rlhf_jax.methods.offline import Updates
from rlhf_jax.models.lora import Adapted, LoraConfig
from rlhf_jax.models.quantised import is_quantised, quantised
from rlhf_jax.reports.run import Run
from rlhf_jax.runtime.programs import make_placement
from rlhf_jax.types import RlhfError, TokenBatch
from tests.support import experiments, tiny
from tests.support.programs import PLACEMENTS, QUICK, assert_close, learn, runtime

LORA = LoraConfig(rank=4, alpha=8.0, targets=("attention/[qkvo]", "up", "down"))
POLICY = dataclasses.replace(tiny.POLICY, lora=LORA)


def pairs(seed):
    """Pairs of which only the chosen response ends in token 5."""
    found, every = tiny.preferences(16, seed % 4), np.ones(16, bool)
    return found._replace(
        chosen=tiny.with_last_token(found.chosen, every), rejected=tiny.with_last_token(found.rejected, ~every)
    )


def dpo_inputs(base, updates):
    frozen = {"reference": base, "beta": jnp.float32(0.1)}
    return {"policy": init_trainable(POLICY, base, jax.random.key(5)).trained}, frozen, list(map(pairs, range(updates)))


@pytest.mark.nightly
def test_dpo_learns_with_a_base_in_8_bits_what_it_learns_with_the_base_itself():
    step = dpo.make_step(Updates(POLICY, QUICK, 40, ()))
    base = tiny.policy_params()
    plain, small = (learn(step, *dpo_inputs(each, 40))[1] for each in (base, quantised(base, "int8")))
    np.testing.assert_allclose(small["loss"][0], np.log(2), rtol=1e-5)  # the quantised base is the reference
    assert small["rewards/accuracies"][-5:].mean() > 0.9
    for name in ("loss", "rewards/margins", "logps/chosen", "logps/rejected"):
        assert np.any(small[name] != plain[name])
        np.testing.assert_allclose(small[name], plain[name], rtol=0.05, atol=0.02, err_msg=name)


@pytest.mark.parametrize(
    "dtype, where",
    [
        pytest.param("int8", runtime("jit", data=1, fsdp=2, tensor=1), marks=pytest.mark.nightly),
        pytest.param("nf4", PLACEMENTS["fsdp=4 x tensor=2"], marks=pytest.mark.nightly),
        pytest.param("int4", PLACEMENTS["fsdp=4 x tensor=2"], marks=pytest.mark.nightly),
        pytest.param("int4", PLACEMENTS["pmap=8"], marks=pytest.mark.nightly),
    ],
)
def test_several_devices_compute_what_one_does(dtype, where):
    params, frozen, batches = dpo_inputs(quantised(tiny.policy_params(), dtype), 2)

    def trained(where):
        placement = make_placement(where, seeds=1)
        updates = Updates(POLICY, tiny.OPTIMIZER, 2, placement.axes)
        state, placed = placement.put_state(updates.init(params)), placement.put_frozen(frozen)
        program = placement.compile(dpo.make_step(updates), state)
        state, metrics, _ = program(state, placed, tiny.several(batches), jax.random.key(0))
        kernel = placed["reference"]["block_0"]["up"]["kernel"]
        return jax.device_get((placement.whole(state).params, metrics)), kernel.qvalue

    (expected, _), (found, weights) = trained(tiny.ONE_DEVICE), trained(where)
    assert_close(found, expected)
    if where.fsdp > 1:
        assert weights.addressable_shards[0].data.size * where.fsdp * where.tensor == weights.size


def section(policy, **changes):
    lora = {"rank": 2, "alpha": 4.0, "targets": ("attention/[qv]", "up"), "dropout": 0.0, "base_dtype": "int8"}
    loop = {**experiments.LOOP, "checkpoint_every": 4}
    return experiments.dpo_section(policy, tuning={"lora": lora | changes}, loop=loop)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("quantised")
    policy, _ = experiments.models(directory)
    data = experiments.preference_rows(directory / "pairs.jsonl")
    experiments.run(directory / "run", data, {"dpo": section(policy)})
    return directory, policy, data


@pytest.mark.nightly
def test_a_run_resumes_with_the_same_bits(finished):
    directory, policy, data = finished
    experiments.assert_resumes(directory / "run", data, {"dpo": section(policy)})


@pytest.mark.nightly
def test_the_policy_is_read_with_its_quantised_base_and_exported_with_the_dequantised_one(finished, tmp_path):
    directory, source, _ = finished
    policy, start = Run(directory / "run").load_policy("dpo"), load_policy(source)
    assert isinstance(policy.params, Adapted)
    jax.tree.map(np.testing.assert_array_equal, policy.params.base, quantised(start.params, "int8"))
    read = load_policy(export(policy, tmp_path / "exported"))
    tokens = jnp.asarray(np.random.default_rng(0).integers(4, 11, (4, 9)), jnp.int32)
    batch = TokenBatch(tokens, tokens > 0, tokens > 0)
    found, exported, of_start = (
        jax.jit(model.network.sequence_stats)(model.params, batch).logprobs for model in (policy, read, start)
    )
    np.testing.assert_allclose(exported, found, rtol=1e-4, atol=1e-5)
    assert np.abs(found - of_start).max() > 1e-2


class Captured(Exception):
    """Inputs of the training loop, in the place of training."""


@pytest.mark.nightly
def test_the_base_is_held_once_in_a_quarter_of_the_bytes_and_the_float_weights_are_gone(
    finished, tmp_path, monkeypatch
):
    _, policy, data = finished

    def capture(task, *rest):
        raise Captured(task)

    def float_weights() -> int:
        gc.collect()
        shape = (experiments.SHAPE["hidden_size"], experiments.SHAPE["intermediate_size"])
        return sum(leaf.shape == shape and leaf.dtype == jnp.float32 for leaf in jax.live_arrays())

    before = float_weights()
    monkeypatch.setattr("rlhf_jax.methods.offline.train", capture)
    with pytest.raises(Captured) as caught:
        experiments.run(tmp_path / "run", data, {"dpo": section(policy)})
    (task,) = caught.value.args
    assert float_weights() == before
    assert set(task.frozen) == {"reference", "beta"}
    kernels = [leaf for leaf in jax.tree.leaves(task.frozen, is_leaf=is_quantised) if is_quantised(leaf)]
    assert len(kernels) == 7
    assert all(kernel.qvalue.nbytes == kernel.qvalue.size for kernel in kernels)
    inputs = {kernel.qvalue.size // kernel.scale.size for kernel in kernels}
    assert inputs == {8, 16, 24}  # fewer than 64: a scale has all inputs of an output, or of a head


@pytest.mark.nightly
def test_an_unknown_dtype_is_refused_by_name(finished, tmp_path):
    _, policy, data = finished
    with pytest.raises(RlhfError, match=r"tuning\.lora\.base_dtype = 'int2' should be one of 'int8', 'int4', 'nf4'"):
        experiments.run(tmp_path / "run", data, {"dpo": section(policy, base_dtype="int2")})
