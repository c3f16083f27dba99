"""Runs that are disturbed at random moments, started again until they end, and compared with an undisturbed run.

    python -m tests.support.faulty_runs --faults=200 --seed=0 --out=docs/faults.md

The programs are tiny and cached, so that most of a process's time is spent between files rather than in a compiler.
"""

import argparse
import collections
import contextlib
import json
import os
import platform
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from rlhf_jax.main import main
from rlhf_jax.runtime import termination
from rlhf_jax.runtime.checkpoints import HASHES, steps_of
from rlhf_jax.runtime.provenance import processor, source
from tests.support import experiments, interrupted, many_stages, xla_flags
from tests.support.own_data import files

FAULTS = {
    "SIGKILL": "the process is killed",
    "SIGTERM": "a scheduler ends the process",
    "SIGHUP": "the terminal is closed",
    "full disk": "no file may exceed some kilobytes",
    "flipped bit": "the process is killed, and a bit of its newest checkpoint changes",
    "cut file": "the process is killed, and its newest checkpoint is cut short",
}
"""Faults, and what happens to the run."""

SIGNALS = {"SIGKILL", "SIGTERM", "SIGHUP"}


class Outcome(NamedTuple):
    """A fault, the stage that it met, and how the process ended."""

    fault: str
    stage: str
    status: int


def work(log: Path, cache: Path, limit: int | None, arguments: list[str]) -> None:
    """Run the command line with all output in a file, and no file larger than a limit in bytes."""
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ |= {"XLA_FLAGS": xla_flags.XLA_FLAGS, many_stages.CALLS: os.devnull}
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        jax.config.update("jax_enable_compilation_cache", False)  # its files may be larger
    termination.raise_on_sigterm()
    sys.exit(main(arguments))


class Disturbed:
    """An experiment of many stages in one directory, and its undisturbed run."""

    def __init__(self, directory: Path, stages: tuple[str, ...]) -> None:
        """Run the experiment once, which also fills the cache of compiled programs."""
        self.directory, self.stages, self.flags = directory, stages, files(directory)
        self.whole = directory / "whole"
        assert self.start(self.whole, None, None) == 0, self.log.read_text()
        begun = time.monotonic()
        shutil.rmtree(self.whole)
        assert self.start(self.whole, None, None) == 0, self.log.read_text()
        self.seconds = time.monotonic() - begun

    @property
    def log(self) -> Path:
        """Output of the last process."""
        return self.directory / "log"

    def start(self, workdir: Path, limit: int | None, disturb: tuple[float, int] | None) -> int:
        """Run the command in a process; return its exit status.

        Args: disturb is a time in seconds after which to send a signal.
        """
        arguments = [f"--config={many_stages.__file__}", f"--workdir={workdir}", *self.flags]
        arguments.append(f"--config.stages={','.join(self.stages)}")
        cache = self.directory / "cache"
        process = interrupted.SERVER.Process(target=work, args=(self.log, cache, limit, arguments), daemon=True)
        process.start()
        if disturb is not None:
            process.join(disturb[0])
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, disturb[1])
        process.join()
        assert process.exitcode is not None
        return process.exitcode

    def run(self, faults: list[str], rng: random.Random) -> Iterator[Outcome]:
        """Disturb a run by one fault after another, as many as it meets, and compare its end with the whole run."""
        workdir = self.directory / "disturbed"
        shutil.rmtree(workdir, ignore_errors=True)
        for fault in faults:
            name = fault if fault in SIGNALS else "SIGKILL"
            moment = rng.uniform(0, self.seconds / 2), int(signal.Signals[name])
            limit = rng.randrange(2_000, 60_000) if fault == "full disk" else None
            status = self.start(workdir, limit, None if fault == "full disk" else moment)
            said = self.log.read_text()
            assert "Traceback" not in said and "bug" not in said, said
            if status == 0:
                break
            stage = self._unfinished(workdir)
            assert status in (1, -moment[1], termination.STATUS), said
            assert (status == 1) == (fault == "full disk"), said
            if fault in ("flipped bit", "cut file") and not _damage(workdir / stage, fault, rng):
                fault = "SIGKILL"
            yield Outcome(fault, stage, status)
        assert self.start(workdir, None, None) == 0, self.log.read_text()
        assert_same(self.whole, workdir)

    def _unfinished(self, workdir: Path) -> str:
        return next((name for name in self.stages if not (workdir / name / "complete.json").exists()), "report")


def _damage(stage: Path, fault: str, rng: random.Random) -> bool:
    """Damage a file of a stage's newest checkpoint; return whether there was one."""
    directory = stage / "checkpoints"
    if not directory.exists() or not (steps := steps_of(directory)):
        return False
    found = sorted(path for path in (directory / str(max(steps))).rglob("*") if path.is_file())
    path = rng.choice([path for path in found if path.stat().st_size and path.name != "_CHECKPOINT_METADATA"])
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content))
    if fault == "cut file":
        content = content[:place]
    elif path.name == HASHES:
        content[place] = 0
    else:
        content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return True


def assert_same(whole: Path, other: Path) -> None:
    """Compare the states, rows and tables of all stages bit for bit, except for times."""
    for stage in sorted(path for path in whole.iterdir() if (path / "complete.json").exists()):
        twin = other / stage.name
        names, others = ({path.name for path in each.iterdir()} for each in (stage, twin))
        assert names == others, stage.name
        if "checkpoints" in names:
            assert steps_of(stage / "checkpoints") == steps_of(twin / "checkpoints"), stage.name
            experiments.assert_same_bits(experiments.final_state(stage), experiments.final_state(twin))
        for path in stage.glob("*.json*"):
            if path.name != "environments.json":
                assert _timeless(path) == _timeless(twin / path.name), path


def _timeless(path: Path) -> Any:
    rows = experiments.rows(path) if path.suffix == ".jsonl" else [json.loads(path.read_text())]
    return [
        {
            key: value
            for key, value in row.items()
            if "second" not in key and not key.startswith(("time/", "provenance"))
        }
        for row in rows
    ]


def table(outcomes: list[Outcome]) -> str:
    """Write the counts as a table: faults in rows, stages in columns."""
    stages = [name for name in (*many_stages.STAGES, "report") if any(each.stage == name for each in outcomes)]
    counts = collections.Counter((each.fault, each.stage) for each in outcomes)
    lines = [f"| fault | {' | '.join(stages)} | all |", "|---|" + "---:|" * (len(stages) + 1)]
    for fault in FAULTS:
        row = [counts[fault, stage] for stage in stages]
        lines.append(f"| {fault} | {' | '.join(str(count or '') for count in row)} | {sum(row)} |")
    return "\n".join(lines) + "\n"


def record() -> None:
    """Disturb runs until there were enough faults, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rng, outcomes, runs, begun = random.Random(options.seed), [], 0, time.monotonic()
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        disturbed = Disturbed(directory, many_stages.STAGES)
        while len(outcomes) < options.faults:
            outcomes += disturbed.run(rng.choices(list(FAULTS), k=40), rng)
            runs += 1
            print(f"{len(outcomes)} faults, {runs} runs, {time.monotonic() - begun:.0f} s", flush=True)
    found = source()
    options.out.write_text(
        "# Faults\n\n"
        f"{len(outcomes)} faults at random moments of {runs} runs of `tests/support/many_stages.py`. The same command "
        "was started again after each, and every run ended with the states, metrics, samples and tables of an "
        "undisturbed run, bit for bit.\n\n"
        f"{table(outcomes)}\n"
        + "".join(f"- {fault}: {meaning}.\n" for fault, meaning in FAULTS.items())
        + f"\nCommand: `python -m tests.support.faulty_runs --faults={options.faults} --seed={options.seed} "
        f"--out={options.out}`. Commit {found['commit']}, {time.strftime('%Y-%m-%d')}, {processor()}, "
        f"{os.cpu_count()} cores, Python {platform.python_version()}, jax {jax.__version__}.\n"
    )


if __name__ == "__main__":
    record()
