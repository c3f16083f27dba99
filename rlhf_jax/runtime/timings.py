"""Times that stages took on this machine, by what their cost depends on, to estimate the times of later runs.

They are kept beside the compiled programs, and not at all if those are not. They never affect results.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlhf_jax.runtime.files import read_json, write_json
from rlhf_jax.types import Json, RlhfError

FILE = "timings.json"
MOST = 500
"""Maximum number of timings; the oldest are dropped."""

COSTLY = ("epochs",)
"""Fields of type float that determine the cost of a stage. Learning rates, coefficients and others do not."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Measurements of a complete stage."""

    seconds: float
    first_call: float | None  # seconds of the first call of its program, which compiles it; None: it has no program
    bytes: int  # size of its directory


def cost_key(section: Mapping[str, Json], common: Mapping[str, Json], inputs: Sequence[str]) -> str:
    """Hash what the cost of a stage depends on, so that runs with other seeds or coefficients share a timing.

    Args: section is the stage's own; common is what it shares with all others (data, devices, machine, versions);
    inputs are the keys of the stages that it reads.
    """
    parts = [_without_coefficients(section), _without_coefficients(common), [*inputs]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def read_timings(directory: Path | None) -> dict[str, Timing]:
    """Read all timings; none if there is no directory, or if its file is damaged."""
    if directory is None or not (directory / FILE).exists():
        return {}
    try:
        return {key: Timing(**values) for key, values in read_json(directory / FILE).items()}
    except (RlhfError, TypeError, AttributeError):
        return {}


def add_timing(directory: Path | None, key: str, timing: Timing) -> None:
    """Store a timing as the newest; without a directory, or if it cannot be written, nothing is stored."""
    if directory is None:
        return
    kept = {name: value for name, value in read_timings(directory).items() if name != key}
    newest = [*kept.items(), (key, timing)][-MOST:]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / FILE, {name: dataclasses.asdict(value) for name, value in newest})
    except OSError:
        pass


def _without_coefficients(tree: Json) -> Json:
    if isinstance(tree, Mapping):
        return {
            name: _without_coefficients(value)
            for name, value in tree.items()
            if not isinstance(value, float) or name in COSTLY
        }
    return tree
