"""Models used from Python: the numbers of the verbs, rewards of either form, and comparisons."""

import json
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest

import rlhf_jax
from rlhf_jax.loading.models import Policy, RewardModel
from rlhf_jax.rewards.scorers import same_tokenizer
from tests.support import checkpoints, tokenizer_files, workdirs
from tests.support.commands import best_of_n, jsonl, reads, succeeds
from tests.support.trained_stages import assert_same_model

TEXTS = ["The film", "It"]
CHAT = [{"role": "user", "content": "is it good?"}]


def length(prompts, completions, **_):
    return [float(len(text)) for text in completions]


def letters(prompts, completions, **_):
    """A judge that does not count halves of characters, which samples do not show."""
    return [float(sum(c.isascii() and c.isalpha() for c in text)) for text in completions]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoints")
    return checkpoints.policy(directory / "policy"), checkpoints.reward_model(directory / "judge")


@pytest.fixture(scope="module")
def policy(places) -> Policy:
    return rlhf_jax.load_policy(places[0])


@pytest.fixture(scope="module")
def reward_model(places) -> RewardModel:
    return rlhf_jax.load_reward_model(places[1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    workdirs.write_models(root)
    return rlhf_jax.Run(root)


def test_a_model_of_the_other_kind_is_refused(places):
    with pytest.raises(rlhf_jax.RlhfError, match="is a reward model, not a language model: use load_reward_model"):
        rlhf_jax.load_policy(places[1])
    with pytest.raises(rlhf_jax.RlhfError, match="is a language model, not a reward model: use load_policy"):
        rlhf_jax.load_reward_model(places[0])
    low = rlhf_jax.load_policy(places[0], dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(low.params)} == {"bfloat16"}


def test_samples_are_the_verbs(places, policy, capsys):
    found = rlhf_jax.sample(policy, TEXTS, n=2, seed=3, max_new_tokens=6)
    flags = [f"--prompt={text}" for text in TEXTS]
    printed = succeeds(capsys, "sample", f"--model={places[0]}", *flags, "--n=2", "--seed=3", "--max-new-tokens=6")
    assert printed == "\n".join(f"{row.prompt}{row.completion}\n" for row in found.itertuples())
    assert found[["score", "kl"]].isna().all(axis=None)


def test_a_reward_and_a_reference_of_samples(policy, reward_model):
    other = policy._replace(params=jax.tree.map(lambda leaf: 0.9 * leaf, policy.params))
    for prompts in (TEXTS, [CHAT]):
        found = rlhf_jax.sample(policy, prompts, n=3, reward=length, reference=other, max_new_tokens=6)
        read = found["completion"]
        if prompts == [CHAT]:
            assert found["prompt"].tolist() == [CHAT] * 3
            read = [[{"role": "assistant", "content": text}] for text in read]
        assert found["score"].tolist() == [float(len(text)) for text in read]
        assert (found["kl"] != 0).all() and np.isfinite(found["kl"]).all()
    same = rlhf_jax.sample(policy, TEXTS, reward=reward_model, reference=policy, max_new_tokens=6)
    np.testing.assert_array_equal(same["kl"], 0)
    assert np.isfinite(same["score"]).all()
    with pytest.raises(rlhf_jax.RlhfError, match="some prompts are texts and some are chats"):
        rlhf_jax.sample(policy, ["The film", CHAT])
    with pytest.raises(rlhf_jax.RlhfError, match=r"sample\.temprature .* Did you mean 'temperature'"):
        rlhf_jax.sample(policy, TEXTS, temprature=1.0)


def test_logprobs_are_the_verbs(places, policy, capsys, monkeypatch):
    rows = [{"prompt": "The film", "completion": " was good.", "id": 7}, {"prompt": "", "completion": "It is."}]
    found = rlhf_jax.logprobs(policy, pd.DataFrame(rows[:1]), batch_size=1)
    assert found.columns.tolist() == ["prompt", "completion", "id", "logprob", "token_logprobs"]
    reads(monkeypatch, jsonl(rows))
    printed = [json.loads(line) for line in succeeds(capsys, "logprobs", f"--model={places[0]}").splitlines()]
    assert rlhf_jax.logprobs(policy, rows).to_dict("records")[1]["token_logprobs"] == printed[1]["token_logprobs"]
    without = rlhf_jax.logprobs(policy, rows, eos=False)["token_logprobs"]
    assert [row["token_logprobs"][:-1] for row in printed] == without.tolist()
    with pytest.raises(rlhf_jax.RlhfError, match="row 2 has no column completion"):
        rlhf_jax.logprobs(policy, [*rows[:1], {"prompt": "x"}])


def test_best_of_n_is_the_verbs(places, policy, reward_model, capsys, monkeypatch):
    rows = [{"prompt": "The film", "id": 7}, {"prompt": CHAT, "id": 8}]
    flags = [f"--model={places[0]}", f"--reward-model={places[1]}", "--n=3", "--max-new-tokens=6"]
    printed = best_of_n(capsys, monkeypatch, rows, *flags)
    found = rlhf_jax.best_of_n(policy, reward_model, rows, n=3, max_new_tokens=6)
    assert found.to_dict("records") == printed
    longest = rlhf_jax.best_of_n(policy, length, rows[:1], n=3, max_new_tokens=6).loc[0]
    assert longest["completion"] == max(longest["completions"], key=len)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"n": 0}, "n = 0"),
        ({"soft": 0.0}, "soft = 0"),
        ({"temperature": 0}, "temperature = 0"),
    ]
    for bad, words in wrong:
        with pytest.raises(rlhf_jax.RlhfError, match=words):
            rlhf_jax.best_of_n(policy, length, rows, **bad)


def test_scores_are_of_each_row_whatever_stands_beside_it(reward_model):
    rows = [
        {"prompt": "The film", "completion": " was good.", "weight": 2.0},
        {"prompt": CHAT, "completion": [{"role": "assistant", "content": "yes"}], "weight": 3.0},
    ]
    together = rlhf_jax.score(reward_model, rows)
    alone = [rlhf_jax.score(reward_model, [row])["score"][0] for row in rows]
    np.testing.assert_allclose(together["score"], alone, atol=1e-6)
    assert alone[0] != alone[1]
    weighed = rlhf_jax.score(lambda prompts, completions, weight: weight, rows)
    assert weighed["score"].tolist() == [2.0, 3.0] and weighed.columns.tolist()[:3] == list(rows[0])
    with pytest.raises(rlhf_jax.RlhfError, match="no reward applies to the completion"):
        rlhf_jax.score(lambda prompts, completions: [None], rows)
    with pytest.raises(rlhf_jax.RlhfError, match="reward function broken raised ZeroDivisionError"):

        def broken(prompts, completions):
            return [1 / 0]

        rlhf_jax.score(broken, rows)


def test_policies_are_compared_by_the_judge(policy):
    other = policy._replace(params=jax.tree.map(lambda leaf: 0.9 * leaf, policy.params))
    prompts = [f"{text} {number}" for text in TEXTS for number in range(4)]
    found = rlhf_jax.evaluate({"start": policy, "other": other}, prompts, letters, temperature=0, max_new_tokens=8)
    counts = [
        rlhf_jax.sample(model, prompts, temperature=0, reward=letters, max_new_tokens=8)["score"].to_numpy()
        for model in (policy, other)
    ]
    np.testing.assert_allclose(found["score"], [own.mean() for own in counts])
    np.testing.assert_allclose(found["gain"], [0, (counts[1] - counts[0]).mean()])
    wins = (counts[1] > counts[0]) + 0.5 * (counts[1] == counts[0])
    start, changed = found.to_dict("records")
    assert changed["win_rate"] == wins.mean() != 0.5
    assert changed["win_low"] <= wins.mean() <= changed["win_high"]
    assert found.index.tolist() == ["start", "other"] and found["n_prompts"].tolist() == [8, 8]
    assert start["kl"] == 0 != changed["kl"]


def test_a_comparison_that_means_nothing_is_refused(policy, tmp_path):
    foreign = rlhf_jax.load_policy(checkpoints.policy(tmp_path / "gpt2", tokenizer_files.gpt2))
    cases: list[tuple[dict[str, Policy], list[str], dict[str, Any], str]] = [
        ({"a": policy, "b": foreign}, TEXTS, {}, "b and the reference have different tokenizers"),
        ({"a": policy}, [], {}, "at least one policy and one prompt"),
        ({"a": policy}, TEXTS, {"stop": ["."]}, "evaluate.stop is not supported"),
        ({"a": policy}, ["word " * 300], {}, "but the context is 256"),
    ]
    for policies, prompts, options, words in cases:
        with pytest.raises(rlhf_jax.RlhfError, match=words):
            rlhf_jax.evaluate(policies, prompts, length, **options)


def test_an_exported_policy_comes_back_and_is_compared_with_its_start(trained, tmp_path):
    policy = trained.load_policy("ppo")
    assert rlhf_jax.export(policy, tmp_path / "out") == tmp_path / "out"
    back = rlhf_jax.load_policy(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, back.params, policy.params)
    assert same_tokenizer(back.tokenizer, policy.tokenizer)
    judge = trained.load_reward_model("reward_model")
    found = rlhf_jax.evaluate({"ppo": policy, "again": back}, ["a good", "film"], judge, max_new_tokens=6)
    np.testing.assert_allclose(found["kl"], 0, atol=1e-5)
    with pytest.raises(rlhf_jax.RlhfError, match="already exists: choose a new directory"):
        rlhf_jax.export(policy, tmp_path / "out")


def test_the_sequence_of_verbs_is_one_of_functions(trained):
    asked = trained.sample(["a good"], stage="ppo", n=40)
    policy, start = trained.load_policy("ppo"), trained.load_policy("sft")
    judge = trained.load_reward_model("reward_model")
    found = rlhf_jax.sample(policy, ["a good"], n=40, reward=judge, reference=start, max_new_tokens=6)
    pd.testing.assert_frame_equal(found, asked)
    back = rlhf_jax.logprobs(policy, found[["prompt", "completion"]], eos=True)
    other = rlhf_jax.logprobs(start, found[["prompt", "completion"]], eos=True)
    whole = [len(tokens) <= 6 for tokens in back["token_logprobs"]]  # the others were cut off before EOS
    assert any(whole)
    np.testing.assert_allclose((back["logprob"] - other["logprob"])[whole], found["kl"][whole], atol=1e-4)


def test_a_model_loads_as_transformers_names_it(places, policy, tmp_path):
    assert_same_model(rlhf_jax.load_policy(rlhf_jax.export(policy, tmp_path / "again")), policy)
