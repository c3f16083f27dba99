"""Papers that train: one experiment per seed, and the record of its stages.

Every seed has a whole experiment of its own: tokenizer, SFT policy, preferences, reward model and what follows. The
units of a claim are then independent, and an interval covers the randomness of every stage. Within a seed, all methods
start from the same policy, so that their differences are paired.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import filelock
from ml_collections import ConfigDict
from rich.console import Console

from rlhf_jax import experiment
from rlhf_jax.data.fetch import data_dir
from rlhf_jax.papers.suite import Scale
from rlhf_jax.reports.run import Run
from rlhf_jax.runtime.files import read_json, write_json
from rlhf_jax.runtime.workdir import Workdir
from rlhf_jax.types import Json

STAGES = "stages.json"
"""File in a seed's work directory: cost, effective batch, data and commit of every stage."""


def run_each(
    config: ConfigDict, seeds: Sequence[int], workdir: Path, *, shared: Sequence[str], further: Sequence[str] = ()
) -> dict[int, Run]:
    """Run the incomplete stages of an experiment for each seed, in `workdir/seed_K`, and return the runs by seed.

    Args: shared are the first stages. They depend on their own sections, the data and the seed only, so that all papers
    with the same ones share a directory below `data_dir()`, where each is run once. Further shared stages follow them:
    papers that have these in common too share a second directory, which links to the stages of the first.
    """
    console = Console(width=None if sys.stdout.isatty() else 120)
    runs = {}
    for seed in seeds:
        own = config.copy_and_resolve_references().unlock()
        own.seed = seed
        inputs = _run_shared(own, shared, (), console)
        if further:
            inputs = _run_shared(own, (*shared, *further), [inputs / stage for stage in shared], console)
        place = Workdir(workdir / f"seed_{seed}", inputs)
        _run(own, place, own.stages, console)
        place.root.mkdir(parents=True, exist_ok=True)
        runs[seed] = Run(place.root, inputs)
        write_json(place.root / STAGES, {stage: _describe(runs[seed].summary(stage)) for stage in own.stages})
    return runs


def stages_record(workdir: Path) -> dict[str, Json]:
    """Combine the records of all seeds in `workdir`: stage -> seconds over all seeds, batch, data, commits, seeds."""
    combined: dict[str, Json] = {}
    for file in sorted(workdir.glob(f"seed_*/{STAGES}"), key=lambda file: int(file.parent.name.removeprefix("seed_"))):
        for stage, found in read_json(file).items():
            known = combined.setdefault(stage, {**found, "seconds": 0.0, "seeds": [], "commits": []})
            known["seconds"] = round(known["seconds"] + found["seconds"], 1)
            known["seeds"] += found["seeds"]
            known["commits"] += [commit for commit in found["commits"] if commit not in known["commits"]]
    return combined


def settings_of(config: ConfigDict) -> dict[str, Json]:
    """Convert a config to the settings of a scale: everything but the seed."""
    settings = json.loads(config.to_json_best_effort())
    return {name: section for name, section in settings.items() if name != "seed"}


def scales(
    config: Callable[..., ConfigDict], *, seeds: int, cost: str, constants: dict[str, Json] | None = None
) -> dict[str, Scale]:
    """Make the scales of a paper that runs here: `cpu`, and `smoke`, which only tests that everything works.

    Args: config builds the experiment of one seed, given `smoke`; constants are settings of what `measure` does after
    the experiment.
    """
    further: dict[str, Json] = {} if constants is None else {"constants": constants}
    return {
        "cpu": Scale(seeds=seeds, settings=settings_of(config(smoke=False)) | further, cost=cost),
        "smoke": Scale(seeds=2, settings=settings_of(config(smoke=True)) | further, cost="a few minutes, an estimate"),
    }


def full_scales(config: Callable[..., ConfigDict], *, seeds: int, cost: str) -> dict[str, Scale]:
    """Make the scales of a paper's own setting: `gpu`, and `gpu:smoke`, which only tests that everything works.

    Args: config builds the experiment of one seed, given `smoke`.
    """
    found = scales(config, seeds=seeds, cost=cost)
    return {"gpu": found["cpu"], "gpu:smoke": found["smoke"]}


def _run(config: ConfigDict, place: Workdir, stages: Iterable[str], console: Console) -> None:
    own = config.copy_and_resolve_references().unlock()
    own.stages = tuple(stages)
    experiment.run(experiment.parse(own), place, None, console)


def _run_shared(config: ConfigDict, stages: Sequence[str], ready: Sequence[Path], console: Console) -> Path:
    """Run shared stages in their directory, and return it. Args: ready are directories of stages that are complete."""
    directory = _shared_directory(config, stages)
    directory.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(directory / ".lock"):
        for stage in ready:
            if not (directory / stage.name).exists():
                (directory / stage.name).symlink_to(stage.absolute())
        _run(config, Workdir(directory), stages, console)
    return directory


def _shared_directory(config: ConfigDict, stages: Sequence[str]) -> Path:
    """Return the directory of shared stages, named by a hash of their sections with all defaults, data and runtime."""
    parsed = experiment.parse(config)
    used = [parsed.runtime, *(parsed.stages[name] for name in stages)]
    sections = json.dumps([parsed.data.settings, *map(dataclasses.asdict, used)], sort_keys=True)
    digest = hashlib.sha256(f"{list(stages)} {sections}".encode()).hexdigest()
    return data_dir() / "papers" / digest[:12] / f"seed_{config.seed}"


def _describe(summary: dict[str, Json]) -> dict[str, Json]:
    found = summary["provenance"]
    known = {"seconds": summary["time/seconds"], "seeds": found["seeds"], "commits": [found["source"]["commit"]]}
    known["data_sha256"] = found["sha256"]
    return known | ({"batch": found["batch"]} if "batch" in found else {})
