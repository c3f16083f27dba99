"""Copies of the metrics: each step once, also after a run was killed and resumed."""

import sys
import types

import numpy as np
import pytest

from rlhf_jax.runtime.files import write_json, write_rows
from rlhf_jax.runtime.trackers import opened
from rlhf_jax.types import RlhfError
from tests.support.event_files import scalars


def rows(first, last, seeds=(0,)):
    return [
        {"step": step, "seed": seed, "loss": 1 / step + seed, "kl": None if step == 2 else 0.1 * step}
        for step in range(first, last + 1)
        for seed in seeds
    ]


@pytest.fixture
def stage(tmp_path):
    directory = tmp_path / "run" / "ppo"
    directory.mkdir(parents=True)
    write_json(directory / "config.json", {"section": {"kind": "ppo", "optimizer": {"b1": 0.9}}})
    return directory


def interrupted(stage, services=(), seeds=(0,)):
    """Write six steps, lose the last two with the checkpoint after the fourth, and go on to the eighth."""
    for kept, new in (([], rows(1, 6, seeds)), (rows(1, 4, seeds), rows(5, 8, seeds))):
        write_rows(stage / "metrics.jsonl", kept)
        with opened(services, stage) as trackers:
            for tracker in trackers:
                tracker.write(new)


def test_tensorboard_has_each_step_of_each_seed_once(stage):
    interrupted(stage, seeds=(0, 1))
    for seed in (0, 1):
        found = scalars(stage / "tensorboard" / f"seed_{seed}")
        expected = {(row["step"], "loss"): [np.float32(row["loss"])] for row in rows(1, 8, (seed,))}
        expected |= {
            (row["step"], "kl"): [np.float32(row["kl"])] for row in rows(1, 8, (seed,)) if row["kl"] is not None
        }
        assert found == expected


class Services:
    """Stand-ins for the parts of both clients that are used, with what they were sent, by run."""

    def __init__(self, patch):
        self.runs: dict[str, dict] = {}
        entities = {
            "Metric": lambda key, value, timestamp, step: types.SimpleNamespace(key=key, value=value, step=step),
            "Param": lambda key, value: (key, value),
        }
        contents = {"wandb": {"init": self.init}, "mlflow": {"MlflowClient": lambda: self}, "mlflow.entities": entities}
        for name, content in contents.items():
            module = types.ModuleType(name)
            vars(module).update(content)
            patch.setitem(sys.modules, name, module)

    def init(self, *, id, resume, reinit, config, group, name, project, dir):
        assert (resume, reinit, group, project) == ("allow", "create_new", "run", "rlhf_jax")
        sent = self.runs.setdefault(id, {"name": name, "params": config, "rows": [], "finished": 0})
        step = sent["rows"][-1][0] + 1 if sent["rows"] else 0
        return types.SimpleNamespace(
            step=step,
            log=lambda row, step: sent["rows"].append((step, row)),
            finish=lambda: sent.update(finished=sent["finished"] + 1),
        )

    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name):
        assert name == "rlhf_jax"
        return "7"

    def search_runs(self, experiments, query):
        found = [
            run for run in self.runs.values() if experiments == ["7"] and query == f"tags.stage_id = '{run['id']}'"
        ]
        names = {name: 0.0 for run in found for _, row in run["rows"] for name in row}
        return [
            types.SimpleNamespace(
                info=types.SimpleNamespace(run_id=run["id"]), data=types.SimpleNamespace(metrics=names)
            )
            for run in found
        ]

    def get_metric_history(self, run, name):
        return [types.SimpleNamespace(step=step) for step, row in self.runs[run]["rows"] if name in row]

    def create_run(self, experiment, *, tags, run_name):
        run = {"id": tags["stage_id"], "name": run_name, "params": {}, "rows": [], "finished": 0}
        self.runs[tags["stage_id"]] = run
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=tags["stage_id"]))

    def log_batch(self, run, metrics=(), params=()):
        self.runs[run]["params"] |= dict(params)
        if metrics:
            self.runs[run]["rows"].append((metrics[0].step, {metric.key: metric.value for metric in metrics}))

    def set_terminated(self, run):
        self.runs[run]["finished"] += 1


@pytest.mark.parametrize("service", ["wandb", "mlflow"])
def test_a_service_gets_each_step_once_and_the_config(stage, service, monkeypatch):
    services = Services(monkeypatch)
    interrupted(stage, [service], seeds=(3, 4))
    assert len(services.runs) == 2
    for seed, run in zip((3, 4), services.runs.values(), strict=True):
        assert run["name"] == f"run/ppo, seed {seed}" and run["finished"] == 2
        assert str(run["params"]["section.optimizer.b1"]) == "0.9" and str(run["params"]["seed"]) == str(seed)
        wanted = [{name: row[name] for name in ("loss", "kl") if row[name] is not None} for row in rows(1, 8, (seed,))]
        assert run["rows"] == [*enumerate(wanted, 1)]


def test_a_service_that_is_not_installed_is_named_before_anything_is_written(stage, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RlhfError, match=r"names wandb, which is not installed: pip install 'rlhf-jax\[wandb\]'"):
        opened(["wandb"], stage).__enter__()
    assert not (stage / "tensorboard").exists()


@pytest.mark.nightly
@pytest.mark.filterwarnings("default")
def test_mlflow_itself_has_each_step_once(stage, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    interrupted(stage, ["mlflow"])
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("rlhf_jax").experiment_id])
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(row["step"], row["loss"]) for row in rows(1, 8)]
    assert run.data.params["section.optimizer.b1"] == "0.9" and run.info.status == "FINISHED"


@pytest.mark.nightly
@pytest.mark.filterwarnings("default")
def test_weights_and_biases_itself_takes_the_rows_offline(stage, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    interrupted(stage, ["wandb"])
    runs = [path for path in (stage / "wandb").iterdir() if path.name.startswith("offline-run-")]
    assert len(runs) == 2 and len({path.name.rpartition("-")[2] for path in runs}) == 1, "both under one id"
    files = [file for path in runs for file in path.glob("*.wandb")]
    assert len(files) == 2 and all(b"section.optimizer.b1" in file.read_bytes() for file in files)
