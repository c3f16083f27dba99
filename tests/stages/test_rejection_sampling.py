"""Selection among many samples, SFT on the selection, and rounds of both: expert iteration."""

import dataclasses
import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict, config_dict
from rich.console import Console

from rlhf_jax import config as configs
from rlhf_jax import experiment
from rlhf_jax.data import pipeline
from rlhf_jax.data.padding import pad_left, pad_right
from rlhf_jax.loading import tables
from rlhf_jax.loading.context import Context
from rlhf_jax.loading.models import RewardModel
from rlhf_jax.reports.run import Run
from rlhf_jax.runtime.files import read_json, read_rows, write_json, write_rows
from rlhf_jax.runtime.progress import Display
from rlhf_jax.runtime.workdir import Workdir
from rlhf_jax.sampling.batches import score_all
from rlhf_jax.stages import rejection_sampling as stage
from rlhf_jax.stages.rejection_sampling import KEEP, KeepAbove, KeepBest, KeepShare, KeepSoft
from rlhf_jax.types import RlhfError, Rollout
from tests.support.commands import reads, succeeds

ROOT = Path(__file__).parents[2]
SCORES = np.array([[1.0, 4.0, 4.0, -2.0], [0.5, 0.0, -3.0, -1.0], [5.0, 3.0, 6.0, 7.0]])


def kept(keep: Any, seed: int = 0) -> np.ndarray:
    return KEEP[type(keep)](keep, SCORES, np.random.default_rng(seed))


def test_the_best_of_each_prompt_are_kept_the_earlier_of_equals_first():
    assert [np.flatnonzero(row).tolist() for row in kept(KeepBest(1))] == [[1], [0], [3]]
    assert [np.flatnonzero(row).tolist() for row in kept(KeepBest(2))] == [[1, 2], [0, 1], [2, 3]]
    assert kept(KeepBest(4)).all()


def test_what_is_above_a_threshold_is_kept_whatever_its_prompt():
    assert [np.flatnonzero(row).tolist() for row in kept(KeepAbove(4.0))] == [[], [], [0, 2, 3]]


@pytest.mark.parametrize(("share", "count"), [(0.01, 1), (0.25, 3), (0.5, 6), (1.0, 12)])
def test_the_best_share_of_all_is_kept(share, count):
    found = kept(KeepShare(share))
    assert found.sum() == count
    assert SCORES[found].min() >= SCORES[~found].max(initial=-np.inf)


def test_soft_choices_are_one_a_prompt_and_the_better_the_more_often():
    found = np.mean([kept(KeepSoft(2.0), seed) for seed in range(3000)], axis=0)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    weights = np.exp(SCORES / 2.0)
    np.testing.assert_allclose(found, weights / weights.sum(axis=1, keepdims=True), atol=0.03)


def build(**changes: Any) -> stage.RejectionSamplingConfig:
    return configs.build(stage.RejectionSamplingConfig, section(**changes), "config.best")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keep": {"best": 0}}, "best = 0 must be at least 1"),
        ({"keep": {"best": 9}}, "keep.best = 9 is more than samples_per_prompt = 8"),
        ({"keep": {"share": 0.0}}, "share = 0.0 must be above 0"),
        ({"keep": {"soft_temperature": 0.0}}, "soft_temperature = 0.0 must be above 0"),
        ({"keep": {"best": 1, "threshold": 0.0}}, "threshold is not a field of KeepBest. Known fields: best."),
        ({"eval_prompts": 32}, "eval_prompts = 32 must be below prompts = 32"),
        ({"temperature": 0.0}, "temperature = 0.0 must be above 0"),
        ({"samples_per_prompt": 0}, "samples_per_prompt = 0 must be at least 1"),
    ],
)
def test_what_cannot_be_kept_is_refused(changes, words):
    with pytest.raises(RlhfError, match=words):
        build(**changes)


@pytest.mark.parametrize(
    ("keep", "kind"),
    [
        ({"best": 2}, KeepBest),
        ({"threshold": 0.5}, KeepAbove),
        ({"share": 0.5}, KeepShare),
        ({"soft_temperature": 0.5}, KeepSoft),
    ],
    ids=["best", "threshold", "share", "soft"],
)
def test_the_key_says_which_way_of_keeping_is_meant(keep, kind):
    assert build(keep=keep).keep == kind(*keep.values())


def section(**changes: Any) -> dict[str, Any]:
    fields = {
        "kind": "rejection_sampling",
        "policy": "sft",
        "reward_model": "reward_model",
        "prompts": 32,
        "eval_prompts": 4,
        "samples_per_prompt": 8,
        "temperature": 1.0,
        "keep": {"best": 1},
    }
    return fields | changes


def chain(directory: Path) -> experiment.Experiment:
    """Two rounds of expert iteration, and Best-of-N of the policy that they start from."""
    config = runpy.run_path(f"{ROOT}/experiments/preferences.py")["get_config"]("smoke")
    config.unlock()
    rng = np.random.default_rng(0)
    words = ["the", "film", "is", "good", "bad", "dull", "bright", "and"]
    for split, rows in (("train", 64), ("eval", 16)):
        config.data[split] = str(directory / f"{split}.jsonl")
        pairs = []
        for _ in range(rows):
            start, *answers = (" ".join(rng.choice(words, 4)) for _ in range(3))
            worse, better = sorted(answers, key=lambda text: text.count("good") - text.count("bad"))
            pairs.append({"prompt": start, "chosen": f" {better}", "rejected": f" {worse}"})
        write_rows(directory / f"{split}.jsonl", pairs)
    config.sft.tokenizer = ConfigDict({"kind": "word", "vocab_size": 64})
    config.sft.optimizer.update({"learning_rate": 1e-2, "warmup_steps": 2})
    config.sft.epochs, config.sft.sample_prompts, config.sft.loop.steps_per_call = 16.0, 0, 8
    config.reward_model.epochs, config.reward_model.policy = 8.0, "sft"
    config.reward_model.model = config.sft.model.copy_and_resolve_references()
    config.reward_model.optimizer.learning_rate = 3e-3
    names = ["sft", "reward_model"]
    for number in (1, 2):
        policy = "sft" if number == 1 else f"trained_{number - 1}"
        config[f"best_{number}"] = ConfigDict(section(policy=policy))
        config[f"trained_{number}"] = config.sft.copy_and_resolve_references()
        trained = config[f"trained_{number}"]
        trained.tokenizer, trained.model = None, ConfigDict({"init": policy})
        trained.demonstrations = f"best_{number}"
        names += [f"best_{number}", f"trained_{number}"]
    config.best_3 = ConfigDict(section(policy="trained_2", keep={"threshold": -100.0}))
    curve = {"kind": "best_of_n", "policy": "sft", "reward_model": "reward_model", "temperature": 1.0}
    config.best_of_n = ConfigDict(curve | {"judge": config_dict.placeholder(str), "prompts": 16, "pool": 8})
    config.best_of_n.soft = (0.1, 10.0)
    config.stages = (*names, "best_3", "best_of_n")
    return experiment.parse(config)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, experiment.Experiment]:
    directory = tmp_path_factory.mktemp("chain")
    planned = chain(directory)
    assert experiment.run(planned, Workdir(directory / "run"), None, Console(quiet=True))
    return directory / "run", planned


@pytest.mark.nightly
def test_the_score_rises_from_round_to_round(finished):
    summaries = [read_json(finished[0] / f"best_{number}" / "summary.json") for number in (1, 2, 3)]
    first, second, third = (summary["score"] for summary in summaries)
    assert first + 0.25 * summaries[0]["score_std"] < min(second, third)  # three standard errors of 256 samples
    assert all(summary["kept_score"] > summary["score"] for summary in summaries[:2])
    assert [summary["kept_share"] for summary in summaries] == [1 / 8, 1 / 8, 1.0]
    assert [summary["train_rows"] for summary in summaries] == [28, 28, 28 * 8]


def score_texts(judge: RewardModel, data: pipeline.DataConfig, prompts: list, completions: list) -> np.ndarray:
    examples = pipeline.tokenise(prompts, completions, judge.tokenizer, data)
    rollout = Rollout(
        *pad_left([example.prompt for example in examples], data.max_prompt_tokens),
        *pad_right([example.response for example in examples], data.max_response_tokens),
    )
    return score_all(judge.network, judge.params, rollout, 16)


@pytest.mark.nightly
def test_demonstrations_are_prompts_of_the_data_with_scores_of_the_reward_model(finished):
    workdir, planned = finished
    train, held_out = (read_rows(workdir / "best_1" / name) for name in tables.DEMONSTRATIONS)
    rows = train + held_out
    asked = {row["prompt"] for row in read_rows(Path(planned.data.train))}
    assert {row["prompt"] for row in rows} <= asked
    judge = Run(workdir).load_reward_model("reward_model")
    scores = score_texts(judge, planned.data, [row["prompt"] for row in rows], [row["completion"] for row in rows])
    np.testing.assert_allclose(scores, [row["score"] for row in rows], atol=1e-4)


@pytest.mark.nightly
def test_sft_trains_on_them_from_the_policy_that_it_names(finished):
    workdir, _ = finished
    summary = read_json(workdir / "trained_1" / "summary.json")
    assert summary["rows"] == 28
    config = read_json(workdir / "trained_1" / "config.json")
    assert set(config["inputs"]) == {"sft", "best_1"}


@pytest.mark.nightly
def test_the_curve_has_intervals_bounds_and_a_soft_neighbour(finished):
    rows = read_rows(finished[0] / "best_of_n" / "curve.jsonl")
    assert [row["n"] for row in rows] == [1, 2, 4, 8]
    for row in rows:
        assert row["proxy_low"] < row["proxy"] < row["proxy_high"]
        assert 0 <= row["kl_estimate"] <= row["kl"] + 1e-9
        assert row["win_rate_bound"] == row["n"] / (row["n"] + 1)
        assert row["gold"] is row["gold_low"] is None
        assert row["win_rate"] is None if row["n"] == 8 else row["win_rate"] <= row["win_rate_bound"] + 1e-9
    assert rows[0]["win_rate"] == pytest.approx(0.5)
    soft = read_rows(finished[0] / "best_of_n" / "soft.jsonl")
    assert [(row["temperature"], row["n"]) for row in soft] == [(t, n) for t in (0.1, 10.0) for n in (1, 2, 4, 8)]
    for hard, cold, hot in zip(rows[1:], soft[1:4], soft[5:], strict=True):
        assert hot["kl"] < cold["kl"] <= hard["kl"]
        assert rows[0]["proxy"] - 1e-6 < hot["proxy"] < cold["proxy"]
    assert "kl_estimate" in Run(finished[0]).best_of_n_curve("best_of_n")
    shown = read_rows(finished[0] / "best_of_n" / "samples.jsonl")
    scores = np.array([[row["score"] for row in shown if row["step"] == n] for n in (1, 2, 4, 8)])
    assert np.all(np.diff(scores, axis=0) >= 0) and np.any(scores[-1] > scores[0])


def context_of(directory: Path, planned: experiment.Experiment) -> Context:
    with Display(Console(quiet=True)).bar("sft") as bar:
        return Context(Workdir(directory), tuple(planned.stages), "sft", 0, 1, planned.data, planned.runtime, bar)


@pytest.mark.nightly
def test_preferences_are_demonstrations_of_what_was_chosen(finished, tmp_path):
    workdir, planned = finished
    context = context_of(tmp_path, planned)
    (tmp_path / "preferences").mkdir()
    pairs = [{"prompt": "the film", "chosen": " is good.", "rejected": " is bad."}]
    for name in ("preferences.jsonl", "preferences_eval.jsonl"):
        write_rows(tmp_path / "preferences" / name, pairs)
    write_json(tmp_path / "preferences" / "complete.json", {"fingerprint": "x"})
    train, held_out = tables.load_demonstrations(context, "preferences")
    assert train == held_out == pairs
    assert pipeline.training_texts(train) == ["the film is good."]
    splits = tuple(pipeline.load_rows(planned.data, split) for split in ("train", "eval"))
    assert splits[0] != splits[1]
    assert tables.load_demonstrations(context, None) == tables.load_preferences(context, None) == splits
    here = dataclasses.replace(context, workdir=Workdir(workdir))
    with pytest.raises(RlhfError, match="'sft', a stage that wrote no demonstrations or preferences"):
        tables.load_demonstrations(here, "sft")


@pytest.mark.nightly
def test_a_threshold_that_nothing_passes(finished, tmp_path):
    workdir, planned = finished
    strict = build(policy="sft", keep={"threshold": 1e6})
    (tmp_path / "sft").mkdir()
    context = dataclasses.replace(context_of(tmp_path, planned), workdir=Workdir(tmp_path, workdir))
    with pytest.raises(RlhfError, match=r"keep leaves 0 responses for training and 0 held out, with scores from"):
        stage.run(strict, context)
    assert not (tmp_path / "sft" / tables.DEMONSTRATIONS.train).exists()


def test_demonstrations_of_chats_are_chats():
    chat = [{"role": "user", "content": "is it good?"}]
    answer = [{"role": "assistant", "content": "yes"}]
    assert stage.demonstration(chat, "yes") == {"prompt": chat, "completion": answer}
    assert stage.original_prompt([{"messages": chat + answer}], 0, "") == chat
    assert stage.original_prompt([{"prompt": chat}], 0, "") == chat
    assert stage.original_prompt([{"text": "the film is good"}], 0, "the film") == "the film"
    json.dumps(stage.demonstration("the film", " is good"))


@pytest.mark.nightly
def test_the_verb_reads_models_of_stages(finished, tmp_path, capsys, monkeypatch):
    """Scored as the stages score: by a reward model that reads the policy's tokens."""
    workdir, planned = finished
    flags = [f"--workdir={workdir}", "--stage=sft", "--reward-stage=reward_model", "--n=4", "--max-new-tokens=11"]
    path = tmp_path / "best.jsonl"
    for _ in range(2):  # there is nothing left to do
        reads(monkeypatch, '{"prompt": "the film is good"}\n{"prompt": "bad and dull the"}\n')
        assert succeeds(capsys, "best-of-n", *flags, f"--out={path}") == ""
    found = read_rows(path)
    judge = Run(workdir).load_reward_model("reward_model")
    assert len(found) == 2
    for row in found:
        scores = score_texts(judge, planned.data, [row["prompt"]] * 4, row["completions"])
        np.testing.assert_allclose(row["scores"], scores, atol=1e-4)
        assert row["score"] == max(row["scores"]) > min(row["scores"])
