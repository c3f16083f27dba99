import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import config as configs
from rlhf_jax.core.sequences import joined
from rlhf_jax.data import pipeline
from rlhf_jax.data.padding import pad_left, pad_right
from rlhf_jax.data.pipeline import DataConfig
from rlhf_jax.reports.run import RESULT_COLUMNS, Run
from rlhf_jax.sampling.choice import Sampling
from rlhf_jax.sampling.options import SamplingOptions
from rlhf_jax.types import RlhfError, Rollout
from tests.support import workdirs


@pytest.fixture
def trained(tmp_path):
    workdirs.write_training(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    workdirs.write_models(root)
    return Run(root)


def test_stages_stand_after_those_they_read_whatever_their_files_times(trained):
    workdirs.write_evaluate(trained, gold=True)
    (trained / "sft" / "config.json").touch()
    stages = Run(trained).stages
    assert sorted(stages) == ["dpo_01", "dpo_1", "evaluate", "ppo", "preferences", "reward_model", "sft"]
    assert stages.index("sft") < stages.index("preferences") < stages.index("reward_model") < stages.index("ppo")
    assert stages[-1] == "evaluate"


def test_a_stage_still_running_is_read_up_to_its_last_whole_line(trained):
    rows = workdirs.metric_rows({"loss": (2, 1)}, steps=12)
    directory = workdirs.write_stage(
        trained, "late", {"kind": "sft"}, files={"metrics.jsonl": rows, "samples.jsonl": []}, complete=False
    )
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "se')
    run = Run(trained)
    assert run.metrics("late")["step"].tolist() == list(range(1, 13))
    assert len(run.samples("late")) == 0 and "completion" in run.samples("late")
    assert not run.is_complete("late") and "late" in run.stages
    with pytest.raises(RlhfError, match=r"'late', which is not complete, has no summary.json"):
        run.summary("late")


def test_metrics_have_a_column_for_what_only_some_steps_report(trained):
    metrics = Run(trained).metrics("sft")
    assert metrics["eval/loss"].notna().sum() == 4
    assert metrics["loss"].iloc[-1] == 4


def test_an_unknown_stage_is_answered_with_those_there_are(trained):
    with pytest.raises(RlhfError, match=r"no stage 'pp0'; its stages: sft, preferences, .*ppo"):
        Run(trained).metrics("pp0")
    with pytest.raises(RlhfError, match=r"no complete stage of kind 'evaluate'; its stages: sft"):
        Run(trained).results()
    with pytest.raises(RlhfError, match=r"work directory .*nowhere does not exist"):
        Run(trained / "nowhere")


def test_results_have_the_columns_of_the_csv_first_and_numbers_where_there_are_some(trained):
    workdirs.write_evaluate(trained, gold=False, seeds=2)
    results = Run(trained).results()
    assert tuple(results.columns) == (*RESULT_COLUMNS, "gold_gain", "gold_gain_se")
    assert results["gold_score"].dtype == float and results["gold_score"].isna().all()
    assert math.isnan(results.set_index("method")["seconds"]["best_of_16"])
    assert Run(trained).selected() == ["dpo_01"]  # SFT and PPO had nothing to be chosen from


def test_stages_under_inputs_count_only_where_they_belong_to_this_run(trained, tmp_path_factory):
    workdirs.write_evaluate(trained, gold=True)
    new = tmp_path_factory.mktemp("new")
    assert Run(new, trained).stages == Run(trained).stages
    section = {"kind": "ppo", "policy": "sft", "reward_model": "reward_model", "kl_coef": 1.0}
    workdirs.write_stage(new, "ppo", section, inputs=("sft", "reward_model"), elsewhere=trained)
    run = Run(new, trained)
    assert run.directory("ppo") == new / "ppo" and run.directory("sft") == trained / "sft"
    assert "evaluate" not in run.stages, "it judged another PPO"


@pytest.mark.nightly
def test_samples_carry_the_score_and_the_divergence_that_the_networks_give_their_text(models):
    sampled = models.sample(["a good", "film"], stage="ppo", n=40, seed=3)
    assert sampled["prompt"].tolist() == ["a good"] * 40 + ["film"] * 40
    policy, start = models.load_policy("ppo"), models.load_policy("sft")
    reward_model = models.load_reward_model("reward_model")
    data = configs.build(DataConfig, workdirs.DATA, "data")
    examples = pipeline.tokenise(list(sampled["prompt"]), list(sampled["completion"]), policy.tokenizer, data)
    assert len({len(example.response) for example in examples}) > 2
    prompts = pad_left([example.prompt for example in examples], 7)
    responses = pad_right([example.response for example in examples], 9)
    rollout = Rollout(*map(jnp.asarray, (*prompts, *responses)))
    own, other = (
        model.network.response_stats(model.params, joined(rollout), temperature=1.0) for model in (policy, start)
    )
    difference = jnp.where(rollout.response_mask, own.logprobs - other.logprobs, 0).sum(axis=1)
    np.testing.assert_allclose(sampled["kl"], difference, atol=1e-4)
    scores = reward_model.network.scores(reward_model.params, joined(rollout))
    np.testing.assert_allclose(sampled["score"], scores, atol=1e-5)


@pytest.mark.nightly
def test_sampling_is_a_function_of_the_seed(models):
    first, again, other = (models.sample(["film"], stage="sft", n=8, seed=seed) for seed in (0, 0, 1))
    assert first["completion"].tolist() == again["completion"].tolist() != other["completion"].tolist()
    assert (first["kl"] == 0).all(), "trained from scratch: there is nothing to diverge from"
    cold = models.sample(["film"], stage="sft", n=8, temperature=0)
    assert cold["completion"].nunique() == 1
    assert models.sample([], stage="sft").columns.tolist() == first.columns.tolist()


@pytest.mark.nightly
def test_the_options_of_the_verb_sample_count(models):
    given = SamplingOptions(0.5, 3, 0.9, 0.1, 7, ("x",))
    assert given.sampling((2,), 99) == Sampling(7, 0.5, (2,), 3, 0.9, 0.1)
    assert SamplingOptions().sampling((2,), 99) == Sampling(99, 1.0, (2,))
    whole, short = (models.sample(["film"], stage="ppo", n=6, **how) for how in ({}, {"max_new_tokens": 2}))
    assert all(a.startswith(b) for a, b in zip(whole["completion"], short["completion"], strict=True))
    likeliest, greedy = (models.sample(["film"], stage="ppo", **how) for how in ({"top_k": 1}, {"temperature": 0}))
    assert likeliest["completion"].tolist() == greedy["completion"].tolist()
    np.testing.assert_allclose(likeliest["kl"], greedy["kl"], atol=1e-5)
    assert np.isfinite(greedy["kl"]).all() and (greedy["kl"] != 0).any()
    word = next(text.split()[1] for text in whole["completion"] if " " in text.strip())
    cut = models.sample(["film"], stage="ppo", n=6, stop=[word, "never said"])
    assert cut["completion"].tolist() == [text.split(word)[0] for text in whole["completion"]]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a Zebra film, good", "no token for 'Zebra', ','"),
        ("a good film and art", "has 5 tokens, but this run allows at most 4"),
    ],
)
def test_a_prompt_that_cannot_be_read_is_refused_in_words(models, prompt, message):
    with pytest.raises(RlhfError, match=message):
        models.sample(["film", prompt], stage="sft")


def test_numbers_that_make_no_sense_are_refused(models):
    for bad, words in (
        ({"n": 0}, "n = 0 must be at least 1"),
        ({"temperature": -1.0}, r"temperature = -1.0 must be at least 0"),
        ({"top_p": 2.0}, r"top_p = 2.0 must be above 0 and at most 1"),
        ({"stop": [""]}, "stop = '' is empty"),
        ({"topk": 3}, r"sample.topk is not a field of SamplingOptions. Did you mean 'top_k'"),
    ):
        with pytest.raises(RlhfError, match=words):
            models.sample(["film"], stage="sft", **bad)
    with pytest.raises(RlhfError, match="trains a reward, not a policy"):
        models.sample(["film"], stage="reward_model")


@pytest.mark.nightly
def test_without_a_reward_model_there_is_no_score_and_every_seed_has_its_policy(tmp_path):
    workdirs.write_models(tmp_path, with_reward_model=False, seeds=2)
    run = Run(tmp_path)
    sampled = [run.sample(["film"], stage="ppo", n=8, policy_seed=seed) for seed in (0, 1, None)]
    assert sampled[0]["score"].isna().all()
    assert sampled[0]["completion"].tolist() == sampled[2]["completion"].tolist() != sampled[1]["completion"].tolist()
    assert not jax.tree.all(
        jax.tree.map(
            lambda a, b: bool((a == b).all()), run.load_policy("ppo", 0).params, run.load_policy("ppo", 1).params
        )
    )
    with pytest.raises(RlhfError, match="has seeds 0 to 1, not 2"):
        run.load_policy("ppo", seed=2)


def test_a_judge_that_is_a_reward_model_is_no_gold_judge(tmp_path):
    workdirs.write_gold(tmp_path)
    workdirs.write_training(tmp_path)
    assert Run(tmp_path).load_judge() is not None
    section = {"kind": "evaluate", "reference": "sft", "reward_model": "reward_model", "judge": "reward_model"}
    workdirs.write_stage(tmp_path, "evaluate", section, inputs=("sft", "reward_model"))
    assert Run(tmp_path).load_judge() is None
