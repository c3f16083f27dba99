"""Several processes of the command line on this machine, each with its share of four CPU devices."""

import os
import socket
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax

from rlhf_jax import main
from tests.support import interrupted, many_stages, xla_flags
from tests.support.many_stages import CALLS
from tests.support.own_data import files

DEVICES = 4


class Place(NamedTuple):
    """Directories that a run's processes write to."""

    directory: Path  # output, calls of rewards, and the work directory
    cache: Path  # compiled programs, of runs by as many processes


def work(index: int, count: int, port: int, place: Place, trap: tuple[str, Path] | None, args: list[str]) -> None:
    """Run the command line as one of several processes, with all output in a file."""
    directory = place.directory
    with (directory / f"log-{index}").open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    flags = f"--xla_force_host_platform_device_count={DEVICES // count}"
    os.environ |= {"XLA_FLAGS": f"{xla_flags.XLA_FLAGS} {flags}", CALLS: str(directory / "calls")}
    jax.config.update("jax_compilation_cache_dir", str(place.cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if trap is not None and index == count - 1:
        stage, marker = trap
        interrupted.trap_step_of(stage, marker)
    several = [f"--coordinator=localhost:{port}", f"--processes={count}", f"--process={index}"]
    sys.exit(main.main([*args, *(several if count > 1 else [])]))


class Together:
    """One run of the command line by several processes."""

    def __init__(
        self, directory: Path, count: int, stages: tuple[str, ...], *flags: str, trap: tuple[str, Path] | None = None
    ) -> None:
        """Start the processes.

        Args: directory has the files and the work directory, and lies beside the cache of programs, which runs by as
        many processes share; trap names a stage and a marker, for the last process to stop in that stage's third call.
        """
        self.workdir, self.directory, self.trap = directory / "run", directory, trap
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        layout = {2: ("data=2", "fsdp=2"), DEVICES: (f"data={DEVICES}",)}[2 if "fsdp" in flags else DEVICES]
        arguments = [f"--config={many_stages.__file__}", f"--workdir={self.workdir}", *files(directory)]
        arguments += [f"--config.runtime.{axis}" for axis in layout]
        arguments += [f"--config.stages={','.join(stages)}", *(flag for flag in flags if flag != "fsdp")]
        place = Place(directory, directory.parent / f"cache-{count}{'-fsdp' if 'fsdp' in flags else ''}")
        self.processes = [
            interrupted.SERVER.Process(target=work, args=(index, count, port, place, trap, arguments), daemon=True)
            for index in range(count)
        ]
        for process in self.processes:
            process.start()

    def finish(self) -> Path:
        """Wait for the end; return the work directory."""
        for process in self.processes:
            process.join()
        assert [process.exitcode for process in self.processes] == [0] * len(self.processes), self.logs()
        return self.workdir

    def logs(self) -> str:
        return "\n".join(file.read_text()[-3000:] for file in sorted(self.directory.glob("log-*")))

    def kill_at(self, marker: Path) -> None:
        """Wait until the last process has stopped at its trap, and kill it; the others wait for it, and are ended."""
        while not marker.exists():
            assert all(process.is_alive() for process in self.processes), self.logs()
            time.sleep(0.05)
        self.processes[-1].kill()
        for process in self.processes:
            process.kill()
            process.join()
