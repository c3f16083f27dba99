"""Runs the command line in a process of its own, which stops dead at one place of one stage, to be killed there.

`step`: while the device computes the third call of the stage. `save`: when the files of its second checkpoint are
written and it is not yet valid. The process touches a marker there and waits; `never` runs to the end.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint._src.path import atomicity

from rlhf_jax import main
from rlhf_jax.runtime import loop
from rlhf_jax.stages import dpo, online, reward_model, sft
from tests import quickly

STAGES = {"sft": sft, "reward_model": reward_model, "dpo": dpo, "ppo": online, "dapo": online}


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


def arm_in(module: Any, trap: Trap) -> None:
    """Arms the trap while the stage trains."""

    def train(*args: Any) -> None:
        trap.armed = True
        loop.train(*args)
        trap.armed = False

    module.train = train


def trap_steps(trap: Trap) -> None:
    device_get = jax.device_get

    def trapped(tree: Any) -> Any:
        trap.spring()
        return device_get(tree)

    jax.device_get = trapped  # pyrefly: ignore[bad-assignment]


def trap_saves(trap: Trap) -> None:
    for kind in (atomicity.AtomicRenameTemporaryPath, atomicity.CommitFileTemporaryPath):

        async def trapped(self: Any, *args: Any, finalize: Any = kind.finalize, **kwargs: Any) -> Any:
            # A checkpoint is finalised item by item, and then as a whole.
            if self.get_final().name.isdigit():
                trap.spring()
            return await finalize(self, *args, **kwargs)

        kind.finalize = trapped  # type: ignore[method-assign]


def run(stage: str, place: str, marker: Path, cache: Path, log: Path, arguments: list[str]) -> None:
    """What the process does, with a compilation cache of its own and all its output in a file."""
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ["XLA_FLAGS"] = quickly.XLA_FLAGS  # one device
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if place != "never":
        trap = Trap(marker, 3 if place == "step" else 2)
        arm_in(STAGES[stage], trap)
        (trap_steps if place == "step" else trap_saves)(trap)
    sys.exit(main.main(arguments))
