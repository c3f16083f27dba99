"""Runs that are disturbed at random moments, started again until they end, and compared with an undisturbed run.

    python -m tests.support.faulty_runs --faults=200 --directory=runs/faults --out=docs/explanation/faults.md

The programs are tiny and cached, so that most of a process's time is spent between files rather than in a compiler. The
directory keeps the undisturbed run, the cache and the rows of finished runs: the same command continues.
"""

import argparse
import collections
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax

from rlhf_jax.main import entry_point
from rlhf_jax.runtime import termination
from rlhf_jax.runtime.checkpoints import HASHES, steps_of
from tests.support import clocks, experiments, interrupted, many_stages, records, xla_flags
from tests.support.own_data import files

CLOCK = "clock set back"

FAULTS = {
    "SIGKILL": "the process is killed",
    "SIGTERM": "a scheduler ends the process",
    "SIGHUP": "the terminal is closed",
    "full disk": "no file may exceed some kilobytes",
    "flipped bit": "the process is killed, and a bit of its newest checkpoint changes",
    "cut file": "the process is killed, and its newest checkpoint is cut short",
    CLOCK: "the process starts some days or years in the past, by libfaketime, and is killed",
}
"""Faults, and what happens to the run."""

SIGNALS = {"SIGKILL", "SIGTERM", "SIGHUP"}
NO_WRITES = 1e9
"""Seconds of compilation below which programs are not cached: disturbed processes only read the cache."""


class Outcome(NamedTuple):
    """A fault, the stage that it met, and how the process ended."""

    fault: str
    stage: str
    status: int


def work(log: Path, cache: Path, least: float, limit: int | None, arguments: list[str]) -> None:
    """Run the command line with all output in a file, and no file larger than a limit in bytes."""
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ |= {"XLA_FLAGS": xla_flags.XLA_FLAGS, many_stages.CALLS: os.devnull}
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    os.environ["RLHF_JAX_HUGE_PAGES"] = "off"  # the command would start again
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as in a terminal: under nohup it is ignored
    sys.argv = ["rlhf-jax", *arguments]
    entry_point()


class Disturbed:
    """An experiment of many stages in one directory, and its undisturbed run."""

    def __init__(self, directory: Path, stages: tuple[str, ...]) -> None:
        """Run the experiment twice, unless the directory has it: first to fill the cache of compiled programs."""
        self.directory, self.stages = directory, stages
        self.whole, timed, self.seconds = directory / "whole", directory / "seconds", 0.0
        directory.mkdir(exist_ok=True)
        self.flags = files(directory)
        if not timed.exists():
            for _ in range(2):
                shutil.rmtree(self.whole, ignore_errors=True)
                assert self.start(self.whole, least=0.0) == 0, self.log.read_text()
            timed.write_text(str(self.seconds))

    @property
    def log(self) -> Path:
        """Output of the last process."""
        return self.directory / "log"

    def start(
        self,
        workdir: Path,
        *,
        least: float = NO_WRITES,
        limit: int | None = None,
        disturb: tuple[float, int] | None = None,
        seconds_back: int = 0,
    ) -> int:
        """Run the command in a process; return its exit status.

        Args: disturb is a signal, and the seconds of computation after which to send it; the process's clock is behind
        by seconds_back.
        """
        arguments = [f"--config={many_stages.__file__}", f"--workdir={workdir}", *self.flags]
        arguments.append(f"--config.stages={','.join(self.stages)}")
        self.log.unlink(missing_ok=True)
        parent = clocks.SPAWNED if seconds_back else interrupted.SERVER
        with mock.patch.dict(os.environ, clocks.set_back(seconds_back) if seconds_back else {}):
            process = parent.Process(
                target=work, args=(self.log, self.directory / "cache", least, limit, arguments), daemon=True
            )
            process.start()
        assert process.pid is not None
        first = None
        while (spent := _seconds_of(process.pid)) is not None and process.is_alive():
            if first is None and self.log.exists():
                first = spent  # a spawned process imports everything before
            self.seconds = spent - (spent if first is None else first)
            if disturb is not None and first is not None and self.seconds >= disturb[0]:
                os.kill(process.pid, disturb[1])
                break
            process.join(0.02)
        process.join()
        assert process.exitcode is not None
        return process.exitcode

    def run(self, faults: list[str], rng: random.Random) -> Iterator[Outcome]:
        """Disturb a run by one fault after another, as many as it meets, and compare its end with the whole run."""
        workdir, seconds = self.directory / "disturbed", float((self.directory / "seconds").read_text())
        shutil.rmtree(workdir, ignore_errors=True)
        for fault in faults:
            number = int(signal.Signals[fault if fault in SIGNALS else "SIGKILL"])
            moment = rng.uniform(0, 3 * seconds / len(self.stages))
            limit = rng.randrange(2_000, 60_000) if fault == "full disk" else None
            status = self.start(
                workdir,
                limit=limit,
                disturb=None if fault == "full disk" else (moment, number),
                seconds_back=int(10 ** rng.uniform(2, 8)) if fault == CLOCK else 0,
            )
            said = self.log.read_text()
            assert "Traceback" not in said and "bug" not in said, said
            if status == 0:
                break
            stage = self._unfinished(workdir)
            assert status in (1, -number, termination.STATUS), said
            assert (status == 1) == (fault == "full disk"), said
            if fault in ("flipped bit", "cut file") and not _damage(workdir / stage, fault, rng):
                fault = "SIGKILL"
            yield Outcome(fault, stage, status)
        assert self.start(workdir) == 0, self.log.read_text()
        assert_same(self.whole, workdir)

    def _unfinished(self, workdir: Path) -> str:
        return next((name for name in self.stages if not (workdir / name / "complete.json").exists()), "report")


def _seconds_of(pid: int) -> float | None:
    """Seconds that a process has computed, which depend less on other processes than a clock's; None after its end."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


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


def table(outcomes: Iterable[Outcome]) -> str:
    """Write the counts as a table: faults in rows, stages in columns."""
    counts = collections.Counter((each.fault, each.stage) for each in outcomes)
    stages = [name for name in (*many_stages.STAGES, "report") if any(stage == name for _, stage in counts)]
    lines = [f"| stage | {' | '.join(FAULTS)} | all |", "|---|" + "---:|" * (len(FAULTS) + 1)]
    for stage in [*stages, "all"]:
        row = [sum(counts[fault, name] for name in stages if stage in (name, "all")) for fault in FAULTS]
        lines.append(f"| {stage} | {' | '.join(str(count or '') for count in row)} | {sum(row)} |")
    return "\n".join(lines) + "\n"


def record() -> None:
    """Disturb runs until there were enough faults, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="document with a place for the table")
    options = parser.parse_args()
    disturbed, path = Disturbed(options.directory.absolute(), many_stages.STAGES), options.directory / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    while len(rows) < options.faults:
        run, begun = len({row["run"] for row in rows}), time.monotonic()
        rng = random.Random(f"{options.seed}, {run}")
        outcomes = list(disturbed.run(rng.choices(list(FAULTS), k=40), rng))
        common = {"seed": options.seed, "run": run} | records.environment()
        rows += [common | outcome._asdict() for outcome in outcomes]
        with path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows[len(rows) - len(outcomes) :])
        print(f"run {run}: {len(outcomes)} faults, {time.monotonic() - begun:.0f} s; {len(rows)} in all", flush=True)
    if options.out is not None:
        found = [Outcome(*(row[name] for name in Outcome._fields)) for row in rows]
        runs = len({row["run"] for row in rows})
        records.replace_section(
            options.out,
            "faults",
            f"{table(found)}\n{len(rows)} faults in {runs} runs, seed {options.seed}. {records.provenance(rows)}",
        )


if __name__ == "__main__":
    record()
