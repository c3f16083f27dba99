"""Flags of the compiler, which XLA reads once in a process."""

import dataclasses
import os
import subprocess
import sys

import jax
import pytest

import rlhf_jax
from rlhf_jax.runtime import compiler
from tests.support.tiny import ONE_DEVICE

QUICKLY = dataclasses.replace(ONE_DEVICE, compile_quickly=True)


@pytest.fixture
def started(monkeypatch):
    """JAX has computed, without flags of its own."""
    jax.block_until_ready(jax.numpy.ones(2))
    monkeypatch.setenv("XLA_FLAGS", "")


@pytest.mark.usefixtures("started")
def test_a_setting_that_comes_too_late_is_named():
    message = compiler.start(QUICKLY)
    assert message is not None
    assert message.startswith("config.runtime.compile_quickly = True cannot take effect")
    assert os.environ["XLA_FLAGS"] == ""  # provenance does not claim it


@pytest.mark.usefixtures("started")
def test_a_setting_that_is_off_or_in_force_is_not_named(monkeypatch):
    on_gpus = dataclasses.replace(ONE_DEVICE, deterministic=True)
    assert compiler.start(ONE_DEVICE) is None and compiler.start(on_gpus) is None
    monkeypatch.setenv("XLA_FLAGS", QUICKLY.xla_flags)
    assert compiler.start(QUICKLY) is None


@pytest.mark.usefixtures("started")
def test_a_run_says_it_once(tmp_path, capsys):
    config = rlhf_jax.load_config("quickstart:smoke", {"stages": ("gold",)})
    rlhf_jax.run(config, tmp_path)
    rlhf_jax.run(config, tmp_path)
    assert capsys.readouterr().out.count("cannot take effect") == 1


def test_flags_are_set_before_the_first_computation():
    program = (
        "import dataclasses, os; from rlhf_jax.runtime import compiler; from tests.support.tiny import ONE_DEVICE;"
        "quickly = dataclasses.replace(ONE_DEVICE, compile_quickly=True);"
        "print(compiler.start(quickly), compiler.start(quickly), os.environ['XLA_FLAGS'])"
    )
    environment = os.environ | {"XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    first, again, *flags = done.stdout.split()
    assert first == again == "None"
    assert flags == QUICKLY.xla_flags.split()
