"""Stages that train an adapter: what is checkpointed, what the reference is, and what others read of it."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.interop import hf
from rlhf_jax.interop.peft import save_adapter
from rlhf_jax.loading.models import Policy, Tuning, tuned
from rlhf_jax.loading.pretrained import load_checkpoint
from rlhf_jax.loading.trainable import init_trainable, trainable
from rlhf_jax.methods import dpo
from rlhf_jax.methods.dpo import ReferenceUpdate, pair_logps
from rlhf_jax.methods.offline import Updates
from rlhf_jax.models.lora import Adapted, LoraConfig, merge
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.reports.run import Run
from rlhf_jax.runtime.checkpoints import TrainState
from rlhf_jax.runtime.optimizers import make_optimizer
from rlhf_jax.runtime.programs import make_placement
from rlhf_jax.stages import kto, reward_model, sft
from rlhf_jax.text.tokenizer import TokenizerConfig, train_tokenizer
from rlhf_jax.types import RlhfError, UnpairedBatch
from tests.support import checkpoints, tiny
from tests.support.commands import run_without_figures
from tests.support.own_data import chat_arguments
from tests.support.programs import PLACEMENTS, QUICK, assert_close
from tests.support.tiny import demonstrations

LORA = LoraConfig(rank=2, alpha=4.0, targets=("attention/[qv]", "up"))
POLICY = dataclasses.replace(tiny.POLICY, lora=LORA)
REWARD = dataclasses.replace(tiny.REWARD, lora=LORA)


def labelled(seed):
    """Responses of which every other one is good."""
    pairs = tiny.preferences(16, seed)
    return UnpairedBatch(pairs.chosen, pairs.rejected, np.arange(16) % 2 == 0)


def run(name, lora=LORA, where=tiny.ONE_DEVICE):
    """Two steps of a stage: what it trains, its metrics, and the frozen base."""
    placement = make_placement(where, seeds=1)
    policy, reward = dataclasses.replace(POLICY, lora=lora), dataclasses.replace(REWARD, lora=lora)
    key, base, judge = jax.random.key(5), tiny.policy_params(), tiny.reward_params()
    if name == "ppo":
        networks = dataclasses.replace(tiny.NETWORKS, policy=policy, value=reward)
        trained = {
            "policy": init_trainable(policy, base, key).trained,
            "value": init_trainable(reward, judge, key).trained,
        }
        frozen = {"reference": base, "reward": judge, "value_base": judge}
        step = tiny.ppo_step(tiny.PPO, placement.axes, networks=networks)
        state, batches = tiny.iteration().init_state(trained), [tiny.online(16, seed) for seed in range(2)]
    else:
        cases: dict[str, Any] = {
            "sft": (sft.make_step, policy, {"policy": base}, {"base": base}, [demonstrations()] * 2),
            "dpo": (
                dpo.make_step,
                policy,
                {"policy": base},
                {"reference": base, "beta": jnp.float32(0.1)},
                [tiny.preferences(16, seed) for seed in range(2)],
            ),
            "kto": (
                kto.make_step,
                policy,
                {"policy": base},
                {"reference": base, "beta": jnp.float32(0.1)},
                [labelled(seed) for seed in range(2)],
            ),
            "reward_model": (
                reward_model.make_step,
                reward,
                {"reward": judge},
                {"base": judge},
                [tiny.preferences(16, seed) for seed in range(2)],
            ),
        }
        make, network, trained, frozen, batches = cases[name]
        trained = {name: init_trainable(network, params, key).trained for name, params in trained.items()}
        step = make(Updates(network, tiny.OPTIMIZER, 2, placement.axes))
        state = TrainState(jnp.int32(0), trained, make_optimizer(tiny.OPTIMIZER, 2).init(trained))
    state = placement.put_state(state)
    program = placement.compile(step, state)
    state, metrics, _ = program(state, placement.put_frozen(frozen), tiny.several(batches), jax.random.key(0))
    return jax.device_get((trained, placement.whole(state).params, metrics))


@pytest.mark.parametrize("name", ["sft", "dpo", "reward_model", pytest.param("ppo", marks=pytest.mark.nightly)])
def test_only_the_adapter_is_trained_and_all_of_it_moves(name):
    before, after, metrics = run(name)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (after, tiny.policy_params())]
    assert sizes[0] < 0.7 * sizes[1]
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, after)
    if name == "reward_model":
        assert moved["reward"]["head"].pop("bias") == 0  # it moves both scores of a pair alike
    assert min(jax.tree.leaves(moved)) > 0, moved
    assert all(np.all(np.isfinite(value)) for value in metrics.values())
    if name == "dpo":
        np.testing.assert_allclose(metrics["loss"][0], np.log(2), rtol=1e-5)  # it starts as its reference
    if name == "ppo":
        np.testing.assert_allclose(metrics["objective/kl"][0], 0, atol=1e-4)


def test_a_reference_that_follows_an_adapter_is_another_adapter_of_the_same_base():
    base, rows = tiny.policy_params(), [tiny.preferences(16, seed) for seed in range(4)]
    frozen = {"reference": base, "beta": jnp.float32(0.1)}
    soft = ReferenceUpdate(alpha=0.25, every=2)
    adapter = init_trainable(POLICY, base, jax.random.key(5)).trained
    state = TrainState(
        jnp.int32(0),
        {"policy": adapter, "reference": adapter},
        make_optimizer(QUICK, 4).init({"policy": adapter}),
    )
    step = jax.jit(dpo.make_step(Updates(POLICY, QUICK, 4, ()), reference_update=soft))
    logprob = jax.jit(lambda params, pairs: pair_logps(dpo.SIGMOID, tiny.POLICY, params, pairs).chosen)
    expected = jax.device_get(adapter)
    for number, pairs in enumerate(jax.tree.map(jnp.asarray, rows), start=1):
        own, theirs = (merge(base, tree, LORA) for tree in (state.params["policy"], expected))
        state, metrics, _ = step(state, frozen, pairs, jax.random.key(0))
        reward = 0.1 * np.mean(logprob(own, pairs) - logprob(theirs if number > 2 else base, pairs))
        np.testing.assert_allclose(metrics["rewards/chosen"], reward, rtol=1e-3, atol=1e-5)
        if number % 2 == 0:
            expected = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * np.asarray(b), expected, state.params["policy"])
        assert_close(state.params["reference"], expected)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - np.asarray(b)).max()), expected, state.params["policy"])
    assert min(jax.tree.leaves(moved)) > 1e-4


@pytest.mark.nightly
@pytest.mark.parametrize(
    "name, where", [pytest.param("sft", "fsdp=4 x tensor=2", marks=pytest.mark.nightly), ("dpo", "pmap=8")]
)
def test_dropout_too_is_the_same_on_several_devices(name, where):
    lora = dataclasses.replace(LORA, dropout=0.3)
    plain, one, several = run(name), run(name, lora), run(name, lora, PLACEMENTS[where])
    assert_close(several[1:], one[1:])
    assert np.any(one[2]["loss"] != plain[2]["loss"])


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["reward_model", "kto"])
def test_dropout_changes_the_loss_once_the_adapter_is_not_zero(name):
    plain, dropped = (run(name, dataclasses.replace(LORA, dropout=rate))[2]["loss"] for rate in (0.0, 0.3))
    np.testing.assert_allclose(dropped[0], plain[0], rtol=1e-6)
    assert abs(dropped[1] - plain[1]) > 1e-6


def test_ppo_refuses_dropout():
    with pytest.raises(ValueError, match=r"tuning\.lora\.dropout must be 0"):
        tiny.with_config(tuning=dataclasses.replace(tiny.PPO.tuning, lora=dataclasses.replace(LORA, dropout=0.1)))


def adapter_of_others(directory):
    """An adapter in PEFT's format, beside the model that it was trained on."""
    base = hf.load_pretrained(str(checkpoints.policy(directory / "model")))
    network = dataclasses.replace(hf.network_of(base), lora=LORA)
    adapter = jax.tree.map(lambda leaf: leaf + 0.1, network.init_adapter(base.params, jax.random.key(3)))
    params = Adapted(base.params, adapter)
    save_adapter(directory / "adapter", "policy", params, LORA, base.hf_config, base=str(directory / "model"))
    return directory / "adapter"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapters")
    model = adapter_of_others(directory)
    flags = [*chat_arguments(f"{model},lora=2", directory), f"--workdir={directory / 'run'}"]
    run_without_figures(*flags, "--config.stages=('sft','dpo')")
    return directory / "run"


@pytest.mark.nightly
def test_stages_with_adapters_run_and_others_read_them(finished, tmp_path):
    runs = Run(finished)
    policies = {name: runs.load_policy(name) for name in ("sft", "dpo")}
    assert all(isinstance(policy.params, Adapted) for policy in policies.values())
    sizes = {
        name: sum(file.stat().st_size for file in (finished / name / "checkpoints").rglob("*") if file.is_file())
        for name in policies
    }
    assert json.loads((finished / "dpo" / "model.json").read_text())["base"] == "sft"
    assert sizes["dpo"] < 200_000, sizes
    table = runs.sample(["the film"], stage="dpo", n=2)
    assert np.isfinite(table["kl"]).all() and np.any(table["kl"] != 0)


@pytest.mark.nightly
def test_an_adapters_base_is_what_it_started_from(finished):
    runs = Run(finished)
    sft, tuned = runs.load_policy("sft"), runs.load_policy("dpo")
    of_others = load_checkpoint(str(finished.parent / "adapter")).params
    jax.tree.map(np.testing.assert_array_equal, sft.params.base, of_others)
    start = hf.load_pretrained(str(finished.parent / "model")).params
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), of_others, start)
    assert {name: any(jax.tree.leaves(moved["block_0"]["attention"][name])) for name in "qkvo"} == {
        "q": True, "k": False, "v": True, "o": False
    }  # fmt: skip
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), tuned.params.base, sft.network.merge(sft.params)
    )


def test_layers_in_a_loop_are_a_setting_of_the_model_and_have_no_adapter():
    model = Policy(tiny.POLICY, None, train_tokenizer(TokenizerConfig("word", tiny.VOCAB), ["a b"]))
    loop = tuned(model, Tuning(scan_layers=True, remat="dots")).network
    assert isinstance(loop, PolicyNetwork)
    assert loop.config == dataclasses.replace(tiny.POLICY.config, scan_layers=True, remat="dots")
    with pytest.raises(RlhfError, match="scan_layers = True does not support adapters: set it to False"):
        trainable(loop, Tuning(lora=LORA))
