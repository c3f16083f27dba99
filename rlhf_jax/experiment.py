"""Experiments: named stages that run in order in one work directory."""

import contextlib
import dataclasses
import functools
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console

from rlhf_jax import config as configs
from rlhf_jax import processes, user_code
from rlhf_jax.cli.fields import places
from rlhf_jax.data import formats
from rlhf_jax.data.pipeline import DataConfig
from rlhf_jax.interop.hub import MODELS, check_local, checkpoint_hash
from rlhf_jax.loading.context import Common, Context, Together
from rlhf_jax.methods.online_config import OnlineConfig
from rlhf_jax.runtime import compilation_cache, compiler, provenance, timings
from rlhf_jax.runtime.files import read_rows, write_json
from rlhf_jax.runtime.programs import RuntimeConfig
from rlhf_jax.runtime.progress import Bar, Display
from rlhf_jax.runtime.stage_state import recorded
from rlhf_jax.runtime.workdir import Identity, Workdir
from rlhf_jax.runtime.workdir_lock import locked
from rlhf_jax.stages.kinds import KINDS, StageConfig, find_kind
from rlhf_jax.stages.online_dpo import OnlineDPOConfig
from rlhf_jax.stages.sizes import check_batches, update_rows
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

    def context(self, name: str, workdir: Workdir, bar: Bar, together: Together | None = None) -> Context:
        """Make the context that a stage runs in. Args: together as in `Context`."""
        return Context(
            workdir=workdir,
            stages=tuple(self.stages),
            name=name,
            seed=self.seed,
            seeds=self.seeds,
            data=self.data,
            runtime=self.runtime,
            bar=bar,
            together=together,
        )


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
    check(experiment, workdir, only)
    late = compiler.start(experiment.runtime)
    display = Display(console)
    # Read once: the source may change while the process runs.
    here = functools.cache(lambda: environment(experiment.runtime))
    keys = functools.cache(lambda: cost_keys(experiment, here()))  # made once, since it reads all data
    names, worked = [only] if only else [*experiment.stages], False
    with display.running(), contextlib.ExitStack() as held:

        @functools.cache
        def lock() -> None:  # when the first stage starts
            held.enter_context(locked(workdir.root))
            if late:
                console.print(late, highlight=False, soft_wrap=True)

        for place in range(len(names)):
            worked |= _run_stage(experiment, workdir, names[place:], display, here, keys, lock)
    return worked


def check(experiment: Experiment, workdir: Workdir, only: str | None) -> None:
    """Raise RlhfError for a bad `--stage` or `--workdir`, and for a checkpoint on this machine that cannot be read."""
    if only is not None and only not in experiment.stages:
        raise RlhfError(f"--stage={only} is not in config.stages = {tuple(experiment.stages)}")
    if workdir.root.exists() and not workdir.root.is_dir():
        raise RlhfError(f"--workdir={workdir.root} is a file: name a directory")
    for name in [only] if only else experiment.stages:
        for source in configs.checkpoints(experiment.stages[name], experiment.stages):
            try:
                check_local(source)
            except RlhfError as error:
                raise RlhfError(f"config.{name}: {error}") from error


def environment(runtime: RuntimeConfig) -> dict[str, Any]:
    """Environment of this process, for the provenance of stages."""
    return provenance.environment() | {"layout": layout(runtime)}


def begin_stage(
    experiment: Experiment, workdir: Workdir, name: str, identity: Identity, here: dict[str, Any]
) -> str | None:
    """Create or continue a stage's directory, and record the environment and the experiment.

    Returns a sentence if the stage was worked on with another layout of devices.
    """
    workdir.begin(name, identity)
    changed = provenance.begin(workdir.directory(name), here)
    workdir.record([*experiment.stages])
    return changed


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
    if changes := workdir.not_reused(name, identity):
        display.console.print(f"{name}: {changes}", highlight=False, soft_wrap=True)
    if status == "again":
        display.console.print(f"{name}: an earlier start with another config left no checkpoint; starting again.")
    directory = workdir.directory(name)

    def begin() -> None:
        lock()
        if changed := begin_stage(experiment, workdir, name, identity, here()):
            display.console.print(changed, highlight=False, soft_wrap=True)

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
        summary = kind.run(stage, experiment.context(name, workdir, bar))
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
        sections = [other for other in config if isinstance(config[other], ConfigDict) and other != name]
        known = [*dict.fromkeys([*COMMON, *sections])]
        owners = {other: _section_class(config, other) for other in known}
        paths = [f"{other}.{path}" for other, cls in owners.items() if cls for path in places(cls, name)]
        closest = f" Did you mean {paths[0]!r}?" if paths else configs.suggestion(name, known)
        raise RlhfError(f"config.{name} is not the section of a stage: it has no kind.{closest}")
    kind = configs.convert(str, section.kind, f"config.{name}.kind")
    cls = find_kind(kind, f"config.{name}.kind").config
    try:
        return configs.build(cls, section, f"config.{name}")
    except configs.UnknownFieldError as error:
        sections = {name: cls, "data": DataConfig, "runtime": RuntimeConfig}
        paths = [f"{where}.{path}" for where, each in sections.items() for path in places(each, error.key)]
        if paths and not error.fault.startswith(f"config.{paths[0]} "):  # a field of another member of a union
            raise RlhfError(f"{error.fault} Did you mean {paths[0]!r}?") from error
        kinds = [kind for kind, row in KINDS.items() if error.key in places(row.config, error.key)]
        if kinds and error.fault.startswith(f"config.{name}.{error.key} "):
            raise RlhfError(f"{error.fault} It is a field of {' and of '.join(kinds)}.") from error
        raise


def _section_class(config: ConfigDict, name: str) -> type | None:
    """Class of a section of the config; None if it has none, or an unknown kind."""
    if name in ("data", "runtime"):
        return {"data": DataConfig, "runtime": RuntimeConfig}[name]
    kind = config[name].get("kind") if isinstance(config[name], ConfigDict) else None
    return KINDS[kind].config if kind in KINDS else None
