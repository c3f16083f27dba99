"""The smoke variants: every experiment has one, by name, and it reads the data that come with it or generated ones."""

import dataclasses
import runpy
from pathlib import Path

import pytest

from rlhf_jax import experiment
from rlhf_jax.api import included_experiment, load_config
from rlhf_jax.stages.ppo import PPOConfig
from rlhf_jax.stages.sizes import parameters
from rlhf_jax.types import RlhfError

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
NAMES = sorted(file.stem for file in EXPERIMENTS.rglob("*.py") if "def get_config(" in file.read_text())


@pytest.mark.parametrize("name", NAMES)
def test_a_smoke_variant_reads_the_data_that_come_with_it(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parsed = experiment.parse(load_config(f"{name}:smoke"))
    splits = {parsed.data.source(split) for split in ("train", "eval", "test")}
    assert len(splits) >= 2
    files = [Path(source) for source in splits if not source.startswith("arithmetic:")]
    assert all(path.is_file() and path.parent == EXPERIMENTS / "smoke" for path in files)
    assert "smollm2" not in str([dataclasses.asdict(stage) for stage in parsed.stages.values()])


@pytest.mark.parametrize("name", NAMES)
def test_a_full_variant_is_a_valid_config(name):
    config = load_config(name, {"data.train": "train.jsonl", "data.eval": "eval.jsonl"})
    assert [*experiment.parse(config).stages] == [*config.stages]


def test_the_variant_for_laptops_reads_the_same_data_and_trains_less():
    data = {"data.train": "train.jsonl", "data.eval": "eval.jsonl"}
    full, laptop = (experiment.parse(load_config(f"preferences{arg}", data)) for arg in ("", ":laptop"))
    assert laptop.data == full.data and [*laptop.stages] == [*full.stages]
    assert (parameters(laptop.stages, "sft") or 0) < (parameters(full.stages, "sft") or 0)
    few, many = laptop.stages["ppo"], full.stages["ppo"]
    assert isinstance(few, PPOConfig) and isinstance(many, PPOConfig) and few.updates < many.updates


def test_an_experiment_is_found_by_the_end_of_its_name():
    file = str(EXPERIMENTS / "movie_reviews" / "quickstart.py")
    for name in ("quickstart", "movie_reviews.quickstart", "rlhf_jax.experiments.movie_reviews.quickstart"):
        assert included_experiment(name) == file
    for name in ("start", "", "movie_reviews", "machines"):
        with pytest.raises(
            RlhfError,
            match=r"are arithmetic, comparison, hh_pythia, imdb_gpt2, kl_sweep, lectures, preferences, quickstart, "
            r"sentiment, tldr_pythia$",
        ):
            included_experiment(name)


def test_the_data_are_what_their_script_writes(tmp_path):
    runpy.run_path(str(EXPERIMENTS / "smoke" / "write.py"))["main"](tmp_path)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_bytes() for path in (EXPERIMENTS / "smoke").glob("*.jsonl")}
