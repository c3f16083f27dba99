"""Values of tokens of the first samples of an iteration, and how they are written."""

import dataclasses

import jax
import numpy as np
import pytest

from rlhf_jax.runtime.programs import make_placement
from tests.support import experiments, tiny
from tests.support.programs import PLACEMENTS, assert_close, run_ppo, runtime

CONFIG = tiny.with_config(whiten_advantages=False, missing_eos_penalty=0.0, gamma=0.9, epochs=1, minibatches=1)
SECTION = {
    "kind": "group_rl",
    "method": "grpo",
    "num_generations": 2,
    "iterations": 4,
    "batch_size": 8,
    "minibatches": 1,
    "epochs": 1,
    "temperature": 1.0,
    "optimizer": experiments.OPTIMIZER,
    "samples_every": 2,
    "samples_written": 3,
    "tokens_written": 2,
    "loop": {"steps_per_call": 2, "checkpoint_every": 2},
}


@pytest.fixture(scope="module")
def samples():
    """Samples of the second iteration of PPO on one device; in the first one, values are 0."""
    return second(run_ppo(tiny.ONE_DEVICE, CONFIG, 2)[2])


def second(samples):
    return jax.tree.map(lambda leaf: leaf[1], samples)


@pytest.mark.nightly
def test_values_add_up_to_what_is_logged_of_the_response(samples):
    tokens, mask = samples.tokens, samples.rollout.response_mask[:4]
    assert tokens.keys() == {"kl", "reward", "value", "advantage"}
    for name, values in tokens.items():
        assert values.shape == mask.shape == (4, tiny.RESPONSE), name
        assert np.all(values[~mask] == 0) and np.any(values[mask]), name
    np.testing.assert_allclose(tokens["kl"].sum(axis=1), samples.kl[:4], rtol=1e-5, atol=1e-6)
    rewarded = samples.scores[:4] - CONFIG.kl_coef * samples.kl[:4]
    np.testing.assert_allclose(tokens["reward"].sum(axis=1), rewarded, rtol=1e-4, atol=1e-5)
    for row, length in enumerate(mask.sum(axis=1)):
        penalties = -CONFIG.kl_coef * tokens["kl"][row, : length - 1]
        np.testing.assert_allclose(tokens["reward"][row, : length - 1], penalties, rtol=1e-5, atol=1e-7)


@pytest.mark.nightly
def test_advantages_are_those_of_the_rewards_and_values(samples):
    tokens, mask = samples.tokens, samples.rollout.response_mask[:4]
    for row, length in enumerate(mask.sum(axis=1)):
        after, estimate = 0.0, 0.0
        for t in reversed(range(length)):
            value = tokens["value"][row, t]
            estimate = tokens["reward"][row, t] + CONFIG.gamma * after - value + CONFIG.gamma * 0.95 * estimate
            np.testing.assert_allclose(tokens["advantage"][row, t], estimate, rtol=1e-4, atol=1e-5)
            after = value


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("place", "count"),
    [
        ("data=8", 3),
        pytest.param("data=8", 1, marks=pytest.mark.nightly),
        pytest.param("pmap=8", 1, marks=pytest.mark.nightly),
        pytest.param("pmap=8", 3, marks=pytest.mark.nightly),
    ],
)
def test_the_first_rows_are_those_of_the_batch_on_every_layout(samples, place, count):
    config = dataclasses.replace(CONFIG, tokens_written=count)
    found = second(run_ppo(PLACEMENTS[place], config, 2)[2])
    np.testing.assert_array_equal(found.rollout.response, samples.rollout.response)
    for name, values in samples.tokens.items():
        assert len(found.tokens[name]) < len(found.rollout.response) + 1
        assert_close(found.tokens[name][:count], values[:count], 1e-4)


@pytest.mark.nightly
def test_two_seeds_at_once_record_those_of_each():
    config, seeds = dataclasses.replace(CONFIG, tokens_written=3), 2
    placement = make_placement(runtime("jit", data=2, fsdp=1, tensor=1), seeds)
    step = tiny.ppo_step(config, placement.axes, ("seed",))
    state = placement.put_state(jax.tree.map(lambda leaf: np.stack([leaf] * seeds), tiny.ppo_state(config)))
    batches = tiny.several([tiny.several([tiny.online(config.batch_size, 0)] * seeds)])
    keys = jax.numpy.stack([jax.random.key(0), jax.random.key(1)])
    _, _, found = placement.compile(step, state)(state, placement.put_frozen(tiny.ppo_frozen()), batches, keys)
    kl = np.asarray(found.tokens["kl"])[0].sum(axis=-1)
    assert kl.shape == (seeds, 4)
    np.testing.assert_allclose(kl, np.asarray(found.kl)[0, :, :4], rtol=1e-5, atol=1e-6)


@pytest.mark.nightly
def test_a_penalty_in_the_loss_is_not_in_the_rewards():
    at = tiny.iteration(tiny.group_config("grpo"))
    placement = make_placement(tiny.ONE_DEVICE, 1)
    state = placement.put_state(at.init_state({"policy": tiny.policy_params()}))
    frozen, batches = placement.put_frozen(tiny.ppo_frozen()), tiny.several([tiny.online(4)])
    _, _, found = placement.compile(at.step(tiny.REWARD), state)(state, frozen, batches, jax.random.key(0))
    found = jax.tree.map(lambda leaf: np.asarray(leaf)[0], found)
    assert found.tokens.keys() == {"kl", "reward", "advantage"}
    assert np.count_nonzero(found.tokens["reward"]) == 4
    np.testing.assert_allclose(found.tokens["reward"].sum(axis=1), found.scores[:4], rtol=1e-6)


@pytest.mark.nightly
def test_a_stage_writes_them_and_resumes_exactly(tmp_path):
    model, judge = experiments.models(tmp_path)
    stages = {"grpo": {**SECTION, "policy": model, "reward_model": judge}}
    data = experiments.questions(tmp_path / "questions.jsonl", 16)
    rows = experiments.rows(experiments.run(tmp_path / "run", data, stages).find("grpo") / "samples.jsonl")
    assert [(row["step"], "tokens" in row) for row in rows] == [
        (step, there) for step in (1, 2, 4) for there in (True, True, False)
    ]
    for row in rows:
        if tokens := row.get("tokens"):
            assert {len(values) for values in tokens.values()} == {row["length"]}
            assert "".join(tokens["text"]).removesuffix("<eos>") == row["completion"]
            assert sum(tokens["kl"]) == pytest.approx(row["kl"], rel=1e-3, abs=1e-3)
            assert tokens["reward"][-1] == pytest.approx(row["score"], rel=1e-3)
    experiments.assert_resumes(tmp_path / "run", data, stages)


@pytest.mark.nightly
def test_none_are_recorded_if_none_are_wanted_and_never_more_than_samples():
    found = run_ppo(tiny.ONE_DEVICE, dataclasses.replace(CONFIG, tokens_written=0))[2]
    assert found.tokens == {}
    assert [tiny.with_config(samples_written=count).tokens_recorded for count in (0, 2, 9)] == [0, 2, 4]
    with pytest.raises(
        ValueError, match=r"tokens_written = 5 is more than samples_written = 4: lower it, or raise that"
    ):
        tiny.with_config(tokens_written=5)
