"""Records of long runs in the documentation: a generated section, and the provenance of its rows."""

import os
import platform
import time
from pathlib import Path
from typing import Any

import jax

from rlhf_jax.runtime.provenance import processor, source


def environment() -> dict[str, Any]:
    """Commit, machine, versions and date, for a row."""
    found = source()
    return {
        "commit": found["commit"],
        "clean": found["clean"],
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "versions": f"Python {platform.python_version()}, jax {jax.__version__}",
        "date": time.strftime("%Y-%m-%d"),
    }


def provenance(rows: list[dict[str, Any]]) -> str:
    """Write where rows come from as a sentence."""
    commits, machines, versions, dates = (
        " and ".join(sorted({row[name] for row in rows})) for name in ("commit", "machine", "versions", "date")
    )
    return f"Commit {commits}; {machines}; {versions}; {dates}."


def replace_section(path: Path, name: str, content: str) -> None:
    """Replace what stands between the two comments of a name in a document."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, rest = path.read_text().split(begin)
    path.write_text(f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}")
