"""Copies of a stage's metrics for TensorBoard, Weights & Biases and MLflow.

`metrics.jsonl` is the record, from which every copy is completed when a run is resumed. The rows after the last
checkpoint are then computed again, bitwise as before, so that a service which has a step already need not get it again.
TensorBoard's files can only be appended to, and are written anew.
"""

import contextlib
import hashlib
import importlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Literal, Protocol

from tensorboardX import FileWriter
from tensorboardX.proto.summary_pb2 import Summary  # type: ignore  # protobuf makes the class when it is imported

from rlhf_jax.runtime.files import read_json, read_rows
from rlhf_jax.runtime.workdir import TENSORBOARD, flatten
from rlhf_jax.types import RlhfError, Row

Service = Literal["wandb", "mlflow"]
"""Services that a config may name."""

PROJECT = "rlhf_jax"
"""Project of Weights & Biases, or experiment of MLflow, unless the service's own environment variable names one."""


class Tracker(Protocol):
    """A copy of the metrics."""

    def write(self, rows: Iterable[Row]) -> None:
        """Add rows of metrics; steps that the copy has already are left out."""

    def close(self) -> None:
        """Send what is left, and close."""


@contextlib.contextmanager
def opened(services: Sequence[Service], directory: Path) -> Iterator[list[Tracker]]:
    """Open TensorBoard's files and the services of a stage, bring them up to its `metrics.jsonl`, and close them.

    Raises: RlhfError if the package of a service is not installed.
    """
    makers = {"wandb": WeightsAndBiases, "mlflow": MLflow}
    modules = {name: _imported(name) for name in services}
    trackers: list[Tracker] = [TensorBoard(directory), *(makers[name](modules[name], directory) for name in services)]
    rows = read_rows(directory / "metrics.jsonl")
    with contextlib.ExitStack() as stack:
        for tracker in trackers:
            stack.callback(tracker.close)
            tracker.write(rows)
        yield trackers


class TensorBoard:
    """Event files in the stage's directory, one run per seed."""

    def __init__(self, directory: Path) -> None:
        """Remove the files of an interrupted run."""
        self._root = directory / TENSORBOARD
        shutil.rmtree(self._root, ignore_errors=True)
        self._files: dict[int, FileWriter] = {}

    def write(self, rows: Iterable[Row]) -> None:
        """Add rows of metrics."""
        for row in rows:
            if row["seed"] not in self._files:
                self._files[row["seed"]] = FileWriter(str(self._root / f"seed_{row['seed']}"))
            values = [Summary.Value(tag=name, simple_value=value) for name, value in _numbers(row).items()]
            self._files[row["seed"]].add_summary(Summary(value=values), row["step"])

    def close(self) -> None:
        """Flush and close the files."""
        for file in self._files.values():
            file.close()


class WeightsAndBiases:
    """Runs of Weights & Biases, one per seed, in the group of the work directory.

    The client's own environment variables, such as WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE, apply.
    """

    def __init__(self, wandb: ModuleType, directory: Path) -> None:
        """Remember the client and the stage; runs are begun, or resumed, with their first rows."""
        self._wandb, self._directory = wandb, directory
        self._runs: dict[int, tuple[object, int]] = {}  # run, and the steps that it has

    def write(self, rows: Iterable[Row]) -> None:
        """Send rows of metrics."""
        for row in rows:
            if row["seed"] not in self._runs:
                self._runs[row["seed"]] = self._begin(row["seed"])
            run, have = self._runs[row["seed"]]
            if row["step"] > have:
                run.log(_numbers(row), step=row["step"])  # type: ignore[attr-defined]

    def close(self) -> None:
        """Finish the runs."""
        for run, _ in self._runs.values():
            run.finish()  # type: ignore[attr-defined]

    def _begin(self, seed: int) -> tuple[object, int]:
        run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            group=self._directory.resolve().parent.name,
            name=_name(self._directory, seed),
            id=_identity(self._directory, seed),
            config=_config(self._directory, seed),
            dir=str(self._directory),
            resume="allow",
            reinit="create_new",
        )
        return run, max(0, run.step - 1)  # `step` is the next one of a resumed run


class MLflow:
    """Runs of MLflow, one per seed, at the address in MLFLOW_TRACKING_URI (by default, the directory `mlruns`)."""

    def __init__(self, mlflow: ModuleType, directory: Path) -> None:
        """Connect to the server, and find or create the experiment that MLFLOW_EXPERIMENT_NAME names."""
        self._client, self._directory = mlflow.MlflowClient(), directory
        self._entities = importlib.import_module("mlflow.entities")
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        self._experiment = self._client.create_experiment(name) if found is None else found.experiment_id
        self._runs: dict[int, tuple[str, int]] = {}  # id, and the steps that it has

    def write(self, rows: Iterable[Row]) -> None:
        """Send rows of metrics."""
        for row in rows:
            if row["seed"] not in self._runs:
                self._runs[row["seed"]] = self._begin(row["seed"])
            identity, have = self._runs[row["seed"]]
            if row["step"] > have:
                numbers = {name: float(value) for name, value in _numbers(row).items()}
                now = int(1000 * time.time())
                metrics = [self._entities.Metric(name, value, now, row["step"]) for name, value in numbers.items()]
                self._client.log_batch(identity, metrics=metrics)

    def close(self) -> None:
        """Mark the runs as finished."""
        for identity, _ in self._runs.values():
            self._client.set_terminated(identity)

    def _begin(self, seed: int) -> tuple[str, int]:
        identity = _identity(self._directory, seed)
        found = self._client.search_runs([self._experiment], f"tags.stage_id = '{identity}'")
        if found:
            run, names = found[0].info.run_id, found[0].data.metrics
            histories = (self._client.get_metric_history(run, name) for name in names)
            return run, max((metric.step for history in histories for metric in history), default=0)
        tags = {"stage_id": identity, "workdir": str(self._directory.resolve().parent)}
        run = self._client.create_run(self._experiment, tags=tags, run_name=_name(self._directory, seed))
        params = [self._entities.Param(name, str(value)) for name, value in _config(self._directory, seed).items()]
        self._client.log_batch(run.info.run_id, params=params)
        return run.info.run_id, 0


def _imported(service: Service) -> ModuleType:
    try:
        return importlib.import_module(service)
    except ImportError as error:
        raise RlhfError(
            f"runtime.trackers names {service}, which is not installed: pip install 'rlhf-jax[{service}]', or remove it"
        ) from error


def _numbers(row: Row) -> Row:
    return {name: value for name, value in row.items() if name not in ("step", "seed") and value is not None}


def _name(directory: Path, seed: int) -> str:
    return f"{directory.resolve().parent.name}/{directory.name}, seed {seed}"


def _identity(directory: Path, seed: int) -> str:
    """Id of a seed's run, the same for every process that works on the stage."""
    config = (directory / "config.json").read_bytes() if (directory / "config.json").exists() else b""
    return hashlib.sha256(f"{directory.resolve()} {seed} ".encode() + config).hexdigest()[:16]


def _config(directory: Path, seed: int) -> Row:
    """Flat config of the stage, with the seed."""
    config = read_json(directory / "config.json") if (directory / "config.json").exists() else {}
    return {**flatten(config), "seed": seed}
