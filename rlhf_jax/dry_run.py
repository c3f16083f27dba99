"""Plan of a run: what it would do to each stage, with sizes, and times of earlier runs. Nothing is trained."""

from typing import NamedTuple

from rlhf_jax import config as configs
from rlhf_jax.experiment import Experiment, check, cost_keys
from rlhf_jax.methods.offline import OfflineConfig
from rlhf_jax.methods.online_config import OnlineConfig
from rlhf_jax.runtime import compilation_cache, provenance, timings
from rlhf_jax.runtime.workdir import Workdir
from rlhf_jax.stages.kinds import find_kind
from rlhf_jax.stages.sizes import parameters, update_rows


class PlannedStage(NamedTuple):
    """Part of a run that has not started."""

    name: str
    status: str
    runs: bool  # False if the stage is complete
    parameters: int | None  # of the model that the stage trains; None: not known, or none
    training: str  # batch size and length of the training; empty for other stages
    seconds: float | None  # of an earlier run of a stage with the same cost
    bytes: int | None  # of that run, or else of the checkpoints of a model with Adam's state
    reason: str | None  # why the stage is not read from `inputs`; None if it is, or is not there


def plan(experiment: Experiment, workdir: Workdir, only: str | None) -> list[PlannedStage]:
    """Find what `run` would do to each stage. Raises RlhfError as `run` does."""
    check(experiment, workdir, only)
    keys, known = cost_keys(experiment, provenance.environment()), timings.read_timings(compilation_cache.cache_dir())
    planned: dict[str, PlannedStage] = {}
    for name in [only] if only else experiment.stages:
        inputs = configs.input_stages(experiment.stages[name], experiment.stages)
        waiting = [input for input in inputs if input in planned and planned[input].runs]
        if waiting:  # what it depends on is not known yet
            status, runs = "runs", True
            reason = (
                f"not read from {workdir.inputs}: it reads {', '.join(waiting)}" if workdir.has_input(name) else None
            )
        else:
            identity = experiment.identity(name, workdir.fingerprint)
            found, reason = workdir.status(name, identity), workdir.not_reused(name, identity)
            runs = found not in ("complete", "elsewhere")
            status = {"half-done": "continues", "elsewhere": "in inputs", "complete": found}.get(found, "runs")
        timing = known.get(keys[name])
        planned[name] = PlannedStage(
            name,
            status,
            runs,
            parameters(experiment.stages, name),
            _training(experiment, name),
            seconds=timing.seconds if timing else None,
            bytes=timing.bytes if timing else _checkpoint_bytes(experiment, name),
            reason=reason,
        )
    return [*planned.values()]


def _training(experiment: Experiment, name: str) -> str:
    stage = experiment.stages[name]
    if not isinstance(stage, OfflineConfig | OnlineConfig):
        return ""
    length = f"{stage.iterations} iterations" if isinstance(stage, OnlineConfig) else f"{stage.epochs:g} epochs"
    seeds = experiment.seeds if find_kind(stage.kind, name).seeded else 1
    return f"batch {update_rows(stage)}, {length}" + (f", {seeds} seeds" if seeds > 1 else "")


def _checkpoint_bytes(experiment: Experiment, name: str) -> int | None:
    """Estimate the size of a stage's checkpoints: float32 weights, and two moments for each."""
    stage, count = experiment.stages[name], parameters(experiment.stages, name)
    if count is None or not isinstance(stage, OfflineConfig | OnlineConfig):
        return None
    seeds = experiment.seeds if find_kind(stage.kind, name).seeded else 1
    return 12 * count * seeds * stage.loop.keep
