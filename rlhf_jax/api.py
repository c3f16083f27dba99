"""Experiments from Python: `load_config` and `run` do what `rlhf-jax run` does, `fetch` what its verb does."""

import os
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console

from rlhf_jax import experiment
from rlhf_jax.config import override
from rlhf_jax.data import fetch as data_sets
from rlhf_jax.interop.hub import MODELS, fetch_model
from rlhf_jax.reports.report import MATCHED, REPORT, RESULTS, is_current, print_summary, write_report
from rlhf_jax.reports.run import Run
from rlhf_jax.runtime.workdir import Workdir
from rlhf_jax.types import RlhfError


def load_config(source: str | Path, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """Load an experiment's config and override fields of it.

        config = load_config("quickstart:smoke", {"ppo.kl_coef": 0.05, "dpo_1.loss.losses": ("ipo",)})

    Args:
        source: a file, or the name of an experiment that is installed with the package; `:ARG` is given to its
            `get_config`.
        overrides: values by dotted names, of any section's fields, in the file or not, as `--config.NAME=VALUE` on the
            command line. Texts are read as they are there: "0.05" is a number where the field is one.

    Raises RlhfError where the file does not load. `run` checks the fields.
    """
    file, *variant = str(source).split(":", 1)
    if not os.path.isfile(file):
        file = included_experiment(file)
    try:
        config = runpy.run_path(file)["get_config"](*variant)
    except Exception as error:  # the file is the user's code
        raise RlhfError(f"config {source}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise RlhfError(f"config {source}: get_config() returned a {type(config).__name__}, not a ConfigDict")
    for name, value in (overrides or {}).items():
        override(config, name, value)
    return config


def included_experiment(name: str) -> str:
    """Find the file of an experiment that is installed with the package.

    Args: `name` is its dotted name, or the last parts of it: `rlhf_jax.experiments.movie_reviews.quickstart`,
        `movie_reviews.quickstart` and `quickstart` are the same.
    Raises: RlhfError, with the names there are, unless there is exactly one.
    """
    package = Path(__file__).parent
    places = (package / "experiments", package.parent / "experiments")  # installed; in a checkout
    directory = next(place for place in places if place.is_dir())
    files = {
        ".".join(("rlhf_jax.experiments", *file.relative_to(directory).with_suffix("").parts)): file
        for file in sorted(directory.rglob("*.py"))
        if "def get_config(" in file.read_text(encoding="utf-8")
    }
    found = [file for dotted, file in files.items() if f".{dotted}".endswith(f".{name}")]
    if len(found) != 1:
        known = ", ".join(sorted(dotted.rpartition(".")[2] for dotted in files))
        raise RlhfError(f"there is no file {name}, and the experiments that come with rlhf_jax are {known}")
    return str(found[0])


def run(
    config: ConfigDict | str | Path,
    workdir: str | Path,
    *,
    stage: str | None = None,
    inputs: str | Path | None = None,
) -> Run:
    """Run an experiment's stages, or the remaining ones, write the report and return the run.

        smoke = run("quickstart:smoke", "runs/smoke")
        smoke.results()

    Complete stages are skipped, and a stage that was interrupted goes on from its last checkpoint, whether Python or
    the command line started it. Progress is printed.

    Args:
        config: from `load_config`, or what `load_config` takes. Functions of the user's own, such as rewards, stand in
            it as `path/file.py:name`, so that their file's hash is part of the stage's identity.
        workdir: the directory for all results.
        stage: runs this stage only, and writes no report.
        inputs: a work directory that missing stages are read from.

    Raises RlhfError for a bad config, bad data, and a work directory that another config made.
    """
    if not isinstance(config, ConfigDict):
        config = load_config(config)
    place = Workdir(Path(workdir), None if inputs is None else Path(inputs))
    console = Console(width=None if sys.stdout.isatty() else 120, force_jupyter=False)
    worked = experiment.run(experiment.parse(config), place, stage, console)
    found = Run(place.root, place.inputs) if place.root.is_dir() or inputs is None else Run(inputs)
    if stage is not None:
        console.print(f"Stage {stage}: {place.find(stage)}")
        return found
    if worked or not is_current(place.root, place.inputs):
        write_report(place.root, place.inputs)
        print_summary(found, console)
    else:
        console.print("Every stage is complete; nothing to do.")
    for name in (RESULTS, MATCHED):
        if (place.root / name).exists():
            console.print(f"Results: {place.root / name}", soft_wrap=True)
    console.print(f"Report:  {place.root / REPORT}", soft_wrap=True)
    return found


def fetch(name: str) -> Path:
    """Fetch a data set or a model by name, unless it is there already, and return its directory.

        fetch("movie_reviews")

    Raises RlhfError for an unknown name, without a network, and for an altered download.
    """
    return fetch_model(name) if name in MODELS else data_sets.fetch(name)
