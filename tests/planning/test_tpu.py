"""A stage compiled for a TPU, without one, by libtpu."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LIBTPU = Path(sys.prefix) / "libtpu"
"""Directory of its own in which `make dev` installs libtpu."""

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None and not (LIBTPU / "libtpu").exists(),
    reason="libtpu is not installed: make dev, or pip install 'rlhf-jax[plan]'",
)


def plan(*flags: str) -> tuple[list[dict], str]:
    """Records that the command prints, and its errors, in a process of its own."""
    command = [sys.executable, "-m", "rlhf_jax", "plan", "--config=preferences:smoke", "--json", *flags]
    paths = os.pathsep.join([str(LIBTPU), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"XLA_FLAGS": "", "TPU_LOG_DIR": "disabled", "PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


@needs_libtpu
def test_dpo_is_compiled_for_four_chips():
    (stage, whole), error = plan("--topology=v5e:2x2", "--stage=dpo", "--config.runtime.fsdp=4")
    assert not error
    (program,) = stage["programs"]
    assert program["fits"] and program["replication"] == pytest.approx(1, abs=0.1)
    assert program["collectives"] and program["times"]["interconnect"] > 0
    assert whole["smallest"]["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1} and whole["smallest"]["fits"]


@needs_libtpu
@pytest.mark.nightly
def test_memory_that_runs_out_is_an_answer():
    sizes = ("--config.data.max_response_tokens=16384", "--config.dpo.batch_size=64")
    (stage, _), error = plan("--topology=v5e:1", "--stage=dpo", *sizes)
    assert not error
    (program,) = stage["programs"]
    assert program["fits"] is False
    assert program["needed"] is None or program["needed"] > program["limit"]  # the compiler may not say how much


@needs_libtpu
@pytest.mark.nightly
def test_all_stages_are_compiled_for_four_chips():
    records, error = plan("--topology=v5e:2x2", "--config.runtime.data=2", "--config.runtime.fsdp=2")
    assert not error
    assert [record["stage"] for record in records[:-1]] == ["sft", "reward_model", "dpo", "ppo", "evaluate"]
    assert all(program["fits"] for record in records[:-1] for program in record["programs"])


@needs_libtpu
@pytest.mark.nightly
def test_a_mesh_smaller_than_a_slice_is_compiled_for_a_slice_of_its_own():
    """libtpu refuses a program for some of 256 devices."""
    sizes = [f"--config.{name}=256" for name in ("runtime.inference_batch", "runtime.fsdp")]
    sizes += [f"--config.{stage}.batch_size=512" for stage in ("sft", "reward_model", "dpo", "ppo")]
    (stage, whole), error = plan("--topology=v5e:16x16", "--stage=dpo", *sizes)
    assert not error
    assert stage["mesh"]["fsdp"] == 256 and all(program["fits"] for program in stage["programs"])
    assert whole["smallest"]["mesh"]["fsdp"] < 256 and whole["smallest"]["fits"]
