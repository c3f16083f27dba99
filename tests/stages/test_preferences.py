"""Preferences by a reward model or a judge, with and without noise, and the chain of stages that is iterative DPO."""

import dataclasses
import json

import numpy as np
import pytest

from rlhf_jax.config import ModelSource
from rlhf_jax.loading import tables
from rlhf_jax.rewards.http_judge import HTTPJudgeConfig
from rlhf_jax.stages import preferences
from tests.support import experiments
from tests.support.judge_server import likes_longer, serving, shown

CONFIG = preferences.PreferencesConfig(
    kind="preferences",
    policy=ModelSource("sft"),
    judge=None,
    prompts=4,
    eval_prompts=1,
    samples_per_prompt=3,
    label_beta=None,
    reward_model=ModelSource("reward_model"),
)

HTTP = {"judge": HTTPJudgeConfig(url="http://localhost/v1", model="tiny"), "reward_model": None}


def section(policy, reward_model, **changes):
    return {
        "kind": "preferences",
        "policy": policy,
        "judge": None,
        "reward_model": reward_model,
        "prompts": 48,
        "eval_prompts": 8,
        "samples_per_prompt": 4,
        "label_beta": None,
        "pairs": "best_worst",
        **changes,
    }


def dpo(policy, source):
    return {
        "kind": "dpo",
        "policy": policy,
        "preferences": source,
        "beta": 0.03,
        "optimizer": experiments.OPTIMIZER | {"learning_rate": 1e-3},
        "batch_size": 16,
        "epochs": 16.0,
        "sample_prompts": 0,
        "eval_every": 100,
        "loop": experiments.LOOP,
    }


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Iterative DPO: twice, pairs of the policy's own samples by the reward model, and DPO from that policy."""
    directory = tmp_path_factory.mktemp("iterative")
    model, judge = experiments.models(directory)
    stages = {
        "preferences": section(model, judge),
        "dpo": dpo(model, "preferences"),
        "preferences_2": section("dpo", judge),
        "dpo_2": dpo("dpo", "preferences_2"),
        "preferences_3": section("dpo_2", judge, pairs="all", margin=2.0),
    }
    return experiments.run(directory / "run", experiments.questions(directory / "questions.jsonl", 64), stages)


def summary(workdir, stage):
    return json.loads((workdir.find(stage) / "summary.json").read_text())


@pytest.mark.nightly
def test_each_turn_starts_from_the_last_and_pleases_the_reward_model_more(chain):
    means = [summary(chain, f"preferences{turn}")["judge_mean"] for turn in ("", "_2", "_3")]
    spread = summary(chain, "preferences")["judge_std"]
    assert means[0] + 0.3 * spread < means[1] < means[2] - 0.1 * spread
    for stage in ("dpo", "dpo_2"):
        first = experiments.rows(chain.find(stage) / "metrics.jsonl")[0]
        np.testing.assert_allclose(first["loss"], np.log(2), rtol=1e-5)  # each turn's reference is its own start


@pytest.mark.nightly
def test_the_higher_score_is_chosen_and_chats_stay_chats(chain):
    asked = {json.dumps(row["prompt"]) for row in experiments.rows(chain.root.parent / "questions.jsonl")}
    for stage, most in (("preferences_2", 1), ("preferences_3", 6)):
        directory, figures = chain.find(stage), summary(chain, stage)
        pairs, held_out = (experiments.rows(directory / name) for name in preferences_files())
        assert (len(pairs), len(held_out)) == (figures["train_pairs"], figures["eval_pairs"])
        assert len(pairs) + len(held_out) + figures["ties_left_out"] == 48 * most
        for row in pairs + held_out:
            assert row["chosen_score"] > row["rejected_score"]
            assert json.dumps(row["prompt"]) in asked
            assert [message["role"] for message in row["chosen"] + row["rejected"]] == ["assistant"] * 2
            difference = row["chosen_score"] - row["rejected_score"]
            if stage == "preferences_3":
                np.testing.assert_allclose(row["margin"], 2 * difference / figures["judge_std"], rtol=1e-6)
            else:
                assert "margin" not in row


def preferences_files():
    return tuple(tables.PREFERENCES)


def prefer(scores, **changes):
    """Pairs of texts named after their place."""
    config = dataclasses.replace(CONFIG, samples_per_prompt=len(scores), **changes)
    answers = [str(place) for place in range(len(scores))]
    rng = np.random.default_rng(0)
    (rows,) = preferences.pairs_by_score(config, rng, ["?"] * len(scores), answers, np.array(scores))
    return [row["chosen"] + row["rejected"] for row in rows]


def test_a_judge_over_http_chooses_the_pairs_and_its_ties_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_JAX_DATA", str(tmp_path / "cache"))
    model, _ = experiments.models(tmp_path)
    with serving(likes_longer) as server:
        judge = {"url": server.url, "model": "tiny"}
        stage = section(model, None, judge=judge, pairs="all", prompts=12, eval_prompts=3, samples_per_prompt=3)
        data = experiments.questions(tmp_path / "questions.jsonl", 16)
        workdir = experiments.run(tmp_path / "run", data, {"preferences": stage})
        asked = [shown(question) for question in server.asked]
    written = [experiments.rows(workdir.directory("preferences") / name) for name in preferences_files()]
    figures, rows = summary(workdir, "preferences"), [row for table in written for row in table]
    for row in rows:
        assert row.keys() == {"prompt", "chosen", "rejected"}, "no scores"
        assert len(row["chosen"][0]["content"]) > len(row["rejected"][0]["content"])
    assert figures["train_pairs"] + figures["eval_pairs"] + figures["ties_left_out"] == 12 * 3
    assert figures["judge_replies"] == len(asked) == len(set(asked))
    decided = {(a, b) for prompt, a, b in asked if len(a) > len(b)}
    assert {(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows} == decided
    assert "label_agreement" not in figures


def test_a_judge_without_scores_decides_pairs_by_their_places():
    wins = np.array([1, 0.5, 0, 0, 1, 0.5])  # ab, ac, bc; de, df, ef
    first, second = preferences.pairs_by_verdict(wins, 3, list("xxxyyy"), list("abcdef"))
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in first] == [("x", "a", "b"), ("x", "c", "b")]
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in second] == [("y", "e", "d"), ("y", "d", "f")]


def test_without_noise_ties_are_left_out():
    assert prefer([0.0, 2.0, 1.0]) == ["10", "20", "12"]
    assert prefer([0.0, 2.0, 0.0, 2.0]) == ["10", "30", "12", "32"]
    assert prefer([0.0, 2.0, 0.0, 2.0], pairs="best_worst") == ["12"]
    assert prefer([1.0, 1.0, 1.0], pairs="best_worst") == []


def test_with_noise_a_tie_is_a_coin_and_a_best_sample_is_not_its_own_worst():
    config = dataclasses.replace(CONFIG, label_beta=2.0, pairs="best_worst")
    scores = np.array([1.0] * 3 + [0.0] * 3)
    texts = list("abcdef")
    wins = 0
    for seed in range(400):
        tied, others = preferences.pairs_by_score(config, np.random.default_rng(seed), [""] * 6, texts, scores)
        assert {tied[0]["chosen"], tied[0]["rejected"]} == {"a", "c"}
        assert {others[0]["chosen"], others[0]["rejected"]} == {"d", "f"}
        wins += tied[0]["chosen"] == "a"
    assert abs(wins - 200) < 4 * 10


def test_noisy_labels_are_bradley_terrys():
    config = dataclasses.replace(CONFIG, samples_per_prompt=2, label_beta=1.5)
    scores = np.tile([1.0, 1.8], 4000)
    texts = ["low", "high"] * 4000
    rows = preferences.pairs_by_score(config, np.random.default_rng(0), [""] * 8000, texts, scores)
    share = np.mean([row["chosen"] == "high" for (row,) in rows])
    expected = 1 / (1 + np.exp(-1.5 * 0.8 / 0.4))  # the standard deviation of these scores is 0.4
    np.testing.assert_allclose(share, expected, atol=4 * np.sqrt(expected * (1 - expected) / 4000))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"judge": "gold"}, "exactly one of them"),
        ({"reward_model": None}, "exactly one of them"),
        ({"samples_per_prompt": 1}, "samples_per_prompt = 1 must be at least 2"),
        ({"eval_prompts": 4}, "eval_prompts = 4 are held out of prompts = 4"),
        ({"eval_prompts": 0}, "eval_prompts = 0 must be at least 1"),
        ({**HTTP, "label_beta": 1.0}, "label_beta = 1.0 needs scores, but a judge over HTTP only compares answers"),
        ({**HTTP, "pairs": "best_worst"}, "pairs = 'best_worst' needs scores"),
        ({**HTTP, "margin": 1.0}, "margin = 1.0 needs scores"),
        ({"margin": 1.0, "label_beta": 2.0}, "margin = 1.0 needs label_beta = None"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)
