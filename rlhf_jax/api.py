"""Experiments from Python: `load_config` and `run` are `rlhf-jax run`, and `fetch` is `rlhf-jax fetch`."""

import os
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict
from rich.console import Console

from rlhf_jax import experiment, processes
from rlhf_jax.config import override
from rlhf_jax.data import fetch as data_sets
from rlhf_jax.interop.hub import MODELS, fetch_model
from rlhf_jax.runtime.workdir import Workdir, read_record
from rlhf_jax.types import RlhfError

if TYPE_CHECKING:
    import rlhf_jax.reports.run


def load_config(source: str | Path, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """Load an experiment's config, and override some of its fields.

        config = load_config("quickstart:smoke", {"ppo.kl_coef": 0.05, "dpo_1.loss.losses": ("ipo",)})

    Args:
        source: a file, or the name of an experiment that is installed with the package, optionally followed by `:ARG`,
            the argument of its `get_config`.
        overrides: values by dotted field name, like `--config.NAME=VALUE` on the command line. The file need not set
            the field. Strings are parsed as on the command line: "0.05" becomes a number if the field is a number.

    Raises RlhfError if the file does not load. The fields are checked by `run`.
    """
    config = call_config_file(source, "get_config")
    if not isinstance(config, ConfigDict):
        raise RlhfError(f"config {source}: get_config() returned a {type(config).__name__}, not a ConfigDict")
    for name, value in (overrides or {}).items():
        override(config, name, value)
    return config


def call_config_file(source: str | Path, name: str) -> Any:
    """Call a function of a config file, `get_config` or `get_sweep`, with the argument that the source gives.

    Raises RlhfError if there is no such file or function, or if it fails.
    """
    file, *variant = str(source).split(":", 1)
    if not os.path.isfile(file):
        file = included_experiment(file)
    try:
        functions = runpy.run_path(file)
        if name not in functions:
            raise RlhfError(f"there is no function {name} in {file}")
        return functions[name](*variant)
    except Exception as error:  # the file is the user's code
        reason = str(error) if isinstance(error, RlhfError) else f"{type(error).__name__}: {error}"
        raise RlhfError(f"config {source}: {reason}") from error


def included_experiment(name: str) -> str:
    """Find the file of an experiment that is installed with the package.

    Args: `name` is its dotted name, or the last parts of it: `rlhf_jax.experiments.movie_reviews.quickstart`,
        `movie_reviews.quickstart` and `quickstart` are the same.
    Raises RlhfError, listing the available names, unless exactly one matches.
    """
    files = included_experiments()
    found = [file for dotted, file in files.items() if f".{dotted}".endswith(f".{name}")]
    if len(found) != 1:
        known = ", ".join(sorted(dotted.rpartition(".")[2] for dotted in files))
        raise RlhfError(f"there is no file {name}, and the experiments that come with rlhf_jax are {known}")
    return str(found[0])


def included_experiments() -> dict[str, Path]:
    """Files of the experiments that are installed with the package, by dotted name."""
    package = Path(__file__).parent
    places = (package / "experiments", package.parent / "experiments")  # installed; in a checkout
    directory = next(place for place in places if place.is_dir())
    return {
        ".".join(("rlhf_jax.experiments", *file.relative_to(directory).with_suffix("").parts)): file
        for file in sorted(directory.rglob("*.py"))
        if "def get_config(" in file.read_text(encoding="utf-8")
    }


def run(
    config: ConfigDict | str | Path,
    workdir: str | Path,
    *,
    stage: str | None = None,
    inputs: str | Path | None = None,
) -> "rlhf_jax.reports.run.Run":
    """Run the stages of an experiment that are not complete, write the report and return the run.

        smoke = run("quickstart:smoke", "runs/smoke")
        smoke.results()

    An interrupted stage continues from its last checkpoint, whether it was started from Python or from the command
    line. Progress is printed. After `jax.distributed.initialize`, all processes run the experiment together.

    Args:
        config: the result of `load_config`, or its argument `source`. It names your own functions, such as rewards, as
            `path/file.py:name`, so that the hash of their file is part of the stage's identity.
        workdir: the directory for all results.
        stage: the only stage to run; no report is written.
        inputs: a work directory from which missing stages are read; by default the one of the last run in `workdir`.

    Raises RlhfError for a bad config, bad data, or a work directory with results of another config.
    """
    if not isinstance(config, ConfigDict):
        config = load_config(config)
    place = open_workdir(workdir, inputs)
    terminal = sys.stdout.isatty()
    # A Jupyter kernel sets FORCE_COLOR, for which rich would draw bars in the output of a cell.
    console = Console(
        width=None if terminal else 120,
        force_jupyter=False,
        force_terminal=None if terminal else False,
        quiet=not processes.is_first(),
    )
    worked = experiment.run(experiment.parse(config), place, stage, console)
    # Imported after the stages: pandas and matplotlib take a second.
    from rlhf_jax.reports.report import MATCHED, REPORT, RESULTS, is_current, print_summary, write_report
    from rlhf_jax.reports.run import Run

    found = Run(place.root, place.inputs) if place.root.is_dir() or place.inputs is None else Run(place.inputs)
    if stage is not None:
        console.print(f"Stage {stage}: {place.find(stage)}")
        return found

    def report() -> None:
        if worked or not is_current(place.root, place.inputs):
            write_report(place.root, place.inputs)
            print_summary(found, console)
        else:
            console.print("Every stage is complete; nothing to do.")
        for name in (RESULTS, MATCHED):
            if (place.root / name).exists():
                console.print(f"Results: {place.root / name}", soft_wrap=True)
        console.print(f"Report:  {place.root / REPORT}", soft_wrap=True)

    processes.on_first(report)
    return found


def open_workdir(workdir: str | Path, inputs: str | Path | None) -> Workdir:
    """Return a work directory, by default with the `inputs` of the last run in it."""
    return Workdir(Path(workdir), read_record(Path(workdir)).inputs if inputs is None else Path(inputs))


def fetch(name: str) -> Path:
    """Download a data set or a model by name, unless it is already there, and return its path.

        fetch("movie_reviews")

    Raises RlhfError for an unknown name, if there is no network, or if the download has an unexpected hash.
    """
    return fetch_model(name) if name in MODELS else data_sets.fetch(name)
