"""Experiments: named stages that run in order in one work directory."""

import contextlib
import dataclasses
import functools
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from rich.console import Console

from rlhf_jax import config as configs
from rlhf_jax import processes, user_code
from rlhf_jax.data import formats
from rlhf_jax.data.pipeline import DataConfig
from rlhf_jax.interop.hub import MODELS, checkpoint_hash
from rlhf_jax.loading.context import Common, Context
from rlhf_jax.methods.offline import OfflineConfig
from rlhf_jax.methods.online_config import OnlineConfig
from rlhf_jax.runtime import compilation_cache, provenance, timings
from rlhf_jax.runtime.files import read_rows, write_json
from rlhf_jax.runtime.programs import RuntimeConfig
from rlhf_jax.runtime.progress import Display
from rlhf_jax.runtime.stage_state import recorded
from rlhf_jax.runtime.workdir import Identity, Workdir
from rlhf_jax.runtime.workdir_lock import locked
from rlhf_jax.stages.kinds import KINDS, StageConfig, find_kind
from rlhf_jax.stages.online_dpo import OnlineDPOConfig
from rlhf_jax.stages.sizes import check_batches, parameters, update_rows
from rlhf_jax.types import RlhfError

COMMON = tuple(field.name for field in dataclasses.fields(Common))


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A checked config: every key is a known field."""

    seed: int
    seeds: int
    data: DataConfig
    runtime: RuntimeConfig
    stages: dict[str, StageConfig]  # configs by stage name, in the order in which they run

    def identity(self, name: str, fingerprint: Callable[[str], str]) -> Identity:
        """Return everything that a stage's result depends on.

        Args: fingerprint returns the fingerprint of an earlier stage.
        """
        stage = self.stages[name]
        data = self.data.settings
        hashes = {split: formats.file_hash(self.data.source(split)) for split in ("train", "eval", "test")}
        common = {"seed": self.seed, "data": data, "data_sha256": hashes}
        if find_kind(stage.kind, name).seeded:
            common["seeds"] = self.seeds
        inputs = {input: fingerprint(input) for input in configs.input_stages(stage, self.stages)}
        for source in configs.checkpoints(stage, self.stages):
            inputs[source] = checkpoint_hash(source)
        for source in configs.functions(stage):
            inputs[source] = user_code.file_hash(source)
        if stage.kind not in KINDS:
            inputs[stage.kind] = user_code.file_hash(stage.kind)
        return Identity(dataclasses.asdict(stage), common, inputs)


def parse(config: ConfigDict) -> Experiment:
    """Check a config and convert it to an experiment.

    Sections of stages that are not in `config.stages` are also checked. Raises RlhfError naming the first bad key.
    """
    for key in COMMON:
        if key not in config:
            raise RlhfError(f"config.{key} is missing")
    common = configs.build(Common, {key: config[key] for key in COMMON}, "config")
    sections = {name: _parse_stage(name, config) for name in config if name not in COMMON}
    stages: dict[str, StageConfig] = {}
    for name in common.stages:
        if name not in sections:
            raise RlhfError(f"config.stages names {name!r}, which has no section config.{name}")
        for source in configs.checkpoints(sections[name], sections):
            if not (os.path.exists(source) or source in MODELS or re.fullmatch(r"\w[\w.-]*/[\w.-]+", source)):
                raise RlhfError(
                    f"config.{name} names {source!r}, which is neither a stage ({', '.join(sections)}), nor a model to "
                    f"fetch ({', '.join(MODELS)}), nor a file or directory; write an id on the hub as OWNER/NAME"
                )
        for input in configs.input_stages(sections[name], sections):
            if input not in stages:
                raise RlhfError(
                    f"config.{name} reads stage {input!r}, which is not before it in config.stages = {common.stages}"
                )
        try:
            check_batches(sections[name], devices=common.runtime.row_devices, seeds=common.seeds)
        except RlhfError as error:
            raise RlhfError(f"config.{name}: {error}") from error
        stages[name] = sections[name]
    return Experiment(common.seed, common.seeds, common.data, common.runtime, stages)


def run(experiment: Experiment, workdir: Workdir, only: str | None, console: Console) -> bool:
    """Run the incomplete stages, or only one stage; return whether there was anything to do."""
    _check(experiment, workdir, only)
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {experiment.runtime.xla_flags}"
    compilation_cache.enable()
    display = Display(console)
    # Read once: the source may change while the process runs.
    here = functools.cache(lambda: provenance.environment() | {"layout": layout(experiment.runtime)})
    keys = functools.cache(lambda: cost_keys(experiment, here()))  # made once, since it reads all data
    names, worked = [only] if only else [*experiment.stages], False
    with display.running(), contextlib.ExitStack() as held:
        lock = functools.cache(lambda: held.enter_context(locked(workdir.root)))  # when the first stage starts
        for place in range(len(names)):
            worked |= _run_stage(experiment, workdir, names[place:], display, here, keys, lock)
    return worked


def _check(experiment: Experiment, workdir: Workdir, only: str | None) -> None:
    if only is not None and only not in experiment.stages:
        raise RlhfError(f"--stage={only} is not in config.stages = {tuple(experiment.stages)}")
    if workdir.root.exists() and not workdir.root.is_dir():
        raise RlhfError(f"--workdir={workdir.root} is a file: name a directory")


def _run_stage(
    experiment: Experiment,
    workdir: Workdir,
    names: Sequence[str],
    display: Display,
    here: Callable[[], dict[str, Any]],
    cost_keys_of: Callable[[], dict[str, str]],
    lock: Callable[[], None],
) -> bool:
    """Run the first of the stages that are left, unless it is complete; return whether it ran."""
    name = names[0]
    identity = experiment.identity(name, workdir.fingerprint)
    status = workdir.status(name, identity)
    if status in ("complete", "elsewhere"):
        return False
    if status == "again":
        display.console.print(f"{name}: an earlier start with another config left no results; starting again.")
    directory = workdir.directory(name)

    def begin() -> None:
        lock()
        workdir.begin(name, identity)
        if changed := provenance.begin(directory, here()):
            display.console.print(changed, highlight=False, soft_wrap=True)
        workdir.record([*experiment.stages])

    processes.wait()  # until all have read what the first one now replaces
    processes.on_first(begin)
    stage = experiment.stages[name]
    kind = find_kind(stage.kind, name)
    display.start(f"Device: {provenance.machine_name(here()['machine'])}")
    keys, known = cost_keys_of(), timings.read_timings(compilation_cache.cache_dir())
    left = [later for later in names[1:] if not (workdir.directory(later) / "complete.json").exists()]
    with (
        recorded(directory) as state,
        _timed(directory) as seconds,
        display.bar(
            name, before=known.get(keys[name]), later=[known.get(keys[each]) for each in left], state=state
        ) as bar,
    ):
        bar.describe(*_sizes(experiment, name))
        context = Context(
            workdir=workdir,
            stages=tuple(experiment.stages),
            name=name,
            seed=experiment.seed,
            seeds=experiment.seeds,
            data=experiment.data,
            runtime=experiment.runtime,
            bar=bar,
        )
        summary = kind.run(stage, context)
    _check_data(experiment, identity)

    def complete() -> None:
        seeds = range(experiment.seed, experiment.seed + (experiment.seeds if kind.seeded else 1))
        batch = _batch(stage, kind.unit, experiment.runtime, directory)
        found = provenance.record(directory, identity, seeds, batch)
        write_json(directory / "summary.json", {**summary, "provenance": found, "time/seconds": seconds[0]})
        if kind.unit is None or bar.first_call is not None:  # else it was trained before, maybe with other points
            timing = timings.Timing(seconds[0], bar.first_call, bytes_of(directory))
            timings.add_timing(compilation_cache.cache_dir(), keys[name], timing)
        workdir.complete(name, identity)

    processes.on_first(complete)
    return True


def _check_data(experiment: Experiment, identity: Identity) -> None:
    """Raise RlhfError if a data file is not the one that the stage was started with."""
    for split, before in identity.common["data_sha256"].items():
        source = experiment.data.source(split)
        if formats.file_hash(source) != before:
            raise RlhfError(
                f"{source} changed while a stage read it: put the earlier file back and run again, or give a new "
                "--workdir"
            )


def layout(runtime: RuntimeConfig) -> dict[str, Any]:
    """Division of the work over devices and processes, which changes results by rounding."""
    names = ("strategy", "data", "fsdp", "tensor")
    return {**{name: getattr(runtime, name) for name in names}, "processes": processes.count()}


class PlannedStage(NamedTuple):
    """Part of a run that has not started."""

    name: str
    status: str
    runs: bool  # False if the stage is complete
    parameters: int | None  # of the model that the stage trains; None: not known, or none
    training: str  # batch size and length of the training; empty for other stages
    seconds: float | None  # of an earlier run of a stage with the same cost
    bytes: int | None  # of that run, or else of the checkpoints of a model with Adam's state


def plan(experiment: Experiment, workdir: Workdir, only: str | None) -> list[PlannedStage]:
    """Find what `run` would do to each stage. Raises RlhfError as `run` does."""
    _check(experiment, workdir, only)
    keys, known = cost_keys(experiment, provenance.environment()), timings.read_timings(compilation_cache.cache_dir())
    planned: dict[str, PlannedStage] = {}
    for name in [only] if only else experiment.stages:
        inputs = configs.input_stages(experiment.stages[name], experiment.stages)
        if any(planned[input].runs for input in inputs if input in planned):
            status, runs = "runs", True  # what it depends on is not known yet
        else:
            found = workdir.status(name, experiment.identity(name, workdir.fingerprint))
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


def cost_keys(experiment: Experiment, here: dict[str, Any]) -> dict[str, str]:
    """Keys of the stages' timings on this machine; see `timings.cost_key`."""
    data = experiment.data.settings
    splits = ("train", "eval", "test")
    common = {
        "data": {name: value for name, value in data.items() if name not in splits},
        "rows": [formats.file_hash(experiment.data.source(split)) for split in splits],
        "runtime": dataclasses.asdict(experiment.runtime),
        "machine": {name: here["machine"][name] for name in ("platform", "devices", "processor", "threads")},
        "jax": here["packages"]["jax"],
    }
    keys: dict[str, str] = {}
    for name, stage in experiment.stages.items():
        inputs = [keys[input] for input in configs.input_stages(stage, experiment.stages)]
        seeds = experiment.seeds if find_kind(stage.kind, name).seeded else 1
        keys[name] = timings.cost_key(dataclasses.asdict(stage), {**common, "seeds": seeds}, inputs)
    return keys


def bytes_of(directory: Path) -> int:
    """Size of the files of a directory and its subdirectories, in bytes."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def _sizes(experiment: Experiment, name: str) -> list[str]:
    """Describe the batch of a stage that trains, and its seeds, for the progress display."""
    stage = experiment.stages[name]
    kind = find_kind(stage.kind, name)
    if kind.unit is None:
        return []
    seeds = [f"{experiment.seeds} seeds"] if kind.seeded and experiment.seeds > 1 else []
    return [*seeds, f"{update_rows(stage)} {kind.unit} per update"]


@contextlib.contextmanager
def _timed(directory: Path) -> Iterator[list[float]]:
    """Measure the seconds that a stage takes, including the time that interrupted runs logged.

    A killed run may have written some of the rows of a call only, and the last row of a call has the time.
    """
    logged = [row["time/elapsed"] for row in read_rows(directory / "metrics.jsonl") if "time/elapsed" in row]
    seconds = [logged[-1] if logged else 0.0]
    start = time.perf_counter()
    yield seconds
    seconds[0] += time.perf_counter() - start


def _batch(stage: Any, unit: str | None, runtime: RuntimeConfig, directory: Path) -> dict[str, Any] | None:
    """Return the effective batch of a stage that trains, from its config and its metrics; None for other stages."""
    if unit is None:
        return None
    metrics, rows = read_rows(directory / "metrics.jsonl"), update_rows(stage)
    if isinstance(stage, OnlineConfig):
        responses = 2 * rows if isinstance(stage, OnlineDPOConfig) else rows
        tokens = [responses * row["completions/mean_length"] for row in metrics]
    else:
        tokens = [row["num_tokens"] for row in metrics]
    return provenance.effective_batch(
        rows=rows,
        unit=unit,
        micro_batch=stage.optimizer.micro_batch,
        devices=runtime.data * runtime.fsdp,
        tokens=tokens,
    )


def _parse_stage(name: str, config: ConfigDict) -> StageConfig:
    section = config[name]
    if not isinstance(section, ConfigDict) or "kind" not in section:
        known = [*COMMON, *(other for other in config if isinstance(config[other], ConfigDict) and other != name)]
        raise RlhfError(
            f"config.{name} is not the section of a stage: it has no kind.{configs.suggestion(name, known)}"
        )
    kind = configs.convert(str, section.kind, f"config.{name}.kind")
    return configs.build(find_kind(kind, f"config.{name}.kind").config, config[name], f"config.{name}")
