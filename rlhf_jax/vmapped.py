"""Training of a stage of several points of a sweep in one program, where the points differ in numbers only.

Each point gets the metrics, samples and checkpoints of its own run, in its own work directory, up to rounding. Its
training is then complete, and the point runs on like an interrupted run, which writes the summary and later stages.
"""

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.console import Console

from rlhf_jax import config as configs
from rlhf_jax.experiment import Experiment, begin_stage, environment
from rlhf_jax.loading.context import Together
from rlhf_jax.methods.offline import OfflineConfig
from rlhf_jax.methods.online_config import OnlineConfig
from rlhf_jax.methods.policy_config import PolicyGradientConfig
from rlhf_jax.runtime import compiler, provenance
from rlhf_jax.runtime.progress import Display
from rlhf_jax.runtime.stage_state import recorded
from rlhf_jax.runtime.workdir import Identity, Workdir, flatten
from rlhf_jax.runtime.workdir_lock import locked
from rlhf_jax.stages.kinds import StageConfig, find_kind


class Member(NamedTuple):
    """A stage of one point that is not complete."""

    experiment: Experiment
    place: Workdir
    identity: Identity


def train_points(points: Sequence[tuple[Experiment, Workdir]], name: str, console: Console) -> None:
    """Train one stage of all points that allow it, in a program for each group of points that differ in numbers only.

    Prints how many points train together, and why others do not. Stages that are complete are left out.
    """
    experiment, place = points[0]
    stage = experiment.stages[name]
    kind = find_kind(stage.kind, name)
    if kind.unit is None or all(is_complete(each, name) for _, each in points):
        return
    apart = [each for each in configs.input_stages(stage, experiment.stages) if not is_complete(place, each)]
    if not kind.numbers or apart:
        reads = f"it reads {', '.join(apart)}, which they do not share"
        reason = reads if kind.numbers else "this kind of stage trains one run at a time"
        console.print(f"{name}: points train one after the other, because {reason}")
        return
    for members in groups(points, name):
        numbers = differing(members, name)
        reason = obstacle(members[0].experiment.stages[name], [*numbers])
        if len(members) > 1 and reason is None:
            console.print(f"{name}: {len(members)} points, which differ in {', '.join(numbers)}, train in one program")
            train(members, numbers, name, console)
        elif len(members) > 1:
            console.print(f"{name}: {len(members)} points train one after the other, because {reason}")
    if alone := [members for members in groups(points, name) if len(members) == 1]:
        console.print(
            f"{name}: {len(alone)} points train alone: no other has the same inputs and differs only in "
            f"{', '.join(kind.numbers)}"
        )


def groups(points: Sequence[tuple[Experiment, Workdir]], name: str) -> list[list[Member]]:
    """Group the points whose stage is not complete by what has to be equal in one program.

    A stage whose inputs are not complete forms no group, since they may differ.
    """
    found: dict[str, list[Member]] = {}
    for experiment, place in points:
        stage = experiment.stages[name]
        if not all(is_complete(place, each) for each in configs.input_stages(stage, experiment.stages)):
            continue
        identity = experiment.identity(name, place.fingerprint)
        if place.status(name, identity) not in ("complete", "elsewhere"):
            equal = {**identity.as_json(), "section": without_numbers(identity.section, stage, name)}
            key = json.dumps([equal, dataclasses.asdict(experiment.runtime)], sort_keys=True)
            found.setdefault(key, []).append(Member(experiment, place, identity))
    return [*found.values()]


def is_complete(place: Workdir, stage: str) -> bool:
    """Return whether a stage is complete in a work directory or its inputs."""
    roots = [place.root, *([place.inputs] if place.inputs else [])]
    return any((root / stage / "complete.json").exists() for root in roots)


def without_numbers(section: dict[str, Any], stage: StageConfig, name: str) -> dict[str, Any]:
    """Flatten a stage's section, without the numbers that may differ.

    A zero is kept, since it changes the program, and so is None, a preset of the method.
    """
    numbers = find_kind(stage.kind, name).numbers
    return {path: "a number" if path in numbers and value else value for path, value in flatten(section).items()}


def differing(members: Sequence[Member], name: str) -> dict[str, tuple[float, ...]]:
    """Values of the numbers in which the points of a group differ, by dotted path."""
    sections = [flatten(member.identity.section) for member in members]
    numbers = find_kind(members[0].experiment.stages[name].kind, name).numbers
    values = {path: tuple(section[path] for section in sections) for path in numbers}
    return {path: each for path, each in values.items() if len(set(each)) > 1}


def obstacle(stage: StageConfig, numbers: Sequence[str]) -> str | None:
    """Return why runs of a stage cannot train at once; None if they can."""
    if isinstance(stage, OfflineConfig | OnlineConfig) and stage.loop.best and stage.loop.best.patience:
        return "loop.best.patience may stop them at different steps"
    if isinstance(stage, OnlineConfig) and stage.slots is not None:
        return f"slots = {stage.slots} samples for one run at a time"
    if isinstance(stage, PolicyGradientConfig) and stage.kl_controller and "kl_coef" in numbers:
        return "kl_controller changes kl_coef during training"
    return None


def train(members: Sequence[Member], numbers: dict[str, tuple[float, ...]], name: str, console: Console) -> None:
    """Train the stage of all members in one program, from the newest step that all of them have."""
    first = members[0].experiment
    stage = first.stages[name]
    late = compiler.start(first.runtime)
    here = environment(first.runtime) | {"together": [member.place.root.name for member in members]}
    display = Display(console)
    with display.running(), contextlib.ExitStack() as held:
        if late:
            console.print(late, highlight=False, soft_wrap=True)
        display.start(f"Device: {provenance.machine_name(here['machine'])}")
        directories = tuple(member.place.directory(name) for member in members)
        for member in members:
            held.enter_context(locked(member.place.root))
            begin_stage(member.experiment, member.place, name, member.identity, here)
        states = [held.enter_context(recorded(directory)) for directory in directories]
        bar = held.enter_context(display.bar(f"{name}, {len(members)} points", state=states[0]))
        context = first.context(name, members[0].place, bar, Together(directories, numbers))
        find_kind(stage.kind, name).run(stage, context)
