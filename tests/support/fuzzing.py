"""Tests on many random inputs: their number and seed, counts of what was read and refused, and the record of long runs.

    python -m tests.support.fuzzing --inputs=1000 --seeds=8 --rows=runs/fuzz.jsonl --out=docs/explanation/faults.md

Every seed is a process that runs `tests/faults/test_fuzz.py` with so many inputs a test, and adds a row for each. Tests
with a row are not run again: the same command continues.
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

TESTS = "tests/faults/test_fuzz.py"

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


def write_counts(test: str) -> None:
    """Append the counts of a test to the file that the environment names."""
    if path := os.environ.get(ROWS):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        row = {"test": test, "seed": int(os.environ[SEED]), "peak_bytes": peak} | records.environment()
        with open(path, "a") as file:
            file.writelines(json.dumps(row | {"input": name} | found) + "\n" for name, found in _counts.items())
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
    for seed in range(options.seeds):
        begun = time.monotonic()
        done = [row["test"] for row in _rows(path) if row["seed"] == seed]
        environment = os.environ | {INPUTS: str(options.inputs), SEED: str(seed), ROWS: str(path.absolute())}
        subprocess.run(
            [
                *(sys.executable, "-m", "pytest", TESTS, "-n", "0", "-q", "--tb=short"),
                *(f"--deselect={TESTS}::{test}" for test in done),
            ],
            env=environment,
            check=True,
        )
        print(f"seed {seed}: {time.monotonic() - begun:.0f} s", flush=True)
    if options.out is not None:
        records.replace_section(options.out, "inputs", table(_rows(path)))


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(rows: list[dict[str, Any]]) -> str:
    """Write the counts as a table, with a sentence on where they come from."""
    inputs = list(dict.fromkeys(row["input"] for row in rows))
    lines = ["| input | inputs | read | refused |", "|---|---:|---:|---:|"]
    for name in [*inputs, "all"]:
        chosen = [row for row in rows if name in (row["input"], "all")]
        read, refused = (sum(row.get(kind, 0) for row in chosen) for kind in ("read", "refused"))
        lines.append(f"| {name} | {read + refused:,} | {read:,} | {refused:,} |")
    seeds = sorted({row["seed"] for row in rows})
    peak = max(row["peak_bytes"] for row in rows) / 2**30
    return (
        "\n".join(lines)
        + f"\n\nSeeds {seeds[0]} to {seeds[-1]}. The largest process had {peak:.1f} GiB of memory at its peak. "
        f"{records.provenance(rows)}\n"
    )


if __name__ == "__main__":
    main()
