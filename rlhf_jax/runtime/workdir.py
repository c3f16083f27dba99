"""A work directory: one directory a stage, what made it, and whether it is complete."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Literal

from rlhf_jax.runtime.files import read_json, write_json
from rlhf_jax.types import Json, RlhfError

Status = Literal["new", "again", "half-done", "complete", "elsewhere"]
"""Status of a stage; "again" if another config has begun it here and left no result."""

BEFORE_RESULTS = {"config.json", "environments.json", "model.json", "tokenizer", "data.json"}
"""Names in a stage's directory that are written before its first result."""


@dataclasses.dataclass(frozen=True)
class Identity:
    """All that a stage's result depends on: its section, what the experiment has in common, and its inputs."""

    section: dict[str, Json]
    common: dict[str, Json]
    inputs: dict[str, str]

    @property
    def fingerprint(self) -> str:
        """A hash that other stages refer to."""
        return hashlib.sha256(json.dumps(_without_places(self.as_json()), sort_keys=True).encode()).hexdigest()[:16]

    def as_json(self) -> dict[str, Json]:
        """As `config.json` holds it."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


@dataclasses.dataclass(frozen=True)
class Workdir:
    """The stages under `root`; those that are missing there may stand complete under `inputs`."""

    root: Path
    inputs: Path | None = None

    def directory(self, stage: str) -> Path:
        """Output directory of a stage."""
        return self.root / stage

    def find(self, stage: str) -> Path:
        """The directory of a complete stage, here or under `inputs`. Raises RlhfError where there is none."""
        for root in self._roots():
            if (root / stage / "complete.json").exists():
                return root / stage
        places = " or ".join(str(root) for root in self._roots())
        begun = (self.directory(stage) / "config.json").exists()
        raise RlhfError(
            f"stage {stage!r} is {'not complete' if begun else 'missing'} in {places}: run it first "
            f"(--stage={stage}), or name a work directory that has it with --inputs=DIR"
        )

    def fingerprint(self, stage: str) -> str:
        """The fingerprint of a complete stage."""
        return read_json(self.find(stage) / "complete.json")["fingerprint"]

    def status(self, stage: str, identity: Identity) -> Status:
        """Return what is left to do for a stage.

        Raises RlhfError, naming the keys, where another config made what is here: a checkpoint, metrics, samples or any
        other result.
        """
        directory = self.directory(stage)
        if directory.exists() and not directory.is_dir():
            raise RlhfError(f"{directory} is a file where stage {stage!r} needs a directory: move it away")
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

    def begin(self, stage: str, identity: Identity) -> Path:
        """Makes a stage's directory and notes what it is made from; what a start without results left is removed."""
        directory = self.directory(stage)
        if self.status(stage, identity) == "again":
            shutil.rmtree(directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "config.json", identity.as_json())
        return directory

    def complete(self, stage: str, identity: Identity) -> None:
        """Marks a stage complete; the marker is the last file that it writes."""
        write_json(self.directory(stage) / "complete.json", {"fingerprint": identity.fingerprint})

    def _roots(self) -> list[Path]:
        return [self.root] + ([self.inputs] if self.inputs else [])

    def _refuse(self, stage: str, differing: list[str]) -> None:
        if differing:
            raise RlhfError(
                f"stage {stage!r} in {self.root} was made from another config:\n"
                + "".join(f"  {line}\n" for line in differing)
                + f"Give a new --workdir (with --inputs={self.root} it reads the stages that did not change from here)."
            )


def _has_results(directory: Path) -> bool:
    """Return whether a stage has left a result; an empty file is none."""
    for path in directory.iterdir():
        if path.name == "checkpoints":
            if any(step.name.isdigit() for step in path.iterdir()):
                return True
        elif path.name not in BEFORE_RESULTS and (path.is_dir() or path.stat().st_size):
            return True
    return False


def _without_places(tree: dict[str, Json]) -> dict[str, Json]:
    """A config without the places of the data's files, which are known by their hashes."""
    common = dict(tree["common"])
    if "data" in common:
        places = ("train", "eval", "test")
        common["data"] = {name: value for name, value in common["data"].items() if name not in places}
    return {**tree, "common": common}


def _differences(old: dict[str, Json], new: dict[str, Json]) -> list[str]:
    flat_old, flat_new = _flatten(_without_places(old)), _flatten(_without_places(new))
    return [
        f"{key.split('.', 1)[1]}: {flat_old.get(key)!r} there, {flat_new.get(key)!r} now"
        for key in sorted(flat_old.keys() | flat_new.keys())
        if flat_old.get(key) != flat_new.get(key)
    ]


def _flatten(tree: dict[str, Json], prefix: str = "") -> dict[str, Json]:
    flat: dict[str, Json] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
