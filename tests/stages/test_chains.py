"""Models and rows that a stage reads: those of the stages that its config names, and of one split.

Earlier stages are written as training leaves them, and a later one is stopped where it would train or sample.
"""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from rich.console import Console

from rlhf_jax import experiment
from rlhf_jax.loading import samples
from rlhf_jax.loading.models import Policy, RewardModel, merged
from rlhf_jax.loading.pretrained import load_checkpoint
from rlhf_jax.loading.stage_models import Base
from rlhf_jax.methods import offline, online
from rlhf_jax.models.lora import Adapted
from rlhf_jax.reports.run import Run
from rlhf_jax.runtime.checkpoints import Checkpoints, TrainState
from rlhf_jax.runtime.files import write_json, write_rows
from rlhf_jax.runtime.loop import Task
from rlhf_jax.runtime.workdir import Workdir
from rlhf_jax.stages import frontier
from rlhf_jax.types import PromptBatch, RlhfError
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


WORD = {"train": "good", "eval": "bad", "test": "dull"}
"""Word that every prompt of a split is."""


def write_pairs(path: Path, split: str) -> Path:
    """Pairs of chats whose prompts tell the split, and whose answers do not."""

    def say(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content}]

    answers = {side: say("assistant", text) for side, text in (("chosen", "the film is"), ("rejected", "film"))}
    row = json.dumps({"prompt": say("user", WORD[split]), **answers})
    path.write_text(f"{row}\n" * 24)
    return path


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
    for split in WORD:
        write_pairs(directory / f"{split}.jsonl", split)
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


class Sampled(Exception):
    """A stage is about to sample."""

    def __init__(self, prompts: PromptBatch) -> None:
        self.prompts = prompts


def stop_at_sampling(network, params, prompts, *rest, **options):
    raise Sampled(prompts)


def stop_at_training(task, *rest):
    raise Started(task)


def planned(trained: Trained, section: dict[str, Any], **common: Any) -> experiment.Experiment:
    """An experiment with one more stage after those of the chain."""
    stages = {**trained.sections, "later": section}
    places = {split: str(trained.workdir.root.parent / f"{split}.jsonl") for split in WORD}
    data = dataclasses.asdict(experiments.data_config("")) | places
    common = {"seed": 0, "seeds": 1, "runtime": experiments.RUNTIME, **common}
    return experiment.parse(ConfigDict({**common, "stages": tuple(stages), "data": data, **stages}))


def run(trained: Trained, section: dict[str, Any]) -> None:
    """Run one stage with this section after those of the chain."""
    experiment.run(planned(trained, section), trained.workdir, "later", Console(quiet=True))


def started(trained: Trained, monkeypatch, section: dict[str, Any]) -> Task:
    """The task that a stage with this section would train."""
    for module in (offline, online):
        monkeypatch.setattr(module, "train", stop_at_training)
    with pytest.raises(Started) as caught:
        run(trained, section)
    return caught.value.task


def assert_of_split(tokens, split: str, tokenizer) -> None:
    """Every row has the word of this split, and none that of another."""
    for other, word in WORD.items():
        (number,) = tokenizer.encode(word)
        assert np.any(np.asarray(tokens) == number, axis=-1).tolist() == [other == split] * len(tokens), other


def assert_same(got, expected) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), got, expected)


def assert_untrained(adapter, layers: int) -> None:
    """An adapter before the first step: B is 0."""
    leaves = jax.tree_util.tree_leaves_with_path(adapter)
    zero = [not np.any(leaf) for path, leaf in leaves if "'B'" in jax.tree_util.keystr(path)]
    assert zero == [True] * layers


ADAPTER = dataclasses.asdict(LORA)


@pytest.mark.nightly
def test_whole_models_are_read_from_the_newest_checkpoint(tmp_path, monkeypatch):
    whole = write_chain(tmp_path, adapters=False)
    task = started(whole, monkeypatch, LATER["rloo"])
    assert_same(task.start().params["policy"], whole.sft.params)
    assert_same(task.frozen, {"reference": whole.sft.params, "reward": whole.reward.params})
    earlier = Run(whole.workdir.root).load_policy("sft", step=0)
    assert_same(moved(earlier.params), whole.sft.params)


@pytest.mark.nightly_rest
@pytest.mark.parametrize("tuning", [{}, {"lora": ADAPTER}], ids=["whole", "adapter"])
@pytest.mark.parametrize("name", LATER)
def test_a_stage_starts_from_sft_which_is_its_reference_and_is_scored_by_the_reward_model(
    name, tuning, trained, monkeypatch
):
    task = started(trained, monkeypatch, {**LATER[name], "tuning": tuning})
    params, frozen, batch = task.start().params, task.frozen, task.batch_at(0)
    tokens = {"dpo": "chosen", "kto": "sequences"}
    rows = getattr(batch, tokens[name]) if name in tokens else batch.prompts
    assert_of_split(rows.tokens, "train", trained.sft.tokenizer)
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


HOT = {"temperature": 1.0}
SAMPLING = {"policy": "sft", "reward_model": "reward_model", "prompts": 4}
SPLITS = {
    "best_of_n": ("test", {"judge": None, "pool": 2, **SAMPLING, **HOT}),
    "frontier": (
        "test",
        {
            "reference": "sft",
            "policies": ("sft",),
            "judge": "reward_model",
            "prompts": 4,
            "kl_targets": (1.0,),
            **HOT,
        },
    ),
    "pool": (
        "test",
        {"policy": "sft", "reward_models": ("reward_model",), "judge": None, "prompts": 4, "samples": 2} | HOT,
    ),
    "preferences": (
        "train",
        {"judge": None, "eval_prompts": 1, "samples_per_prompt": 2, "label_beta": None, **SAMPLING},
    ),
    "rejection_sampling": (
        "train",
        {"eval_prompts": 1, "samples_per_prompt": 2, "keep": {"best": 1}, **SAMPLING, **HOT},
    ),
}


@pytest.mark.parametrize("kind", SPLITS)
def test_prompts_are_those_of_one_split(kind, trained, monkeypatch):
    split, section = SPLITS[kind]
    for module in (samples, frontier):
        monkeypatch.setattr(module, "sample_all", stop_at_sampling)
    with pytest.raises(Sampled) as caught:
        run(trained, {"kind": kind, **section})
    assert_of_split(caught.value.prompts.tokens, split, trained.sft.tokenizer)


def test_a_stage_is_another_once_a_stage_that_it_reads_is(trained, tmp_path):
    """In its own directory it is refused, and it is not taken from another one."""
    shutil.copytree(trained.workdir.root, tmp_path / "run")
    here = Workdir(tmp_path / "run")
    identity = planned(trained, LATER["dpo"]).identity("later", here.fingerprint)
    write_rows(here.begin("later", identity) / "metrics.jsonl", [{"step": 1}])
    here.complete("later", identity)
    elsewhere = Workdir(tmp_path / "new", inputs=here.root)
    assert (here.status("later", identity), elsewhere.status("later", identity)) == ("complete", "elsewhere")
    for name, read in (("reward_model", False), ("sft", True)):
        write_json(here.root / name / "complete.json", {"fingerprint": "another"})
        changed = planned(trained, LATER["dpo"]).identity("later", here.fingerprint)
        assert (changed.fingerprint != identity.fingerprint) == read
    assert elsewhere.status("later", changed) == "new"
    with pytest.raises(RlhfError, match="sft: 'sft' there, 'another' now"):
        here.status("later", changed)


def test_a_stage_is_another_with_another_seed_or_number_of_seeds(trained):
    common = ({}, {"seed": 1}, {"seeds": 2})
    found = {
        planned(trained, LATER["dpo"], **changes).identity("later", trained.workdir.fingerprint).fingerprint
        for changes in common
    }
    assert len(found) == len(common)
