"""Determinism and resuming on a device: small runs of DPO and PPO end with the same bits."""

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree
from rich.console import Console

from rlhf_jax import experiment
from rlhf_jax.api import load_config
from rlhf_jax.loading.stage_models import load_stage
from rlhf_jax.runtime.checkpoints import steps_of
from rlhf_jax.runtime.workdir import Workdir

TRAINED = ("dpo", "ppo")
"""Stages whose policies are compared."""

CHANGES = {
    "stages": ("sft", "reward_model", *TRAINED),
    "dpo.loop.steps_per_call": 1,
    "dpo.loop.checkpoint_every": 2,
    "ppo.iterations": 4,
    "ppo.loop.steps_per_call": 1,
    "ppo.loop.checkpoint_every": 2,
}
"""Changes of `preferences:smoke`: checkpoints in the middle, and at the end."""


class ExactnessCheck(NamedTuple):
    """Comparison of the policies of two runs of a stage."""

    name: str
    passed: bool  # every bit is equal
    difference: float  # largest difference of a parameter


def checks(directory: Path) -> Iterator[ExactnessCheck]:
    """Run the experiment twice, and once more from the checkpoints in the middle. Args: an empty directory."""
    checked = experiment.parse(load_config("preferences:smoke", CHANGES))

    def run(name: str) -> dict[str, PyTree]:
        workdir = Workdir(directory / name)
        experiment.run(checked, workdir, None, Console(file=io.StringIO()))
        return {stage: load_stage(workdir.directory(stage), seed=checked.seed).params for stage in TRAINED}

    first = run("first")
    yield from compared("the same run again", first, run("second"))
    shutil.copytree(directory / "first", directory / "interrupted")
    for stage in TRAINED:
        interrupt(directory / "interrupted" / stage)
    yield from compared("resumed from a checkpoint", first, run("interrupted"))


def interrupt(stage: Path) -> None:
    """Remove what a stage wrote after its last but one checkpoint, but for its metrics, which are truncated on resume.

    A process that is killed before its last checkpoint is complete leaves such a directory.
    """
    *_, last = steps_of(stage / "checkpoints")
    shutil.rmtree(stage / "checkpoints" / str(last))
    for name in ("complete.json", "summary.json"):
        (stage / name).unlink()


def compared(name: str, first: dict[str, PyTree], second: dict[str, PyTree]) -> Iterator[ExactnessCheck]:
    """Compare the parameters of two runs, stage by stage."""
    for stage in first:
        leaves = (jax.tree.leaves(params[stage]) for params in (first, second))
        pairs = [tuple(map(np.asarray, pair)) for pair in zip(*leaves, strict=True)]
        same = all(one.tobytes() == other.tobytes() for one, other in pairs)
        difference = max(
            float(np.max(np.abs(one.astype(np.float64) - other.astype(np.float64)))) for one, other in pairs
        )
        yield ExactnessCheck(f"{stage}: {name}", same, difference)
