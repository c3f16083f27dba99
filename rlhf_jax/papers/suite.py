"""The papers of the suite: a folder each, with claims, measurements, the paper's figure, and results.

experiments/papers/NAME/paper.py                    docstring: the record; PAPER: a `Paper`
experiments/papers/NAME/results/SCALE/seed_K.csv    measurements of one seed
                                      record.json   settings, environment, date and cost
                                      verdicts.json verdict, statistic and interval of every claim
                                      figure.png    the paper's figure, from these measurements
"""

import dataclasses
import functools
import runpy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import pandas as pd
from matplotlib.figure import Figure

from rlhf_jax.papers.claims import Claim
from rlhf_jax.types import Json, RlhfError

Question = Literal["foundations", "preference tuning", "weak judge", "reward model alone", "poor data"]
"""Families of claims that are tested together. The last four are the project's questions."""

RECORD, VERDICTS, FIGURE = "record.json", "verdicts.json", "figure.png"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """A size at which a paper is reproduced."""

    seeds: int  # number of seeds, from 0
    settings: Mapping[str, Json]  # everything that determines the measurements, as the record has it
    cost: str  # what a run takes, measured, or an estimate that says so


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paper:
    """A paper in the suite."""

    title: str
    source: str  # arXiv number, or venue
    figure: str  # figure or table that we draw
    question: Question
    scales: Mapping[str, Scale]
    # Measures seeds at a scale, with a directory for what it trains: rows with a column `seed`. What an interrupted
    # call left in the directory is used by the next.
    measure: Callable[[str, Sequence[int], Path], pd.DataFrame]
    draw: Callable[[pd.DataFrame], Figure]  # table of results -> the paper's figure
    claims: tuple[Claim, ...]
    # Table of results -> a table of text for the page of results, such as one row per topic.
    details: Callable[[pd.DataFrame], pd.DataFrame] | None = None


def papers_directory() -> Path:
    """Directory of the papers, in a checkout or an installed package."""
    package = Path(__file__).parents[1]
    places = (package / "experiments" / "papers", package.parent / "experiments" / "papers")
    return next(place for place in places if place.is_dir())


def names() -> list[str]:
    """Names of all papers, sorted."""
    return sorted(file.parent.name for file in papers_directory().glob("*/paper.py"))


def load_paper(name: str) -> Paper:
    """Load a paper by the name of its folder, once a process. Raises RlhfError, listing the names, if there is none."""
    file = papers_directory() / name / "paper.py"
    if not file.is_file():
        raise RlhfError(f"there is no paper {name!r}: give one of {', '.join(names())}")
    return _load(file)


def scale_of(paper: Paper, name: str) -> Scale:
    """Look up a scale of a paper. Raises RlhfError, listing its scales and the papers with this one, if it has none."""
    if name not in paper.scales:
        others = [other for other in names() if name in load_paper(other).scales]
        having = f"; papers with the scale {name}: {', '.join(others)}" if others else ""
        raise RlhfError(f"{paper.title} has no scale {name!r}: give one of {', '.join(paper.scales)}{having}")
    return paper.scales[name]


def read_results(directory: Path) -> pd.DataFrame | None:
    """Read the measurements of all seeds, in the order of the seeds; None if there are none."""
    files = sorted(directory.glob("seed_*.csv"), key=lambda file: int(file.stem.removeprefix("seed_")))
    return pd.concat([pd.read_csv(file) for file in files], ignore_index=True) if files else None


def results_directory(name: str, scale: str) -> Path:
    """Directory of the results that come with the package."""
    return papers_directory() / name / "results" / scale


@functools.cache
def _load(file: Path) -> Paper:
    return runpy.run_path(str(file))["PAPER"]
