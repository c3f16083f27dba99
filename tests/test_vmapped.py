"""Points of a sweep that differ in numbers only train in one program, and each is the run that it would be alone."""

import dataclasses
import io
import json
import shutil

import pytest
from ml_collections import ConfigDict
from rich.console import Console

from rlhf_jax import experiment, vmapped
from rlhf_jax.config import override
from rlhf_jax.runtime.checkpoints import steps_of
from rlhf_jax.runtime.workdir import Workdir
from rlhf_jax.stages.kinds import KINDS
from tests.support import experiments

TOLERANCE = {"rel": 1e-4, "abs": 1e-5}
"""Points in one program and alone differ by rounding."""

ONLINE = {
    "iterations": 6,
    "batch_size": 16,
    "minibatches": 2,
    "epochs": 2,
    "temperature": 1.0,
    "missing_eos_penalty": 1.0,
    "optimizer": experiments.OPTIMIZER,
    "samples_every": 3,
    "samples_written": 2,
    "loop": {"steps_per_call": 3, "checkpoint_every": 3},
}


class Sweep:
    """Experiments of one stage on pairs in a few words, one for each dict of fields."""

    def __init__(self, directory, section, *points, **common):
        """Write the models and the data."""
        self.name, self.console = section["kind"], io.StringIO()
        data = experiments.preference_rows(directory / "pairs.jsonl")
        self.parsed, self.places = [], []
        for number, fields in enumerate(points):
            config = ConfigDict(
                {
                    "seed": 3,
                    "seeds": 1,
                    "stages": (self.name,),
                    "data": vars(experiments.data_config(data)),
                    "runtime": experiments.RUNTIME,
                    self.name: section,
                    **common,
                }
            )
            for field, value in fields.items():
                override(config, f"{self.name}.{field}", value)
            self.parsed.append(experiment.parse(config))
            self.places.append(Workdir(directory / f"point {number}"))

    @property
    def points(self):
        return [*zip(self.parsed, self.places, strict=True)]

    def train(self):
        """Train all points together; return what was printed."""
        vmapped.train_points(self.points, self.name, Console(file=self.console, width=200))
        return self.console.getvalue()

    def complete(self):
        """Run every point on, as the sweep does."""
        for parsed, place in self.points:
            experiment.run(parsed, place, None, Console(file=self.console, width=200))

    def alone(self, number, place):
        """Run one point by itself."""
        experiment.run(self.parsed[number], place, None, Console(file=self.console, width=200))

    def stage(self, number):
        return self.places[number].directory(self.name)


EQUAL_PAIRS = {"dpo": 1 / 8, "online_dpo": 1.0}
"""Largest share of a batch whose pairs have equal responses, which win or lose by rounding: of DPO's 24 pairs, one."""


def assert_same_run(stage, alone):
    """The same metrics, samples and summary, up to rounding and time."""
    rows, others = (experiments.without_clock(place / "metrics.jsonl") for place in (stage, alone))
    assert len(rows) == len(others) > 0
    for row, other in zip(rows, others, strict=True):
        if stage.name in EQUAL_PAIRS:
            assert row["rewards/accuracies"] == pytest.approx(other["rewards/accuracies"], abs=EQUAL_PAIRS[stage.name])
            other["rewards/accuracies"] = row["rewards/accuracies"]
        assert row == pytest.approx(other, **TOLERANCE)
    samples, others = (experiments.rows(place / "samples.jsonl") for place in (stage, alone))
    assert [sample["completion"] for sample in samples] == [sample["completion"] for sample in others]
    summaries = [json.loads((place / "summary.json").read_text()) for place in (stage, alone)]
    assert summaries[0]["provenance"]["config"] == summaries[1]["provenance"]["config"]
    assert steps_of(stage / "checkpoints") == steps_of(alone / "checkpoints")


@pytest.mark.nightly
def test_points_of_dpo_are_the_runs_that_they_would_be_alone_also_when_interrupted(tmp_path):
    model, _ = experiments.models(tmp_path)
    section = experiments.dpo_section(model, loop=experiments.LOOP | {"checkpoint_every": 4})
    sweep = Sweep(tmp_path, section, {"beta": 0.1}, {"beta": 0.8, "optimizer.learning_rate": 1e-3})
    printed = sweep.train()
    assert "dpo: 2 points, which differ in beta, optimizer.learning_rate, train in one program" in printed
    assert not (sweep.stage(1) / "summary.json").exists()

    shutil.copytree(sweep.stage(1), tmp_path / "whole")
    *_, last = steps_of(sweep.stage(1) / "checkpoints")
    shutil.rmtree(sweep.stage(1) / "checkpoints" / str(last))  # as if the process had died while it saved
    sweep.train()
    assert experiments.without_clock(sweep.stage(1) / "metrics.jsonl") == experiments.without_clock(
        tmp_path / "whole" / "metrics.jsonl"
    )
    experiments.assert_same_bits(experiments.final_state(sweep.stage(1)), experiments.final_state(tmp_path / "whole"))

    sweep.complete()
    sweep.alone(1, Workdir(tmp_path / "alone"))
    assert_same_run(sweep.stage(1), tmp_path / "alone" / "dpo")
    losses = [experiments.rows(sweep.stage(number) / "metrics.jsonl")[-1]["loss"] for number in (0, 1)]
    assert losses[0] != pytest.approx(losses[1], rel=0.01)
    assert vmapped.groups(sweep.points, "dpo") == [], "nothing is left to do"


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("kind", "section", "points"),
    [
        ("kto", {"preferences": None, "beta": 0.1, "sample_prompts": 1}, [{"beta": 0.5}, {"beta": 0.1}]),
        (
            "ppo",
            {"gamma": 1.0, "gae_lambda": 0.95, "clip_ratio": 0.2, "value_clip": 0.2, "vf_coef": 0.1, "kl_coef": 0.1},
            [{"kl_coef": 0.5}, {"optimizer.learning_rate": 1e-3}],
        ),
        ("group_rl", {"method": "grpo", "num_generations": 4}, [{"kl_coef": 0.04}, {"kl_coef": 1.0}]),
        ("online_dpo", {"beta": 0.1}, [{"beta": 0.5}, {"optimizer.max_grad_norm": 0.1}]),
    ],
)
def test_points_and_seeds_of_every_kind_are_the_runs_that_they_would_be_alone(kind, section, points, tmp_path):
    model, judge = experiments.models(tmp_path)
    if kind == "kto":
        section = experiments.dpo_section(model, **section)
    else:
        section = {"policy": model, "reward_model": judge, **ONLINE, **section}
    sweep = Sweep(tmp_path, section | {"kind": kind}, *points, seeds=2)
    assert "2 points, which differ in" in sweep.train()
    sweep.complete()
    for number in range(2):
        place = Workdir(tmp_path / f"alone {number}")
        sweep.alone(number, place)
        assert_same_run(sweep.stage(number), place.directory(kind))
    rows = [experiments.rows(sweep.stage(number) / "metrics.jsonl")[-1] for number in (0, 1)]
    assert rows[0]["loss"] != rows[1]["loss"]


@pytest.mark.parametrize(
    ("points", "said"),
    [
        (
            [{"beta": 0.1}, {"beta": 0.2, "loss.losses": ("ipo",)}],
            "dpo: 2 points train alone: no other has the same inputs and differs only in beta, optimizer.learning_rate",
        ),
        (
            [{"loop.best": {"metric": "loss", "goal": "min", "patience": 4}, "beta": beta} for beta in (0.1, 0.2)],
            "dpo: 2 points train one after the other, because loop.best.patience may stop them at different steps",
        ),
    ],
)
def test_points_that_cannot_train_together_are_named_with_the_reason(points, said, tmp_path, monkeypatch):
    monkeypatch.setattr(vmapped, "train", lambda *_: pytest.fail("these points are different programs"))
    sweep = Sweep(tmp_path, experiments.dpo_section(str(tmp_path)), *points)
    monkeypatch.setattr(experiment, "checkpoint_hash", lambda source: "hash")
    assert said in sweep.train()


@pytest.mark.parametrize(
    ("numbers", "reads", "said"),
    [
        ((), None, "because this kind of stage trains one run at a time"),
        (("beta",), "sft", "because it reads sft, which they do not share"),
    ],
)
def test_equal_stages_of_other_kinds_and_of_different_inputs_train_alone(numbers, reads, said, tmp_path, monkeypatch):
    monkeypatch.setattr(vmapped, "train", lambda *_: pytest.fail("these points train alone"))
    monkeypatch.setattr(vmapped, "find_kind", lambda kind, name: dataclasses.replace(KINDS["dpo"], numbers=numbers))
    sweep = Sweep(tmp_path, experiments.dpo_section(str(tmp_path)), {"beta": 0.1}, {"beta": 0.1})
    monkeypatch.setattr(vmapped.configs, "input_stages", lambda stage, known: [reads] if reads else [])
    assert f"dpo: points train one after the other, {said}" in sweep.train()


def test_a_zero_is_another_program(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "checkpoint_hash", lambda source: "hash")
    section = {"kind": "group_rl", "method": "grpo", "num_generations": 4}
    section |= {"policy": str(tmp_path), "reward_model": str(tmp_path), **ONLINE}
    sweep = Sweep(tmp_path, section, *({"kl_coef": coefficient} for coefficient in (0.0, 0.1, 0.2, None)))
    sizes = [len(members) for members in vmapped.groups(sweep.points, "group_rl")]
    assert sizes == [1, 2, 1], "without a penalty, the program does not compute it; None is the preset"
