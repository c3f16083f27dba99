"""The checkup of a machine: exactness, rates, speeds, and the command."""

import io
import json
import multiprocessing
import os
import signal
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from rlhf_jax.doctor import doctor_verb, exactness, examination, rates, workloads
from rlhf_jax.doctor.peers import PEERS
from rlhf_jax.doctor.rates import Rates
from rlhf_jax.doctor.workloads import Workload
from rlhf_jax.main import main
from rlhf_jax.types import RlhfError
from tests.support import interrupted
from tests.support.own_data import ROOT

SLOW = Rates({"float32": 1e9, "bfloat16": 1e9}, memory=1e9, links=None)


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


@pytest.mark.nightly
def test_sampling_is_measured_beside_its_least_time():
    device = jax.devices()[0]
    speed = workloads.measure(Workload("sampling", "tiny", 4, 8, 8), device, SLOW, seconds=0.0)
    assert speed is not None and speed.tokens == 4 * 8 and speed.seconds > 0
    assert speed.tokens_per_second == pytest.approx(4 * 8 / speed.seconds)
    # Eight passes over 4 rows or 32 tokens, through 2 layers of 4 x 128^2 + ... weights and the head of 4,096 tokens.
    products = 2 * 4096 * 128 * 4 * 8
    assert speed.share * speed.seconds * 1e9 > products


@pytest.mark.parametrize("stage", ["dpo", "ppo"])
@pytest.mark.nightly
def test_training_is_measured(stage):
    speed = workloads.measure(Workload(stage, "tiny", 4, 8, 8), jax.devices()[0], SLOW, seconds=0.0)
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
        (platform, large): {workload.shape for workload in examination.workloads_of(platform, large=large)}
        for platform in ("cpu", "gpu")
        for large in (False, True)
    }
    assert shapes == {
        ("cpu", False): {"tiny"},
        ("cpu", True): {"tiny"},
        ("gpu", False): {"S"},
        ("gpu", True): {"S", "L"},
    }


def test_every_size_of_an_accelerator_has_its_fastest_peer():
    """The numbers in the package are those of the file that the peers' benchmark wrote."""
    lines = (ROOT / "experiments/benchmarks/results/peers_h100.jsonl").read_text().splitlines()
    sizes = {
        "gen": ("sampling", "batch", "s_total"),
        "dpo": ("dpo", "pairs", "step_s"),
        "ppo": ("ppo", "prompts", "iter_s"),
    }
    fastest: dict[tuple, float] = {}
    for row in map(json.loads, lines):
        stage, count, seconds = sizes.get(row["kind"], (None, "", ""))
        if stage and seconds in row:
            size = stage, row["size"], row[count]
            fastest[size] = min(row[seconds], fastest.get(size, row[seconds]))
    assert {size: peer.seconds for size, peer in PEERS.items()} == fastest
    assert {(each.stage, each.shape, each.rows) for each in examination.workloads_of("gpu", large=True)} == set(PEERS)


def endless(sender, directory, seconds, large) -> None:
    """Begin a part and one of its checks, and never end."""
    sender.send(("planned", ["speed"]))
    sender.send(("numerics", {"name": "losses", "error": 0.0, "limit": 1.0, "worst": "", "passed": True}))
    sender.send(("part", examination.NUMERICS))
    time.sleep(600)


def dying(sender, directory, seconds, large) -> None:
    """Die in a part, as a process does in which a kernel crashes."""
    sender.send(("part", examination.RATES))
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_budget_ends_a_part_that_does_not(monkeypatch):
    """Keep what was found before, and name the rest."""
    monkeypatch.setattr(examination, "work", endless)
    monkeypatch.setattr(examination, "PROCESSES", interrupted.SERVER)
    clock = [0.0]
    monkeypatch.setattr(examination, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    found = examination.examine(3000.0, large=False, report=lambda part: clock.append(clock.pop() + 4000.0))
    assert multiprocessing.active_children() == []
    assert [check["name"] for check in found["numerics"]] == ["losses"]
    names = [examination.NUMERICS, examination.EXACTNESS, examination.RATES, "speed"]
    assert found["skipped"] == [{"name": name, "reason": "the budget is spent"} for name in names]
    doctor_verb.show(found, Console(width=200, file=(printed := io.StringIO())))
    assert "Left out, as the budget is spent: numbers against float64" in printed.getvalue()


def test_a_crash_names_its_part(monkeypatch):
    monkeypatch.setattr(examination, "work", dying)
    monkeypatch.setattr(examination, "PROCESSES", interrupted.SERVER)
    with pytest.raises(RlhfError, match="died with exit status -9 in: rates of the devices"):
        examination.examine(300.0, large=False, report=lambda text: None)


@pytest.mark.nightly
def test_the_command_checks_this_machine(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert all(check["passed"] for part in ("numerics", "exactness") for check in found[part])
    assert found["numerics"] and found["rates"]["memory"] > 0
    if not found["skipped"]:
        assert len(found["exactness"]) == 4 and [each["stage"] for each in found["speeds"]] == [
            "sampling",
            "dpo",
            "ppo",
        ]
    assert main(["doctor", "--budget=0s"]) == 1
