# torch and transformers are in .venv-parity only, where types are not checked.
# pyrefly: ignore-errors[missing-import, missing-attribute]
"""Compares random configs of every family with transformers, and writes down how far each is apart.

    .venv-parity/bin/python -m tests.parity.compare_random_configs --count=300

A row for each config goes to `random_configs.jsonl` beside this file as soon as it is known, and one that is there is
not computed again; `random_configs.json` sums them up. Remove the first to begin anew. About 2.5 s of CPU a config.
"""

import argparse
import collections
import datetime
import json
import math
import os
import re
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.support import xla_flags

ROWS, SUMMARY = (Path(__file__).with_name(f"random_configs.{ending}") for ending in ("jsonl", "json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300)
    count = parser.parse_args().count
    os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "XLA_FLAGS": xla_flags.XLA_FLAGS}
    import jax  # after its flags
    import transformers

    from tests.parity import comparison, random_configs

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    at = commit()
    for number in range(count):
        if number in {row["number"] for row in read()}:
            continue
        family, fields = random_configs.config(number)
        found = comparison.differences(family, fields)
        jax.clear_caches()
        row: dict[str, Any] = {"number": number, "commit": at, "family": family, "config": fields}
        if isinstance(found, str):
            row["refused"] = found
        else:
            row["apart"] = {name: rounded(value) for name, value in found.items()}
        with ROWS.open("a") as file:
            file.write(json.dumps(row) + "\n")
    SUMMARY.write_text(json.dumps(summary(read()[:count], comparison), indent=2) + "\n")


def read() -> list[dict[str, Any]]:
    """The rows so far, by number."""
    lines = ROWS.read_text().splitlines() if ROWS.exists() else []
    return sorted(map(json.loads, lines), key=lambda row: row["number"])


def commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "--short=10", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()


def summary(rows: list[dict[str, Any]], comparison: Any) -> dict[str, Any]:
    compared = [row for row in rows if "apart" in row]
    families = collections.defaultdict(collections.Counter)
    for row in rows:
        families[row["family"]]["refused" if "refused" in row else "compared"] += 1
    checks = (*comparison.WHOLE, *comparison.CACHED)
    greatest = {name: max(compared, key=lambda row, name=name: row["apart"][name]) for name in checks}
    own = {row["number"]: row["apart"]["transformers' cache"] for row in compared}
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commits": sorted({row["commit"] for row in rows}),
        "versions": {name: version(name) for name in ("transformers", "torch", "jax", "jaxlib", "flax")},
        "configs": len(rows),
        "compared": len(compared),
        "tolerance": comparison.TOLERANCE,
        "beyond tolerance": [
            row["number"] for row in compared if max(row["apart"][c] for c in checks) > comparison.TOLERANCE
        ],
        "greatest difference": {
            name: {"apart": row["apart"][name], "number": row["number"], "compared": len(compared)}
            for name, row in greatest.items()
        },
        "refused": dict(collections.Counter(reason(row["refused"]) for row in rows if "refused" in row).most_common()),
        "families": {family: dict(counts) for family, counts in sorted(families.items())},
        "transformers' own cache differs from its whole pass": [
            number for number, value in own.items() if value is not None and value > comparison.TOLERANCE
        ],
        "transformers' own cache fails": [number for number, value in own.items() if value is None],
    }


def rounded(value: float) -> float | None:
    """Two digits; None where it is infinite."""
    return float(f"{value:.2g}") if math.isfinite(value) else None


def reason(message: str) -> str:
    """Reason of a refusal, without the number of its case."""
    return re.sub(r"= [\d.]+$", "= N", message.partition(" is not supported")[0])


if __name__ == "__main__":
    main()
