"""Planned programs have the arguments of the programs that stages run: the same arrays, states and frozen networks."""

import dataclasses

import jax
import pytest
from ml_collections import ConfigDict

from rlhf_jax import experiment
from rlhf_jax.planning.outlines import Outlines
from rlhf_jax.planning.stage_outlines import RunOutline
from rlhf_jax.planning.stage_programs import outline
from rlhf_jax.runtime.programs import MeshPlacement, make_placement
from tests.support import experiments


class Captured(Exception):
    """Inputs of the training loop, in the place of training."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    directory = tmp_path_factory.mktemp("planned")
    policy, reward = experiments.models(directory)
    return policy, reward, experiments.preference_rows(directory / "pairs.jsonl")


LORA = {"rank": 2, "alpha": 2.0, "targets": ("attention/[qv]",), "dropout": 0.0}
TRAINING = {"optimizer": experiments.OPTIMIZER, "loop": experiments.LOOP}
OFFLINE = {**TRAINING, "batch_size": 8, "epochs": 1.0, "eval_every": 100, "pack": False}
ONLINE = {
    **TRAINING,
    "batch_size": 8,
    "minibatches": 2,
    "epochs": 1,
    "iterations": 4,
    "temperature": 1.0,
    "samples_every": 1,
    "samples_written": 1,
}
PPO = {
    **ONLINE,
    "kind": "ppo",
    "kl_coef": 0.1,
    "gamma": 1.0,
    "gae_lambda": 0.95,
    "clip_ratio": 0.2,
    "value_clip": 0.2,
    "vf_coef": 0.1,
}
GRPO = {**ONLINE, "kind": "group_rl", "method": "grpo", "num_generations": 4}


def sections(policy: str, reward: str) -> dict[str, dict]:
    of_policy = {"policy": policy, "reward_model": reward}
    dpo = experiments.dpo_section(policy, pack=False)
    return {
        "sft": {"kind": "sft", "tokenizer": None, "model": {"init": policy}, "sample_prompts": 0, **OFFLINE},
        "sft of an adapter": {
            **{"kind": "sft", "tokenizer": None, "model": {"init": policy, "lora": LORA}, "sample_prompts": 0},
            **OFFLINE,
        },
        "reward_model": {
            **{"kind": "reward_model", "policy": None, "preferences": None, "model": {"init": policy}},
            **{"pooling": "last", **OFFLINE},
        },
        "dpo": dpo,
        "dpo with a cached reference": {**dpo, "cached_reference": True},
        "dpo with a moving reference": {**dpo, "reference_update": {"alpha": 0.5, "every": 2}},
        "dpo of an adapter": {**dpo, "tuning": {"lora": LORA}},
        "dpo of a quantised base": {**dpo, "tuning": {"lora": {**LORA, "base_dtype": "int8"}}},
        "kto": {"kind": "kto", "policy": policy, "preferences": None, "beta": 0.1, "sample_prompts": 0, **OFFLINE},
        "ppo": {**PPO, **of_policy},
        "ppo of an adapter": {**PPO, **of_policy, "tuning": {"lora": LORA}},
        "ppo of a quantised base": {
            **{**PPO, **of_policy, "value_trunk": "policy"},
            "tuning": {"lora": {**LORA, "base_dtype": "int4"}},
        },
        "ppo with a shared trunk": {**PPO, **of_policy, "value_trunk": "shared"},
        "grpo": {**GRPO, **of_policy},
        "grpo without a divergence": {**GRPO, **of_policy, "kl_coef": 0.0, "measure_kl": False},
        "dapo": {**GRPO, **of_policy, "method": "dapo", "dynamic_sampling_rounds": 2},
        "online_dpo": {**ONLINE, **of_policy, "kind": "online_dpo", "beta": 0.1},
    }


NAMES = tuple(sections("", ""))


def structure(tree):
    """Shapes and dtypes of parameters and states, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): (x.shape, x.dtype) for path, x in leaves}


def ranks(tree):
    """Dtypes and numbers of axes of a batch, whose lengths depend on the data."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): (x.ndim, x.dtype) for path, x in leaves}


QUICK = ("reward_model", "dpo", "ppo")
CASES = [pytest.param(name, 1, marks=() if name in QUICK else pytest.mark.nightly) for name in NAMES]
CASES += [pytest.param(name, 2, marks=pytest.mark.nightly) for name in ("dpo", "ppo")]


@pytest.mark.parametrize(("name", "seeds"), CASES)
def test_arguments_are_those_of_the_stage(name, seeds, sources, tmp_path, monkeypatch):
    policy, reward, data = sources
    section = sections(policy, reward)[name]

    def capture(task, *rest):
        raise Captured(task)

    for module in ("offline", "online"):
        monkeypatch.setattr(f"rlhf_jax.methods.{module}.train", capture)
    with pytest.raises(Captured) as caught:
        experiments.run(tmp_path / "run", data, {"stage": section}, seeds=seeds)
    (task,) = caught.value.args

    found = planned(section, data, seeds)
    state, frozen, batch, _ = found.programs[0].args
    assert structure(state) == structure(task.start())
    assert structure(frozen) == structure(task.frozen)
    assert ranks(batch) == ranks(jax.tree.map(lambda x: x[None], task.batch_at(0)))
    online = section["kind"] in ("ppo", "group_rl", "online_dpo")
    assert [program.name for program in found.programs] == ["iteration" if online else "update"]


def planned(section, data, seeds=1, *, earlier=None, **lengths):
    earlier = earlier or {}
    config = {
        "seed": 0,
        "seeds": seeds,
        **earlier,
        "stages": (*earlier, "stage"),
        "data": dataclasses.asdict(experiments.data_config(data)) | lengths,
        "runtime": experiments.RUNTIME,
        "stage": section,
    }
    checked = experiment.parse(ConfigDict(config))
    placement = make_placement(checked.runtime, seeds)
    assert isinstance(placement, MeshPlacement)
    run = RunOutline(Outlines(checked.stages), checked.stages, checked.data, checked.runtime, placement)
    found = outline(run, "stage")
    assert found is not None
    return found


def test_the_second_program_of_an_iteration_reads_what_the_first_has_sampled(sources):
    """Traced with the shapes of the samples, which a wrong structure would not survive."""
    policy, reward, data = sources
    for section in (sections(policy, reward)["ppo"], sections(policy, reward)["grpo"]):
        sample, learn = planned(section, data, max_response_tokens=40).programs
        state, metrics, samples = jax.eval_shape(learn.function, *learn.args)
        assert structure(state) == structure(sample.args[0])
        assert {"loss", "objective/kl"} <= metrics.keys()
        assert samples.scores.shape == (1, section["batch_size"])


@pytest.mark.parametrize("judged", [False, True])
def test_a_reward_on_the_host_gives_scores_to_the_second_program(judged, sources, tmp_path):
    policy, _, data = sources
    code = tmp_path / "reward.py"
    code.write_text("def length(prompts, completions, **columns):\n    return [1.0 for _ in completions]\n")
    gold = {"gold": {"kind": "gold", "model": {"alpha": 1.0, "min_df": 1}, "rating": "rating"}}
    section = {**PPO, "policy": policy, "reward_model": "gold" if judged else {"functions": (f"{code}:length",)}}
    _, learn = planned(section, data, earlier=gold if judged else None).programs
    (_, scores), _ = learn.args[2]
    assert scores.shape == (1, section["batch_size"])
    assert jax.eval_shape(learn.function, *learn.args)[2].scores.shape == (1, section["batch_size"])
