"""A work directory: one directory per stage, with the config that made it and a marker of completion."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from rlhf_jax.runtime.files import read_json, write_json
from rlhf_jax.runtime.stage_state import LOCK, STATE
from rlhf_jax.types import Json, RlhfError

Status = Literal["new", "again", "half-done", "complete", "elsewhere"]
"""Status of a stage. "again": started here with another config, without results that a resumed run would keep;
"elsewhere": complete in `inputs`."""

TENSORBOARD = "tensorboard"
"""Directory in a stage's directory with a copy of its metrics for TensorBoard."""

ROWS = ("metrics.jsonl", "samples.jsonl")
"""Files with a training stage's rows, which a resumed run cuts back to its checkpoint."""

BEFORE_RESULTS = {"config.json", "environments.json", "model.json", "tokenizer", "data.json", TENSORBOARD, STATE, LOCK}
"""Files in a stage's directory that are written before its first result."""

RECORD = "experiment.json"
"""File in a work directory with the names of all stages, and the directory given as `--inputs`."""


@dataclasses.dataclass(frozen=True)
class Identity:
    """Everything that a stage's result depends on: its section, the common config, and the hashes of its inputs."""

    section: dict[str, Json]
    common: dict[str, Json]
    inputs: dict[str, str]

    @property
    def fingerprint(self) -> str:
        """Hash that identifies this stage's result to other stages."""
        return hashlib.sha256(json.dumps(_without_places(self.as_json()), sort_keys=True).encode()).hexdigest()[:16]

    def as_json(self) -> dict[str, Json]:
        """Content of `config.json`."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


class Record(NamedTuple):
    """The last experiment that ran in a work directory."""

    stages: tuple[str, ...]
    inputs: Path | None


def read_record(root: Path) -> Record:
    """Read the record of a work directory; it is empty for a directory of an older release or without a run."""
    if not (root / RECORD).exists():
        return Record((), None)
    found = read_json(root / RECORD)
    inputs = None if found["inputs"] is None else Path(found["inputs"])
    return Record(tuple(found["stages"]), inputs if inputs is None or inputs.is_dir() else None)


@dataclasses.dataclass(frozen=True)
class Workdir:
    """Work directory of an experiment; complete stages that are missing in `root` may be found in `inputs`."""

    root: Path
    inputs: Path | None = None

    def directory(self, stage: str) -> Path:
        """Output directory of a stage."""
        return self.root / stage

    def find(self, stage: str) -> Path:
        """Find the directory of a complete stage in `root` or `inputs`. Raises RlhfError if there is none."""
        for root in self._roots():
            if (root / stage / "complete.json").exists():
                return root / stage
        places = " or ".join(str(root) for root in self._roots())
        begun = (self.directory(stage) / "config.json").exists()
        raise RlhfError(
            f"stage {stage!r} is {'not complete' if begun else 'missing'} in {places}: run it first "
            f"(--stage={stage}), or give a work directory that has it as --inputs=DIR"
        )

    def fingerprint(self, stage: str) -> str:
        """Read the fingerprint of a complete stage."""
        return read_json(self.find(stage) / "complete.json")["fingerprint"]

    def status(self, stage: str, identity: Identity) -> Status:
        """Return the status of a stage.

        Raises RlhfError, naming the keys that differ, if the directory has results of another config. Rows of a stage
        that trains do not count before its first checkpoint: with the same config, it would start from step 0 too.
        """
        directory = self.directory(stage)
        if directory.exists() and not directory.is_dir():
            raise RlhfError(f"{directory} is a file, but stage {stage!r} needs a directory there: move it away")
        if (directory / "config.json").exists():
            differing = _differences(read_json(directory / "config.json"), identity.as_json())
            if differing and not _has_results(directory):
                return "again"
            self._refuse(stage, differing)
            return "complete" if (directory / "complete.json").exists() else "half-done"
        marker = self.inputs / stage / "complete.json" if self.inputs else None
        if marker and marker.exists() and read_json(marker)["fingerprint"] == identity.fingerprint:
            return "elsewhere"
        return "new"

    def has_input(self, stage: str) -> bool:
        """Return whether a stage is complete in `inputs`, and has not been started here."""
        started = (self.directory(stage) / "config.json").exists()
        return self.inputs is not None and not started and (self.inputs / stage / "complete.json").exists()

    def not_reused(self, stage: str, identity: Identity) -> str | None:
        """Return why a stage is not read from `inputs`: the keys that differ; None if it is, or is not there."""
        if self.inputs is None or not self.has_input(stage) or self.status(stage, identity) == "elsewhere":
            return None
        differing = _differences(read_json(self.inputs / stage / "config.json"), identity.as_json())
        return f"not read from {self.inputs}: {'; '.join(differing) or 'an earlier release wrote it'}"

    def begin(self, stage: str, identity: Identity) -> Path:
        """Create a stage's directory with `config.json`, removing files of an earlier start without results."""
        directory = self.directory(stage)
        if self.status(stage, identity) == "again":
            shutil.rmtree(directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "config.json", identity.as_json())
        return directory

    def record(self, stages: Sequence[str]) -> None:
        """Record the stages of the experiment, and `inputs`, for other commands."""
        found = {"stages": [*stages], "inputs": None if self.inputs is None else str(self.inputs.absolute())}
        if not (self.root / RECORD).exists() or read_json(self.root / RECORD) != found:
            write_json(self.root / RECORD, found)

    def complete(self, stage: str, identity: Identity) -> None:
        """Mark a stage complete; the marker is its last file."""
        write_json(self.directory(stage) / "complete.json", {"fingerprint": identity.fingerprint})

    def _roots(self) -> list[Path]:
        return [self.root] + ([self.inputs] if self.inputs else [])

    def _refuse(self, stage: str, differing: list[str]) -> None:
        if differing:
            raise RlhfError(
                f"stage {stage!r} in {self.root} was made from another config:\n"
                + "".join(f"  {line}\n" for line in differing)
                + f"Give a new --workdir, with --inputs={self.root} to reuse the stages that did not change."
            )


def _has_results(directory: Path) -> bool:
    """Return whether a stage has results that a resumed run keeps; empty files do not count."""
    checkpoints, passing = directory / "checkpoints", BEFORE_RESULTS
    if checkpoints.is_dir():
        if any(step.name.isdigit() for step in checkpoints.iterdir()):
            return True
        passing = BEFORE_RESULTS | {checkpoints.name, *ROWS}
    for path in directory.iterdir():
        if path.name not in passing and path.suffix != ".tmp" and (path.is_dir() or path.stat().st_size):
            return True
    return False


def _without_places(tree: dict[str, Json]) -> dict[str, Json]:
    """Remove the paths of data files from a config; the files are identified by their hashes."""
    common = dict(tree["common"])
    if "data" in common:
        places = ("train", "eval", "test")
        common["data"] = {name: value for name, value in common["data"].items() if name not in places}
    return {**tree, "common": common}


def _differences(old: dict[str, Json], new: dict[str, Json]) -> list[str]:
    flat_old, flat_new = flatten(_without_places(old)), flatten(_without_places(new))
    return [
        f"{key.split('.', 1)[1]}: {flat_old.get(key)!r} there, {flat_new.get(key)!r} now"
        for key in sorted(flat_old.keys() | flat_new.keys())
        if flat_old.get(key) != flat_new.get(key)
    ]


def flatten(tree: dict[str, Json], prefix: str = "") -> dict[str, Json]:
    """Flatten nested dicts to one, with keys joined by dots."""
    flat: dict[str, Json] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
