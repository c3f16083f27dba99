"""Papers that train: seeds with experiments of their own, stages that papers share, and the record of a run."""

import json

import numpy as np
import pandas as pd
import pytest
from ml_collections import ConfigDict
from rich.console import Console

from rlhf_jax import experiment
from rlhf_jax.papers import controls, reproduce, suite, training
from rlhf_jax.runtime.files import read_json, write_json

TRAINED = [name for name in suite.names() if "smoke" in suite.load_paper(name).scales]
SMOKE = [(name, scale) for name in TRAINED for scale in suite.load_paper(name).scales if scale.endswith("smoke")]


def test_random_scores_are_uniform_and_a_function_of_the_text():
    completions = [f"answer {number}" for number in range(2000)]
    scores = controls.random_score(["a"] * 2000, completions)
    assert scores == controls.random_score(["a"] * 2000, completions)
    assert scores != controls.random_score(["b"] * 2000, completions)
    assert min(scores) >= 0 and max(scores) < 1
    np.testing.assert_allclose(np.mean(scores), 0.5, atol=0.03)
    np.testing.assert_allclose(np.var(scores), 1 / 12, atol=0.01)


def test_the_record_adds_the_seeds(tmp_path):
    for seed in (0, 10, 2):
        stage = {
            "seconds": 1.5,
            "seeds": [seed],
            "commits": ["new" if seed == 10 else "old"],
            "data_sha256": {"train": "x"},
        }
        (tmp_path / f"seed_{seed}").mkdir()
        write_json(
            tmp_path / f"seed_{seed}" / training.STAGES, {"sft": {**stage, "batch": {"rows": 64, "tokens": 9.0}}}
        )
    assert training.stages_record(tmp_path) == {
        "sft": {
            "seconds": 4.5,
            "seeds": [0, 2, 10],
            "commits": ["old", "new"],
            "data_sha256": {"train": "x"},
            "batch": {"rows": 64, "tokens": 9.0},
        }
    }
    assert training.stages_record(tmp_path / "missing") == {}


@pytest.mark.nightly
@pytest.mark.parametrize("name", TRAINED)
def test_settings_are_those_of_an_experiment(name):
    for scale in suite.load_paper(name).scales.values():
        sections = {name: section for name, section in scale.settings.items() if name != "constants"}
        config = ConfigDict({**sections, "seed": 0})
        assert list(experiment.parse(config).stages) == scale.settings["stages"]


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "scale"), SMOKE)
def test_a_paper_that_trains_runs_from_data_to_verdicts(name, scale, tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_JAX_DATA", str(tmp_path / "data"))
    judged = reproduce.reproduce(name, scale, None, tmp_path / "run", Console(quiet=True))
    assert all(outcome.units >= 2 for _, outcome in judged)
    tables = [pd.read_csv(tmp_path / "run" / f"seed_{seed}.csv") for seed in (0, 1)]
    assert not tables[0].drop(columns="seed").equals(tables[1].drop(columns="seed"))
    record = read_json(tmp_path / "run" / suite.RECORD)
    assert all(stage["seeds"] == [0, 1] for stage in record["stages"].values())
    trained = [stage for stage in record["stages"].values() if "batch" in stage]
    assert trained and all(stage["batch"]["rows"] > 0 and stage["batch"]["tokens"] > 0 for stage in trained)
    assert all(len(sha) == 64 for stage in record["stages"].values() for sha in stage["data_sha256"].values())
    places = (tmp_path / "data" / "papers").glob("*/seed_*/sft/complete.json")
    assert len({place.resolve() for place in places}) == 2, "each seed trains it once"
    assert not (tmp_path / "run" / "work" / "seed_0" / "sft").exists(), "SFT is shared"
    settings = suite.load_paper(name).scales[scale].settings
    assert json.loads(json.dumps(record["settings"])) == settings
