"""Run several papers at once, each in a process of its own with one thread."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from rich.console import Console

from rlhf_jax.types import RlhfError

LOG = "log.txt"
"""Output of a paper's process, in its work directory."""

ONE_THREAD = "--xla_cpu_multi_thread_eigen=false"


def run_papers(workdirs: Mapping[str, Path], options: Sequence[str], processes: int, console: Console) -> None:
    """Run `rlhf-jax reproduce NAME` for every name in its work directory, `processes` of them at a time.

    Papers that share stages wait for each other there. Raises RlhfError, naming the logs, after all others have ended
    if a paper fails. Args: options are further arguments of the command.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} {ONE_THREAD}".strip()
    environment = {**os.environ, "XLA_FLAGS": flags, "OMP_NUM_THREADS": "1"}

    def run(name: str) -> int:
        workdir = workdirs[name]
        workdir.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "rlhf_jax", "reproduce", name, f"--workdir={workdir}", *options]
        with (workdir / LOG).open("w", encoding="utf-8") as log:
            return subprocess.run(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False
            ).returncode

    failed = []
    with ThreadPoolExecutor(processes) as pool:
        running = {pool.submit(run, name): name for name in workdirs}
        for done, future in enumerate(as_completed(running), start=1):
            name = running[future]
            ended = "failed" if future.result() else "complete"
            console.print(f"{done} of {len(workdirs)}: {name} {ended}", soft_wrap=True)
            failed += [name] if future.result() else []
    if failed:
        raise RlhfError(f"{len(failed)} papers failed: see {', '.join(str(workdirs[name] / LOG) for name in failed)}")
