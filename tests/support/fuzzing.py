"""Tests on many random inputs: their number and seed, counts of what was read and refused, and the record of long runs.

    python -m tests.support.fuzzing --inputs=1000 --seeds=8 --rows=runs/fuzz.jsonl --out=docs/explanation/faults.md

Every seed is a process that runs `tests/faults/test_fuzz.py` with so many inputs a test. Rows that are there already
are not computed again.
"""

import argparse
import collections
import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, settings

from rlhf_jax.types import RlhfError
from tests.support import records, watched

INPUTS, SEED, ROWS = "RLHF_JAX_FUZZ", "RLHF_JAX_FUZZ_SEED", "RLHF_JAX_FUZZ_ROWS"
"""Environment variables: inputs of each test, their seed (by default derived from the test), and a file for counts."""

_counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
"""Inputs of each test that were read, and that were refused."""


def fuzzed(test: Callable[..., Any]) -> Callable[..., Any]:
    """Set the number and the seed of a test's inputs."""
    seed, inputs = os.environ.get(SEED), int(os.environ.get(INPUTS, "15"))
    chosen = settings(max_examples=inputs, suppress_health_check=list(HealthCheck), database=None)(test)
    return chosen if seed is None else hypothesis.seed(int(seed))(chosen)


@contextlib.contextmanager
def reading(test: str, directory: Path) -> Iterator[None]:
    """Count an input as read, or as refused by one of our errors; any other error fails.

    Fails also if the reader does more than read, or writes outside of the directory (`watched.confined`).
    """
    outcome = "refused"
    with watched.confined(directory), contextlib.suppress(RlhfError):
        yield
        outcome = "read"
    _counts[test][outcome] += 1


def write_counts() -> None:
    """Append the counts of this process to the file that the environment names."""
    if path := os.environ.get(ROWS):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        with open(path, "a") as file:
            for test, found in _counts.items():
                row = {"test": test, "seed": int(os.environ[SEED]), "peak_bytes": peak}
                file.write(json.dumps({**row, "read": found["read"], "refused": found["refused"]}) + "\n")
        _counts.clear()


def main() -> None:
    """Run the tests with every seed, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--rows", type=Path, required=True, help="JSON lines, continued")
    parser.add_argument("--out", type=Path, help="document with a place for the table")
    options = parser.parse_args()
    path: Path = options.rows
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {json.loads(line)["seed"] for line in path.read_text().splitlines()} if path.exists() else set()
    for seed in sorted(set(range(options.seeds)) - done):
        begun, new = time.monotonic(), path.with_suffix(f".{seed}")
        new.unlink(missing_ok=True)
        environment = os.environ | {INPUTS: str(options.inputs), SEED: str(seed), ROWS: str(new)}
        subprocess.run(
            [sys.executable, "-m", "pytest", "tests/faults/test_fuzz.py", "-n", "0", "-q", "--tb=short"],
            env=environment,
            check=True,
        )
        rows = [json.loads(line) | records.environment() for line in new.read_text().splitlines()]
        with path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        new.unlink()
        print(f"seed {seed}: {time.monotonic() - begun:.0f} s", flush=True)
    if options.out is not None:
        records.replace_section(options.out, "inputs", table([json.loads(line) for line in path.open()]))


def table(rows: list[dict[str, Any]]) -> str:
    """Write the counts as a table, with a sentence on where they come from."""
    tests = list(dict.fromkeys(row["test"] for row in rows))
    lines = ["| input | inputs | read | refused |", "|---|---:|---:|---:|"]
    for test in [*tests, "all"]:
        read, refused = (sum(row[kind] for row in rows if test in (row["test"], "all")) for kind in ("read", "refused"))
        lines.append(f"| {test} | {read + refused:,} | {read:,} | {refused:,} |")
    seeds = sorted({row["seed"] for row in rows})
    peak = max(row["peak_bytes"] for row in rows) / 2**30
    return (
        "\n".join(lines)
        + f"\n\nSeeds {seeds[0]} to {seeds[-1]}. The largest process took {peak:.1f} GiB at its peak, most of which "
        f"is compiled code. {records.provenance(rows)}\n"
    )


if __name__ == "__main__":
    main()
