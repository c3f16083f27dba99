"""Runs that are disturbed at random moments, and faults of data: the same end bit for bit, or one clear message."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_jax.main import main
from rlhf_jax.stages import sft
from tests.support import clocks, many_stages, own_data, xla_flags
from tests.support.commands import fails
from tests.support.faulty_runs import CLOCK, FAULTS, Disturbed, table

SFT = [own_data.PREFERENCES, "--config.stages=sft", "--config.sft.loop.checkpoint_every=2"]


def disturb(directory: Path, stages: tuple[str, ...], faults: int, seed: int) -> None:
    """Disturb runs until they met every fault, and at least so many."""
    rng, disturbed, outcomes = random.Random(seed), Disturbed(directory, stages), []
    kinds = [fault for fault in FAULTS if fault != CLOCK or clocks.library() is not None]
    while len(outcomes) < faults:
        outcomes += disturbed.run(rng.choices(kinds, k=min(faults, 40)), rng)
    print(table(outcomes))
    assert len(outcomes) >= faults


@pytest.mark.nightly
def test_disturbed_runs_end_as_if_nothing_had_happened(tmp_path):
    disturb(tmp_path, ("sft", "preferences"), faults=6, seed=0)


@pytest.mark.nightly
@pytest.mark.skipif(clocks.library() is None, reason="libfaketime is not installed")
def test_a_clock_that_is_set_back_changes_nothing(tmp_path):
    outcomes = list(Disturbed(tmp_path, ("sft",)).run([CLOCK, CLOCK], random.Random(0)))
    assert outcomes and {each.fault for each in outcomes} == {CLOCK}


@pytest.mark.nightly
def test_hundreds_of_faults_change_nothing(tmp_path):
    disturb(tmp_path, many_stages.STAGES, faults=300, seed=1)


@pytest.mark.nightly
def test_sigterm_ends_a_command_with_a_checkpoint_and_the_status_for_a_restart(tmp_path):
    flags = own_data.files(tmp_path)
    command = [*SFT, f"--workdir={tmp_path / 'run'}", *flags, "--config.sft.epochs=100000.0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "rlhf_jax", *command],
        env=os.environ | {"XLA_FLAGS": xla_flags.XLA_FLAGS},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    checkpoints = tmp_path / "run" / "sft" / "checkpoints"
    while not (checkpoints.exists() and any(path.name.isdigit() for path in checkpoints.iterdir())):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate()
    assert process.returncode == 143
    assert error.strip() == "Terminated. The same command continues from the last checkpoint."
    rows = (tmp_path / "run" / "sft" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["step"] == max(int(path.name) for path in checkpoints.iterdir() if path.name.isdigit())
    assert json.loads((tmp_path / "run" / "sft" / "state.json").read_text())["error"] == "KeyboardInterrupt"


def test_a_data_file_that_changes_under_a_run_is_an_error(tmp_path, monkeypatch, capsys):
    flags, training = own_data.files(tmp_path), sft.train_offline
    content = (tmp_path / "train.jsonl").read_text()

    def replacing(*arguments, **named):
        (tmp_path / "train.jsonl").write_text(content.replace("film", "play"))
        return training(*arguments, **named)

    monkeypatch.setattr(sft, "train_offline", replacing)
    message = fails(capsys, *SFT, f"--workdir={tmp_path / 'run'}", *flags)
    assert f"{tmp_path / 'train.jsonl'} changed while a stage read it: put the earlier file back" in message
    assert not (tmp_path / "run" / "sft" / "complete.json").exists()
    monkeypatch.setattr(sft, "train_offline", training)
    assert "was made from another config" in fails(capsys, *SFT, f"--workdir={tmp_path / 'run'}", *flags)
    (tmp_path / "train.jsonl").write_text(content)
    assert main([*SFT, f"--workdir={tmp_path / 'run'}", *flags]) == 0
