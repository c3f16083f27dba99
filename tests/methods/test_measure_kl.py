"""measure_kl = False: without a penalty, the initial policy is neither run nor kept, and nothing else changes."""

import numpy as np
import pytest

from rlhf_jax.types import RlhfError
from tests.support import experiments

REWARD = """
import jax

COUNTS = {counts!r}

def short(completions):
    shape = {shape!r}
    held = len({{array.unsafe_buffer_pointer() for array in jax.live_arrays() if array.shape == shape}})
    with open(COUNTS, "a") as file:
        file.write(f"{{held}}\\n")
    return [-float(len(chat[0]["content"])) for chat in completions]
"""
SECTION = {
    "iterations": 2,
    "batch_size": 8,
    "minibatches": 1,
    "epochs": 1,
    "temperature": 1.0,
    "kl_coef": 0.0,
    "optimizer": experiments.OPTIMIZER,
    "samples_every": 1,
    "samples_written": 2,
    "loop": {"steps_per_call": 1, "checkpoint_every": 100},
}
RLOO = {"kind": "group_rl", "method": "rloo", "num_generations": 4}
PPO = {"kind": "ppo", "gamma": 1.0, "gae_lambda": 0.95, "clip_ratio": 0.2, "value_clip": 0.2, "vf_coef": 0.1}
PPO |= {"value_trunk": "policy"}


@pytest.fixture(scope="module", params=[RLOO, pytest.param(PPO, marks=pytest.mark.nightly)], ids=["rloo", "ppo"])
def found(request, tmp_path_factory):
    """Runs with and without a measured divergence, and the numbers of embeddings in memory when the reward is asked."""
    directory = tmp_path_factory.mktemp("measured")
    policy, _ = experiments.models(directory)
    data = experiments.questions(directory / "questions.jsonl", 16)
    runs, held = [], []
    for measured in (True, False):
        counts, code = directory / f"counts_{measured}", directory / f"reward_{measured}.py"
        code.write_text(REWARD.format(counts=str(counts), shape=(11, 16)))
        section = {**SECTION, **request.param, "policy": policy, "measure_kl": measured}
        section["reward_model"] = {"functions": (f"{code}:short",)}
        runs.append(experiments.run(directory / f"run_{measured}", data, {"rl": section}).find("rl"))
        held.append([int(line) for line in counts.read_text().splitlines()])
    return runs, held


@pytest.mark.nightly
def test_training_is_the_same(found):
    (measured, other), _ = found
    experiments.assert_same_bits(*(experiments.final_state(run)[1] for run in (measured, other)))
    for ours, theirs in zip(
        *(experiments.without_clock(run / "metrics.jsonl") for run in (measured, other)), strict=True
    ):
        assert ours.keys() == theirs.keys()
        assert {name for name in ours if theirs[name] is None} == {"objective/kl"}
        same = ours.keys() - {"objective/kl"}
        assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}
        assert ours["objective/kl"] is not None


@pytest.mark.nightly
def test_samples_have_no_divergence(found):
    (measured, other), _ = found
    for run, missing in ((measured, False), (other, True)):
        rows = experiments.rows(run / "samples.jsonl")
        assert len(rows) == 4
        assert all((row["kl"] is None) == missing and ("kl" in row["tokens"]) != missing for row in rows)


@pytest.mark.nightly
def test_a_network_less_is_kept(found):
    _, (measured, other) = found
    assert len(measured) == len(other) == 2
    np.testing.assert_array_equal(np.array(measured) - np.array(other), 2)  # embedding and head


def test_a_penalty_needs_the_divergence(tmp_path):
    section = {**SECTION, **RLOO, "policy": "model", "reward_model": "judge", "measure_kl": False, "kl_coef": 0.1}
    with pytest.raises(RlhfError, match=r"measure_kl = False, but kl_coef = 0.1 penalises the divergence"):
        experiments.run(tmp_path / "run", experiments.questions(tmp_path / "q.jsonl", 4), {"rl": section})
