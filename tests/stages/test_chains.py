"""Models that a stage starts from, is compared with and is scored by: those of the stages that its config names.

Earlier stages are written as training leaves them, and a later one is stopped where it would train.
"""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from rich.console import Console

from rlhf_jax import experiment
from rlhf_jax.loading.models import Policy, RewardModel, merged
from rlhf_jax.loading.pretrained import load_checkpoint
from rlhf_jax.loading.stage_models import Base
from rlhf_jax.methods import offline, online
from rlhf_jax.models.lora import Adapted
from rlhf_jax.runtime.checkpoints import Checkpoints, TrainState
from rlhf_jax.runtime.files import write_json
from rlhf_jax.runtime.loop import Task
from rlhf_jax.runtime.workdir import Workdir
from tests.support import experiments
from tests.support.trained_stages import LORA, adapted, write_stage

OFFLINE = {
    "optimizer": experiments.OPTIMIZER,
    "batch_size": 8,
    "epochs": 1.0,
    "eval_every": 4,
    "loop": experiments.LOOP,
}
ONLINE = {
    "policy": "sft",
    "reward_model": "reward_model",
    "iterations": 4,
    "batch_size": 8,
    "minibatches": 1,
    "epochs": 1,
    "temperature": 1.0,
    "optimizer": experiments.OPTIMIZER,
    "samples_every": 1,
    "samples_written": 2,
    "loop": experiments.LOOP,
}
PPO = {"gamma": 1.0, "gae_lambda": 0.95, "clip_ratio": 0.2, "value_clip": 0.2, "vf_coef": 0.1, "kl_coef": 0.1}
OF_SFT = {"policy": "sft", "preferences": None, "beta": 0.1, "sample_prompts": 0}
LATER = {
    "dpo": {"kind": "dpo", **OFFLINE, **OF_SFT},
    "kto": {"kind": "kto", **OFFLINE, **OF_SFT},
    "ppo": {"kind": "ppo", **ONLINE, **PPO, "value_head": "reward_model"},
    "rloo": {"kind": "group_rl", "method": "rloo", "kl_coef": 0.1, "num_generations": 2, **ONLINE},
    "online_dpo": {"kind": "online_dpo", "beta": 0.1, **ONLINE},
}


@dataclasses.dataclass(frozen=True)
class Trained:
    """Work directory with stages sft and reward_model, and their models."""

    workdir: Workdir
    sections: dict[str, dict[str, Any]]
    sft: Policy
    reward: RewardModel


class Started(Exception):
    """A stage is about to train."""

    def __init__(self, task: Task) -> None:
        self.task = task


def moved(tree):
    """Other weights, far from the first ones."""
    return jax.tree.map(lambda leaf: 1.1 * leaf + 0.05, tree)


SECTIONS = {
    "sft": {"kind": "sft", "tokenizer": None, "sample_prompts": 0, **OFFLINE},
    "reward_model": {"kind": "reward_model", "policy": None, "preferences": None, "pooling": "last", **OFFLINE},
}


def write_chain(directory: Path, *, adapters: bool) -> Trained:
    """Stages sft and reward_model that trained whole models, or adapters of a checkpoint; the older of two differs."""
    places = experiments.models(directory)
    experiments.preference_rows(directory / "pairs.jsonl")
    sections, models = {}, []
    for (name, section), place in zip(SECTIONS.items(), places, strict=True):
        sections[name] = section | {"model": {"init": place}}
        start, stage = load_checkpoint(place), directory / "run" / name
        first = adapted(start) if adapters else start._replace(params=moved(start.params))
        write_stage(stage, first, Base(place, is_stage=False) if adapters else None)
        last = moved(first.params.adapter if adapters else first.params)
        network = "policy" if name == "sft" else "reward"
        with contextlib.closing(Checkpoints(stage / "checkpoints", keep=2)) as checkpoints:
            checkpoints.save(TrainState(jnp.int32(4), {network: last}, ()))
        write_json(stage / "complete.json", {"fingerprint": name})
        models.append(merged(first._replace(params=Adapted(start.params, last) if adapters else last)))
    return Trained(Workdir(directory / "run"), sections, *models)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    return write_chain(tmp_path_factory.mktemp("chain"), adapters=True)


def started(trained: Trained, monkeypatch, section: dict[str, Any]) -> Task:
    """The task that a stage with this section would train."""

    def train(task, *rest):
        raise Started(task)

    for module in (offline, online):
        monkeypatch.setattr(module, "train", train)
    data = experiments.data_config(trained.workdir.root.parent / "pairs.jsonl")
    stages = {**trained.sections, "later": section}
    common = {"seed": 0, "seeds": 1, "stages": tuple(stages), "runtime": experiments.RUNTIME}
    config = ConfigDict({**common, "data": dataclasses.asdict(data), **stages})
    with pytest.raises(Started) as caught:
        experiment.run(experiment.parse(config), trained.workdir, "later", Console(quiet=True))
    return caught.value.task


def assert_same(got, expected) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), got, expected)


def assert_untrained(adapter, layers: int) -> None:
    """An adapter before the first step: B is 0."""
    leaves = jax.tree_util.tree_leaves_with_path(adapter)
    zero = [not np.any(leaf) for path, leaf in leaves if "'B'" in jax.tree_util.keystr(path)]
    assert zero == [True] * layers


ADAPTER = dataclasses.asdict(LORA)


def test_whole_models_are_read_from_the_newest_checkpoint(tmp_path, monkeypatch):
    whole = write_chain(tmp_path, adapters=False)
    task = started(whole, monkeypatch, LATER["rloo"])
    assert_same(task.start().params["policy"], whole.sft.params)
    assert_same(task.frozen, {"reference": whole.sft.params, "reward": whole.reward.params})


@pytest.mark.parametrize("tuning", [{}, {"lora": ADAPTER}], ids=["whole", "adapter"])
@pytest.mark.parametrize("name", LATER)
def test_a_stage_starts_from_sft_which_is_its_reference_and_is_scored_by_the_reward_model(
    name, tuning, trained, monkeypatch
):
    task = started(trained, monkeypatch, {**LATER[name], "tuning": tuning})
    params, frozen = task.start().params, task.frozen
    assert_same(frozen["reference"], trained.sft.params)
    if tuning:
        assert_untrained(params["policy"], layers=3)
    else:
        assert_same(params["policy"], trained.sft.params)
    if "reward_model" in LATER[name]:
        assert_same(frozen["reward"], trained.reward.params)
    if name == "ppo" and tuning:
        assert_same(frozen["value_base"], trained.reward.params)
        assert_same(params["value"]["head"], trained.reward.params["head"])
        assert_untrained(params["value"]["body"], layers=3)
    elif name == "ppo":
        assert_same(params["value"], trained.reward.params)


@pytest.mark.parametrize("lora", [None, ADAPTER], ids=["whole", "adapter"])
@pytest.mark.parametrize("name", ["sft", "reward_model"])
def test_training_goes_on_from_the_stage_that_init_names(name, lora, trained, monkeypatch):
    task = started(trained, monkeypatch, {**trained.sections[name], "model": {"init": name, "lora": lora}})
    network, model = ("policy", trained.sft) if name == "sft" else ("reward", trained.reward)
    if lora is None:
        assert_same(task.start().params[network], model.params)
    else:
        assert_same(task.frozen["base"], model.params)


@pytest.mark.parametrize("lora", [None, ADAPTER], ids=["whole", "adapter"])
def test_a_reward_model_from_a_policy_has_its_body(lora, trained, monkeypatch):
    task = started(trained, monkeypatch, {**trained.sections["reward_model"], "model": {"init": "sft", "lora": lora}})
    body = {name: leaf for name, leaf in trained.sft.params.items() if name != "head"}
    assert_same((task.start().params["reward"] if lora is None else task.frozen["base"])["body"], body)
