"""Experiments: named stages that run in order in one work directory."""

import contextlib
import dataclasses
import functools
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console

from rlhf_jax import config as configs
from rlhf_jax import user_code
from rlhf_jax.data import formats
from rlhf_jax.data.pipeline import DataConfig
from rlhf_jax.interop.hub import MODELS, checkpoint_hash
from rlhf_jax.loading.context import Common, Context
from rlhf_jax.methods.online_config import OnlineConfig
from rlhf_jax.runtime import process, provenance
from rlhf_jax.runtime.files import read_rows, write_json
from rlhf_jax.runtime.programs import RuntimeConfig
from rlhf_jax.runtime.progress import Display
from rlhf_jax.runtime.workdir import Identity, Workdir
from rlhf_jax.stages.kinds import KINDS, StageConfig, find_kind
from rlhf_jax.stages.online_dpo import OnlineDPOConfig
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
        data = dataclasses.asdict(self.data)
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
        stages[name] = sections[name]
    return Experiment(common.seed, common.seeds, common.data, common.runtime, stages)


def run(experiment: Experiment, workdir: Workdir, only: str | None, console: Console) -> bool:
    """Run the incomplete stages, or only one stage; return whether there was anything to do."""
    if only is not None and only not in experiment.stages:
        raise RlhfError(f"--stage={only} is not in config.stages = {tuple(experiment.stages)}")
    if workdir.root.exists() and not workdir.root.is_dir():
        raise RlhfError(f"--workdir={workdir.root} is a file: name a directory")
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {experiment.runtime.xla_flags}"
    process.set_up()
    display = Display(console)
    worked = False
    here = functools.cache(provenance.environment)  # read once: the source may change while the process runs
    with display.running():
        for name in [only] if only else experiment.stages:
            worked |= _run_stage(experiment, workdir, name, display, here)
    return worked


def _run_stage(
    experiment: Experiment, workdir: Workdir, name: str, display: Display, here: Callable[[], dict[str, Any]]
) -> bool:
    identity = experiment.identity(name, workdir.fingerprint)
    status = workdir.status(name, identity)
    if status in ("complete", "elsewhere"):
        return False
    if status == "again":
        display.console.print(f"{name}: an earlier start with another config left no results; starting again.")
    directory = workdir.begin(name, identity)
    provenance.begin(directory, here())
    stage = experiment.stages[name]
    kind = find_kind(stage.kind, name)
    with display.bar(name) as bar, _timed(directory) as seconds:
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
    seeds = range(experiment.seed, experiment.seed + (experiment.seeds if kind.seeded else 1))
    batch = _batch(stage, kind.unit, experiment.runtime, directory)
    found = provenance.record(directory, identity, seeds, batch)
    write_json(directory / "summary.json", {**summary, "provenance": found, "time/seconds": seconds[0]})
    workdir.complete(name, identity)
    return True


@contextlib.contextmanager
def _timed(directory: Path) -> Iterator[list[float]]:
    """Measure the seconds that a stage takes, including the time that interrupted runs logged."""
    earlier = read_rows(directory / "metrics.jsonl")
    seconds = [earlier[-1]["time/elapsed"] if earlier else 0.0]
    start = time.perf_counter()
    yield seconds
    seconds[0] += time.perf_counter() - start


def _batch(stage: Any, unit: str | None, runtime: RuntimeConfig, directory: Path) -> dict[str, Any] | None:
    """Return the effective batch of a stage that trains, from its config and its metrics; None for other stages."""
    if unit is None:
        return None
    metrics = read_rows(directory / "metrics.jsonl")
    if isinstance(stage, OnlineConfig):
        rows = stage.batch_size // stage.minibatches
        responses = 2 * rows if isinstance(stage, OnlineDPOConfig) else rows
        tokens = [responses * row["completions/mean_length"] for row in metrics]
    else:
        rows, tokens = stage.batch_size, [row["num_tokens"] for row in metrics]
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
