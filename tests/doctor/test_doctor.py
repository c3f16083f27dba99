"""The checkup of a machine: exactness, rates, speeds, and the command."""

import json

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax.doctor import doctor_verb, exactness, rates, workloads
from rlhf_jax.doctor.rates import Rates
from rlhf_jax.doctor.workloads import Lengths, Workload
from rlhf_jax.main import main
from rlhf_jax.types import RlhfError

SLOW = Rates({"float32": 1e9, "bfloat16": 1e9}, memory=1e9, links=None)
LENGTHS = Lengths(8, 8)


def test_runs_that_differ_in_a_bit_are_said_to():
    first = {"dpo": {"kernel": jnp.ones(4)}, "ppo": {"kernel": jnp.ones(4)}}
    second = {"dpo": {"kernel": jnp.ones(4)}, "ppo": {"kernel": jnp.ones(4).at[2].add(1e-6)}}
    same, other = exactness.compared("again", first, second)
    assert same.passed and same.difference == 0
    assert not other.passed and other.difference == pytest.approx(1e-6, rel=0.1) and other.name == "ppo: again"


@pytest.mark.nightly
def test_runs_are_the_same_again_and_after_an_interruption(tmp_path):
    found = list(exactness.checks(tmp_path))
    assert [check.name.partition(":")[0] for check in found] == ["dpo", "ppo", "dpo", "ppo"]
    assert all(check.passed for check in found)


def test_a_run_that_starts_anew_would_be_found(tmp_path, monkeypatch):
    """The interruption removes the last checkpoint and the marks of a complete stage, and keeps the one before."""
    stage = tmp_path / "ppo"
    for step in (2, 4):
        (stage / "checkpoints" / str(step)).mkdir(parents=True)
    for name in ("complete.json", "summary.json", "metrics.jsonl"):
        (stage / name).touch()
    monkeypatch.setattr(exactness, "steps_of", lambda directory: [2, 4])
    exactness.interrupt(stage)
    assert {path.name for path in stage.iterdir()} == {"checkpoints", "metrics.jsonl"}
    assert [path.name for path in (stage / "checkpoints").iterdir()] == ["2"]


def test_rates_are_of_work_that_is_done(monkeypatch):
    """Twice the work takes longer, and the fastest of several calls counts."""
    monkeypatch.setattr(rates, "LEAST_SECONDS", 0.002)
    found = rates.measure(jax.devices()[:2])
    assert 1e8 < found.products["float32"] < 1e15 and 1e8 < found.memory < 1e13
    assert found.links is not None and found.links > 0


def test_sampling_is_measured_beside_its_least_time():
    device = jax.devices()[0]
    speed = workloads.measure(Workload("sampling", "tiny", 4), LENGTHS, device, SLOW, seconds=0.0)
    assert speed is not None and speed.tokens == 4 * 8 and speed.seconds > 0
    assert speed.tokens_per_second == pytest.approx(4 * 8 / speed.seconds)
    # Eight passes over 4 rows or 32 tokens, through 2 layers of 4 x 128^2 + ... weights and the head of 4,096 tokens.
    products = 2 * 4096 * 128 * 4 * 8
    assert speed.share * speed.seconds * 1e9 > products


@pytest.mark.parametrize("stage", ["dpo", "ppo"])
@pytest.mark.nightly
def test_training_is_measured(stage):
    speed = workloads.measure(Workload(stage, "tiny", 4), LENGTHS, jax.devices()[0], SLOW, seconds=0.0)
    assert speed is not None and speed.seconds > 0 and speed.share > 0 and speed.peak > 12 * 4096 * 128
    assert speed.tokens == 4 * 16 * (2 if stage == "dpo" else 1)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("5m", 300), ("1.5h", 5400)])
def test_budgets_are_times(text, seconds):
    assert doctor_verb.seconds_in(text) == seconds


@pytest.mark.parametrize("text", ["5", "m", "-1m", "0s", "five minutes"])
def test_other_budgets_are_refused(text):
    with pytest.raises(RlhfError, match="90s, 5m or 1h"):
        doctor_verb.seconds_in(text)


def test_larger_models_need_a_larger_budget_and_an_accelerator():
    shapes = {
        (platform, large): {workload.shape for workload in doctor_verb.workloads_of(platform, large=large)[1]}
        for platform in ("cpu", "gpu")
        for large in (False, True)
    }
    assert shapes == {
        ("cpu", False): {"tiny"},
        ("cpu", True): {"tiny"},
        ("gpu", False): {"S"},
        ("gpu", True): {"S", "L"},
    }


def test_a_spent_budget_leaves_the_rest_out():
    found = doctor_verb.examine(0.0, large=False, report=lambda text: None)
    assert all(check["passed"] for check in found["numerics"]) and not found["exactness"] and not found["speeds"]
    assert found["skipped"][0] == "determinism and resuming" and len(found["skipped"]) == 4


@pytest.mark.nightly
def test_the_command_checks_this_machine(capsys):
    assert main(["doctor", "--budget=20s", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert all(check["passed"] for part in ("numerics", "exactness") for check in found[part])
    assert len(found["speeds"]) + len(found["skipped"]) >= 3
    assert main(["doctor", "--budget=0s"]) == 1
