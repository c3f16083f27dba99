"""Runs the command line in a process of its own, which stops dead at one place of one stage, to be killed there.

`step`: while the device computes the third call of the stage. `save`: when the files of its second checkpoint are
written and it is not yet valid. `write`: when a file of rows is written, and has not yet its name. The process touches
a marker there and waits; `never` runs to the end.
"""

import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from rlhf_jax import main
from rlhf_jax.methods import offline, online
from rlhf_jax.runtime import loop
from tests.support import xla_flags

STAGES: dict[str, Any] = {
    "sft": offline,
    "reward_model": offline,
    "dpo": offline,
    "ppo": online,
    "host_ppo": online,
    "dapo": online,
}
"""The module whose `train` each stage calls."""
FILES = {
    "rejection_sampling": ("demonstrations.jsonl", 1),
    "preferences": ("preferences.jsonl", 1),
    "frontier": ("points.jsonl", 3),
}
"""The file that stages which only sample are stopped at, and how many times they have written it then."""

# Processes are forked from one that has imported everything, and computed nothing.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([__name__])


class Trap:
    """Counts the events of the stage under test, and never returns from one of them."""

    def __init__(self, marker: Path, number: int) -> None:
        self.marker, self.left, self.armed = marker, number, False

    def spring(self) -> None:
        if self.armed:
            self.left -= 1
        if self.armed and not self.left:
            self.marker.touch()
            time.sleep(600)


def arm_in(stage: str, trap: Trap) -> None:
    """Arms the trap while the stage trains."""

    def train(
        task: Any, config: Any, placement: Any, first_seed: int, directories: Sequence[Path], *others: Any
    ) -> int:
        trap.armed = directories[0].name == stage  # stages share a module
        done = loop.train(task, config, placement, first_seed, directories, *others)
        trap.armed = False
        return done

    STAGES[stage].train = train


def trap_steps(trap: Trap) -> None:
    device_get = jax.device_get

    def trapped(tree: Any) -> Any:
        trap.spring()
        return device_get(tree)

    jax.device_get = trapped  # pyrefly: ignore[bad-assignment]


def trap_step_of(stage: str, marker: Path) -> None:
    """Stop this process in the third call of a stage's program."""
    trap = Trap(marker, 3)
    arm_in(stage, trap)
    trap_steps(trap)


def trap_saves(trap: Trap) -> None:
    rename = os.rename

    def trapped(source: Any, target: Any, **where: Any) -> None:
        # Orbax renames a checkpoint item by item, and then as a whole, to the number of its step.
        if Path(target).name.isdigit() and Path(target).parent.name == "checkpoints":
            trap.spring()
        return rename(source, target, **where)

    os.rename = trapped  # pyrefly: ignore[bad-assignment]


def trap_writes(trap: Trap, name: str) -> None:
    replace = Path.replace

    def trapped(self: Path, target: Path) -> Path:
        if target.name == name:
            trap.spring()
        return replace(self, target)

    Path.replace = trapped  # type: ignore[method-assign]


def run(stage: str, place: str, marker: Path, cache: Path, log: Path, arguments: list[str]) -> None:
    """Run the command line in this process, with its own compilation cache and all output in a file."""
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ["XLA_FLAGS"] = xla_flags.XLA_FLAGS  # one device
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if place == "write":
        name, number = FILES[stage]
        trap = Trap(marker, number)
        trap.armed = True
        trap_writes(trap, name)
    elif place != "never":
        trap = Trap(marker, 3 if place == "step" else 2)
        arm_in(stage, trap)
        (trap_steps if place == "step" else trap_saves)(trap)
    sys.exit(main.main(arguments))


class Process:
    """One run of the command line, in a process with a compilation cache of its own."""

    def __init__(self, directory: Path, cache: Path, stage: str, place: str, args: list[str]) -> None:
        self.marker = directory / f"marker-{stage}-{place}"
        own_cache = directory / f"cache-{stage}-{place}"
        if cache != own_cache:
            shutil.copytree(cache, own_cache, dirs_exist_ok=True)
        self.log = directory / f"log-{stage}-{place}"
        self.process = SERVER.Process(
            target=run, args=(stage, place, self.marker, own_cache, self.log, args), daemon=True
        )
        self.process.start()

    def kill_at_marker(self) -> None:
        while not self.marker.exists():
            assert self.process.is_alive(), self.log.read_text()
            time.sleep(0.05)
        self.process.kill()
        self.process.join()
        assert self.process.exitcode == -signal.SIGKILL

    def finish(self) -> None:
        self.process.join()
        assert self.process.exitcode == 0, self.log.read_text()
