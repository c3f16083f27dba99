"""Evaluations of small checkpoints: who wins against whom, by which judge, and what is measured beside it."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import pandas as pd
import pytest

from rlhf_jax.core.statistics import bootstrap_interval, length_controlled_win_rate, repetition, wilson_interval
from rlhf_jax.data import pipeline
from rlhf_jax.data.prompts import draw_prompts
from rlhf_jax.data.ragged import Ragged, token_table
from rlhf_jax.inference import answers
from rlhf_jax.interop import hf
from rlhf_jax.loading.models import Policy, RewardModel
from rlhf_jax.loading.pretrained import load_checkpoint
from rlhf_jax.reports import report
from rlhf_jax.reports.run import FURTHER_COLUMNS, RESULT_COLUMNS, Run
from rlhf_jax.rewards.http_judge import HTTPJudgeConfig
from rlhf_jax.sampling.batches import response_logprobs_all, sample_all
from rlhf_jax.sampling.choice import Sampling
from rlhf_jax.stages.evaluate import EvaluateConfig, deciding_column, opponent
from rlhf_jax.types import RlhfError, Rollout
from tests.support import experiments, tiny
from tests.support.judge_server import likes_longer, serving

PROMPTS, SELECTION = 24, 8


def conversations(path: Path, rows: int, *, longer: int = 0) -> Path:
    """Preferences that are chats: prompts of 1 to 3 words or more, and texts to be told how likely they are."""
    rng = np.random.default_rng(rows)

    def message(role: str, more: int = 0) -> dict[str, str]:
        return {"role": role, "content": " ".join(rng.choice(experiments.WORDS, rng.integers(1, 4) + more))}

    rows_ = [
        {"prompt": [message("user", longer)], "chosen": [message("assistant")], "rejected": [message("assistant")]}
        for _ in range(rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_))
    return path


def near(model: str, directory: Path, network: Literal["policy", "reward"], by: float) -> str:
    """A checkpoint with other weights, and the same tokenizer."""
    found = load_checkpoint(model)
    assert isinstance(found, (Policy, RewardModel)) and found.hf_config is not None
    leaves, structure = jax.tree.flatten(found.params)
    rng = np.random.default_rng(0)
    moved = [leaf + by * np.std(leaf) * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    hf.save_pretrained(directory, network, jax.tree.unflatten(structure, moved), found.hf_config)
    for path in (*Path(model).glob("*token*"), *Path(model).glob("*.jinja")):
        shutil.copy(path, directory)
    return str(directory)


def section(model: str, reward_model: str, **changes) -> dict:
    return {
        "kind": "evaluate",
        "reference": model,
        "policies": (),
        "best_of": (),
        "reward_model": reward_model,
        "judge": None,
        "prompts": PROMPTS,
        "selection_prompts": SELECTION,
        "temperature": 0.7,
        **changes,
    }


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Three evaluations of the same answers, by a reward model, by another one, and over HTTP, twice."""
    directory = tmp_path_factory.mktemp("evaluate")
    model, reward_model = experiments.models(directory)
    other = near(model, directory / "other", "policy", 0.3)
    judge = near(reward_model, directory / "gold", "reward", 0.3)
    train, held_out = (str(conversations(directory / f"{more}.jsonl", 40, longer=more)) for more in (6, 3))
    test = str(conversations(directory / "chats.jsonl", 40))
    data = dataclasses.replace(experiments.data_config(""), train=train, eval=held_out, test=test)
    with pytest.MonkeyPatch.context() as patch, serving(likes_longer) as server:
        patch.setenv("RLHF_JAX_DATA", str(directory / "cache"))
        http = {"url": server.url, "model": "tiny", "prompt_price": 3.0}
        stages = {
            "plain": section(model, reward_model, best_of=(2,), against=(other,)),
            "judged": section(model, reward_model, judge=judge, against=(other,), bootstrap_rounds=200),
            "policy": section(model, reward_model, best_of=(2,), policies=(other,)),
        }
        workdir = experiments.run(directory / "run", data, stages)
        stages = {"http": section(model, reward_model, judge=http, against=(other,))}
        experiments.run(directory / "run", data, stages)
        asked = [len(server.asked)]
        experiments.run(directory / "again", data, stages)
        asked.append(len(server.asked))
        with pytest.raises(RlhfError, match="has another tokenizer than"):
            shutil.copytree(other, directory / "template")
            (template,) = (directory / "template").glob("*.jinja")
            template.write_text(template.read_text() + "!")
            stages = {"refused": section(model, reward_model, against=(str(directory / "template"),))}
            experiments.run(directory / "refused", data, stages)
    return workdir.root, (model, other), asked


def table(directory: Path, name: str) -> pd.DataFrame:
    return pd.DataFrame(experiments.rows(directory / name))


def sampled(directory: Path, method: str) -> pd.DataFrame:
    rows = table(directory, "samples.jsonl")
    return rows[rows["method"] == method].reset_index(drop=True)


def test_prompts_are_drawn_from_the_whole_file_and_the_same_for_all_methods(evaluated):
    prompts = {name: sampled(evaluated[0] / "plain", name)["prompt"].tolist() for name in ("reference", "best_of_2")}
    assert len(prompts["reference"]) == PROMPTS and prompts["reference"] == prompts["best_of_2"]
    asked = [row["prompt"][0]["content"] for row in experiments.rows(evaluated[0].parent / "chats.jsonl")]
    assert {prompt.removesuffix(":") for prompt in prompts["reference"]} <= set(asked), "of the test split"
    late = set(asked[PROMPTS:]) - set(asked[:PROMPTS])  # a file may be sorted: the first rows are none like the others
    assert any(prompt.removesuffix(":") in late for prompt in prompts["reference"])


def test_a_checkpoint_is_compared_as_a_policy(evaluated):
    results = experiments.rows(evaluated[0] / "policy" / "results.jsonl")
    assert [row["method"] for row in results] == ["reference", "best_of_2", "other"]
    assert results[2]["kl"] > 0.01
    assert results[1]["reward_score"] > results[0]["reward_score"]
    against = table(evaluated[0] / "policy", "win_rates.jsonl")
    assert set(against["against"]) == {"reference"}, "it is no opponent of the others"
    assert set(table(evaluated[0] / "plain", "win_rates.jsonl")["against"]) == {"reference", "other"}


def test_prompts_are_a_function_of_the_seed():
    pool = pipeline.Prompts(np.zeros((40, 2), np.int32), np.ones((40, 2), bool))
    one, same, other = (draw_prompts(pool, 8, jax.random.key(seed), "config.evaluate.prompts") for seed in (0, 0, 1))
    assert len(set(one.tolist())) == 8 and set(one.tolist()) < set(range(40))
    np.testing.assert_array_equal(one, same)
    assert set(one.tolist()) != set(other.tolist())
    with pytest.raises(RlhfError, match=r"config\.evaluate\.prompts = 41: the data has only 40"):
        draw_prompts(pool, 41, jax.random.key(0), "config.evaluate.prompts")


@pytest.mark.parametrize(("stage", "column"), [("plain", "score"), ("judged", "gold")])
def test_pairs_are_won_by_the_judges_scores_against_every_opponent(evaluated, stage, column):
    directory = evaluated[0] / stage
    results = {row["method"]: row for row in experiments.rows(directory / "results.jsonl")}
    rates = table(directory, "win_rates.jsonl")
    names = ["reference", "best_of_2", "other"] if stage == "plain" else ["reference", "other"]
    assert list(results) == names, "an opponent has a row too"
    pairs = [(name, against) for name in names for against in ("reference", "other") if name != against]
    assert list(zip(rates["method"], rates["against"], strict=True)) == pairs
    for method, against in pairs:
        own, other = sampled(directory, method), sampled(directory, against)
        assert list(own["prompt"]) == list(other["prompt"]) and len(own) == PROMPTS
        wins = np.where(own[column] == other[column], 0.5, own[column] > other[column])
        row = rates[(rates["method"] == method) & (rates["against"] == against)].iloc[0]
        assert row["n_prompts"] == PROMPTS and row["win_rate"] == wins.mean()
        assert row["tie_rate"] == np.mean(wins == 0.5)
        assert (row["win_low"], row["win_high"]) == wilson_interval(wins.sum(), PROMPTS, z=1.959964)
        rounds = 1000 if stage == "plain" else 200
        assert (row["boot_low"], row["boot_high"]) == bootstrap_interval(wins, level=0.95, rounds=rounds, seed=0)
        lengths, others = own["length"].to_numpy(), other["length"].to_numpy()
        assert (row["lc_win_rate"], row["lc_win_se"]) == length_controlled_win_rate(wins, lengths, others)
        if against == "reference":
            shared = ["win_rate", "win_low", "tie_rate", "boot_high", "lc_win_rate"]
            assert [results[method][name] for name in shared] == [row[name] for name in shared]
            np.testing.assert_array_equal(own["win"], wins)
    assert (results["reference"]["win_rate"], results["reference"]["tie_rate"]) == (0.5, 1.0)
    if stage == "judged":
        assert results["other"]["gold_score"] == sampled(directory, "other")["gold"].mean()
        gaps = sampled(directory, "other")["gold"] - sampled(directory, "other")["score"]
        assert gaps.abs().max() > 0.1, "the judge is another model"


def test_the_columns_stand_in_the_order_that_was_agreed_and_say_what_the_answers_say(evaluated):
    directory = evaluated[0] / "plain"
    results = table(directory, "results.jsonl")
    assert [name for name in results.columns if name in RESULT_COLUMNS] == list(RESULT_COLUMNS)
    assert list(results.columns).index("seconds") < list(results.columns).index("tie_rate")
    for row in results.to_dict("records"):
        own = sampled(directory, row["method"])
        words = [text.split() for text in own["completion"]]
        assert row["repetition_4"] == repetition(words, 4) or not any(len(text) > 3 for text in words)
        assert row["distinct_1"] == len({word for text in words for word in text}) / sum(map(len, words))
    reference, best, other = results.to_dict("records")
    assert (reference["kl"], reference["kl_k3"], reference["kl_k3_se"]) == (0, 0, 0)
    assert other["kl_k3"] > 0 and other["kl_k3_se"] > 0
    assert abs(other["kl_k3"] - other["kl"]) < 4 * other["kl_se"], "two estimates of one divergence"
    assert np.isnan(best["kl_k3"]) and np.isnan(best["text_nll"]) and best["ref_nll"] > 0
    assert other["ref_nll"] > reference["ref_nll"], "what another policy says is less likely"
    assert other["text_nll"] != reference["text_nll"]


@pytest.mark.nightly
def test_greedy_answers_have_the_log_ratio_of_both_models_at_temperature_1(tmp_path):
    model, reward_model = experiments.models(tmp_path)
    other = near(model, tmp_path / "other", "policy", 0.3)
    data = conversations(tmp_path / "chats.jsonl", 6)
    sizes = {"prompts": 6, "selection_prompts": 1}
    stages = {"greedy": section(model, reward_model, against=(other,), temperature=0.0, **sizes)}
    directory = experiments.run(tmp_path / "run", data, stages).root / "greedy"
    for name in ("results.jsonl", "selection.jsonl", "win_rates.jsonl", "samples.jsonl"):
        for line in (directory / name).read_text().splitlines():
            json.loads(line, parse_constant=lambda word, name=name: pytest.fail(f"{name} has a bare {word}"))
    (selection,) = [row for row in experiments.rows(directory / "selection.jsonl") if row["method"] == "other"]
    assert selection["kl_se"] is None and np.isfinite(selection["kl"]), "one prompt has no standard error"

    reference, policy = load_checkpoint(model), load_checkpoint(other)
    assert isinstance(reference, Policy) and isinstance(policy, Policy)
    config = experiments.data_config(data)
    prompts = pipeline.prompts(pipeline.load_rows(config, "test"), policy.tokenizer, config)
    greedy = Sampling(config.max_response_tokens, 0.0, policy.tokenizer.stop_ids)
    rollout = sample_all(
        policy.network, policy.params, prompts, jax.random.key(0), greedy, samples=1, batch_size=len(prompts.tokens)
    )
    own, theirs = (
        response_logprobs_all(of.network, of.params, rollout, len(prompts.tokens), temperature=1.0)
        for of in (policy, reference)
    )
    expected = np.where(rollout.response_mask, own - theirs, 0).sum(axis=1)
    assert np.abs(expected).min() > 1e-3
    np.testing.assert_allclose(sampled(directory, "other")["kl"], expected, atol=1e-4)
    results = {row["method"]: row for row in experiments.rows(directory / "results.jsonl")}
    assert results["reference"]["kl"] == 0
    np.testing.assert_allclose(results["other"]["kl"], expected.mean(), atol=1e-4)


def test_perplexity_is_of_the_tokens_of_each_text_alone():
    policy = Policy(tiny.POLICY, tiny.policy_params(), None)  # type: ignore[arg-type]
    prompts, rng = tiny.prompts(5), np.random.default_rng(1)
    mask = tiny.prefix_mask(rng, 5, tiny.RESPONSE)
    rollout = Rollout(prompts.tokens, prompts.mask, rng.integers(4, tiny.VOCAB, mask.shape).astype(np.int32), mask)
    start = jax.jit(lambda params, tokens, mask: tiny.POLICY.start(params, tokens, mask, 16)[0])
    total, count, texts = 0.0, 0, []
    for row in range(5):
        text = [*prompts.tokens[row][prompts.mask[row]], *rollout.response[row][mask[row]]]
        texts.append(text)
        for end in range(prompts.mask[row].sum(), len(text)):
            padded = np.array([[0] * (10 - end) + text[:end]], np.int32)
            seen = np.array([[False] * (10 - end) + [True] * end])
            found = np.asarray(start(policy.params, padded, seen), np.float64)[0]
            total -= found[text[end]] - np.log(np.exp(found).sum())
            count += 1
    np.testing.assert_allclose(answers.answers_nll(policy, rollout, 2), total / count, rtol=1e-5)
    ends, places = np.cumsum([len(text) for text in texts]), np.concatenate([np.arange(len(text)) for text in texts])
    trained = places >= np.repeat(prompts.mask.sum(axis=1), np.diff(ends, prepend=0))
    table = token_table(Ragged(np.concatenate(texts), ends), Ragged(trained, ends))
    assert answers.texts_nll(policy, table, 3) == pytest.approx(total / count, rel=1e-5)
    assert answers.texts_nll(policy, None, 3) is None


def test_a_judge_over_http_decides_and_is_paid_once(evaluated):
    root, _, asked = evaluated
    assert asked[0] == asked[1] > 0, "what was answered for one experiment is not asked for another"
    assert (root.parent / "cache" / "judge").is_dir()
    tables = [table(place / "http", "results.jsonl") for place in (root, root.parent / "again")]
    pd.testing.assert_frame_equal(tables[0], tables[1])
    own, other = (sampled(root / "http", name)["completion"].str.len() for name in ("other", "reference"))
    row = experiments.rows(root / "http" / "results.jsonl")[-1]
    assert row["win_rate"] == np.mean(np.where(own == other, 0.5, own > other))
    assert row["gold_score"] is None, "it gives no scores"
    summary = json.loads((root / "http" / "summary.json").read_text())
    assert summary["judge"] == "tiny" and summary["time/judge_asked"] == summary["judge_replies"] == asked[0]
    assert summary["judge_cost"] == pytest.approx(3.0 * 100 * asked[0] / 1e6)


def test_the_report_of_checkpoints_judged_over_http_names_them_and_the_judge(evaluated, monkeypatch):
    root = evaluated[0]
    monkeypatch.setattr(report, "PNG_DPI", 20)
    page = report.write_report(root).read_text()
    assert "A pair is won by the answer that judge tiny prefers in both orders." in page
    assert "by the judge tiny" in page and "other" in page
    assert (pd.read_csv(root / "win_rates.csv")["against"].value_counts() == 1).all()
    csv = pd.read_csv(root / "results.csv")
    assert list(csv.columns) == [*RESULT_COLUMNS, *FURTHER_COLUMNS]
    assert Run(root).load_judge() is None


def test_runs_of_the_same_seed_meet_and_others_meet_the_first():
    seeds = [("sft", 3), ("dpo", 3), ("ppo", 3), ("ppo", 4), ("grpo", 3), ("grpo", 4), ("grpo", 5)]
    methods = [answers.EvaluatedMethod(name, name, seed, 1) for name, seed in seeds]
    methods.insert(1, answers.EvaluatedMethod("best_of_4", "sft", 3, 4))
    met = {source: [opponent(source, method, methods) for method in methods] for source in ("sft", "dpo", "ppo")}
    assert met == {"sft": [0] * 8, "dpo": [2] * 8, "ppo": [3, 3, 3, 3, 4, 3, 4, 3]}


def config(**changes) -> EvaluateConfig:
    return EvaluateConfig(**section("sft", "reward_model", **changes))


def test_stages_are_chosen_by_who_judges_them():
    http = HTTPJudgeConfig(url="http://localhost/v1", model="tiny")
    columns = [deciding_column(config(judge=judge)) for judge in (None, "gold", http)]
    assert columns == ["reward_score", "gold_score", "win_rate"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"best_of": (1,)}, "must be at least 2 in every element"),
        ({"prompts": 0}, "prompts = 0 must be at least 1"),
        ({"selection_prompts": 0}, "selection_prompts = 0 must be at least 1"),
        ({"bootstrap_rounds": 10}, "bootstrap_rounds = 10 must be at least 100"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_cannot_work_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)
