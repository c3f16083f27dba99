"""Stages on a model that others trained: SFT, reward model and DPO on chats, and out again; every night, all stages."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest
from transformers import GPT2Config

from rlhf_jax.core.sequences import joined
from rlhf_jax.data import pipeline
from rlhf_jax.data.padding import pad_right
from rlhf_jax.interop import hf
from rlhf_jax.interop.families import model_config
from rlhf_jax.loading.models import Policy, RewardModel, body_of
from rlhf_jax.loading.pretrained import load_checkpoint
from rlhf_jax.main import main
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.reports.run import Run
from rlhf_jax.rewards.scorers import make_scorer
from rlhf_jax.types import Rollout
from tests.support import checkpoints, tokenizer_files
from tests.support.commands import run_without_figures
from tests.support.own_data import chat_arguments

DATA = pipeline.DataConfig(
    train="",
    eval="",
    test=None,
    limit=None,
    text_prompt_tokens=(1, 2),
    max_prompt_tokens=48,
    max_response_tokens=32,
)
THREE = "--config.stages=('sft','reward_model','dpo')"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("pretrained")
    model = checkpoints.policy(directory / "model")
    run_without_figures(*chat_arguments(str(model), directory), THREE, f"--workdir={directory / 'run'}")
    return model, directory / "run"


@pytest.mark.nightly
def test_all_stages_run_and_say_what_they_should(tmp_path):
    model, workdir = checkpoints.policy(tmp_path / "model"), tmp_path / "run"
    assert main([*chat_arguments(str(model), tmp_path), f"--workdir={workdir}"]) == 0
    results = pd.read_csv(workdir / "results.csv")
    assert results["method"].tolist() == ["sft", "best_of_4", "dpo", "ppo"]
    assert np.isfinite(results[["reward_score", "kl", "length"]]).all(axis=None)


@pytest.mark.nightly
def test_prompts_are_rendered_by_the_models_own_template(finished):
    _, workdir = finished
    samples = [json.loads(line) for line in (workdir / "sft" / "samples.jsonl").read_text().splitlines()]
    assert all("assistant" in row["prompt"] for row in samples)


@pytest.mark.nightly
def test_samples_of_chats_are_texts_with_their_roles(finished):
    rows = [json.loads(line) for line in (finished[1] / "reward_model" / "samples.jsonl").read_text().splitlines()]
    assert all(row["prompt"].startswith("user: ") and row["completion"].startswith("assistant: ") for row in rows)


@pytest.mark.nightly
def test_sft_starts_as_the_checkpoint_and_the_reward_model_as_sft(finished):
    model, workdir = finished
    start, run = load_checkpoint(str(model)), Run(workdir)
    assert isinstance(start, Policy)
    trained, reward = run.load_policy("sft"), run.load_reward_model("reward_model")
    far = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), start.params, trained.params)
    assert 0 < max(jax.tree.leaves(far)) < 1e-3
    near = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), body_of(trained), reward.params["body"])
    assert 0 < max(jax.tree.leaves(near)) < 1e-3
    assert trained.hf_config == start.hf_config and trained.tokenizer.stop_ids == start.tokenizer.stop_ids


@pytest.mark.nightly
def test_what_was_trained_goes_out_again(finished, tmp_path):
    _, workdir = finished
    run = Run(workdir)
    policy, reward = run.load_policy("dpo"), run.load_reward_model("reward_model")
    assert policy.hf_config is not None and reward.hf_config is not None
    hf.save_pretrained(tmp_path / "policy", "policy", policy.params, policy.hf_config)
    hf.save_pretrained(tmp_path / "reward", "reward", reward.params, reward.hf_config)
    policy.tokenizer.save(tmp_path / "policy")
    reward.tokenizer.save(tmp_path / "reward")
    back, judge = load_checkpoint(str(tmp_path / "policy")), load_checkpoint(str(tmp_path / "reward"))
    assert isinstance(back, Policy) and isinstance(judge, RewardModel)
    jax.tree.map(np.testing.assert_array_equal, back.params, policy.params)
    jax.tree.map(np.testing.assert_array_equal, judge.params, reward.params)


@pytest.mark.nightly
def test_a_changed_checkpoint_is_noticed(finished, tmp_path, capsys):
    model, workdir = finished
    flags = chat_arguments(str(model), tmp_path)  # the same bytes of data, in other files
    same = [*flags, THREE, f"--workdir={workdir}"]
    assert main(same) == 0
    assert "nothing to do" in capsys.readouterr().out
    weights = model / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-4] + b"\0\0\0\1")
    try:
        assert main(same) == 1
        assert f"{model}: '" in capsys.readouterr().err
    finally:
        weights.write_bytes(before)


@pytest.mark.parametrize(
    ("name", "message"),
    [("nothing", "neither a stage"), ("./nowhere", "neither a stage"), ("sft", "which is not before it")],
)
def test_a_model_that_is_not_there(name, message, tmp_path, capsys):
    assert main([*chat_arguments(name, tmp_path), f"--workdir={tmp_path / 'run'}"]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.nightly
@pytest.mark.parametrize("tokenizer", ["gpt2", "llama2"])
def test_a_reward_model_with_another_tokenizer_reads_the_texts(tokenizer, tmp_path):
    """gpt2 has no chat template: it reads what the policy's makes of a text; llama2 has one of its own."""
    policy = load_checkpoint(str(checkpoints.policy(tmp_path / "policy")))
    judge = load_checkpoint(str(checkpoints.reward_model(tmp_path / "judge", tokenizer_files.CHECKPOINTS[tokenizer])))
    assert isinstance(policy, Policy) and isinstance(judge, RewardModel)
    data = DATA
    rows: list[dict[str, Any]]
    if tokenizer == "llama2":
        rows = [{"prompt": [{"role": "user", "content": text}]} for text in ("is it good?", "the film")]
    else:
        rows = [{"prompt": "is it good?"}, {"prompt": "the film"}]
    prompts = pipeline.prompts(rows, policy.tokenizer, data)
    answers = [" it is.", " was bad, the worst"]
    responses = pad_right([[*policy.tokenizer.encode(text), policy.tokenizer.eos_id] for text in answers], 32)
    scores = make_scorer(judge, policy, rows, data, 4)(Rollout(*prompts, *responses))
    for row, answer, score in zip(rows, answers, scores, strict=True):
        if tokenizer == "llama2":
            messages = [*row["prompt"], {"role": "assistant", "content": answer}]
            ids = judge.tokenizer.encode(judge.tokenizer.render(messages, add_generation_prompt=False))
        else:
            ids = [*judge.tokenizer.encode(row["prompt"] + answer), judge.tokenizer.eos_id]
        alone = Rollout(*(np.asarray([x]) for x in (ids[:1], [True], ids[1:], [True] * (len(ids) - 1))))
        np.testing.assert_allclose(jax.jit(judge.network.scores)(judge.params, joined(alone))[0], score, atol=1e-5)


@pytest.mark.nightly
def test_ppo_against_a_reward_model_with_another_tokenizer(finished, tmp_path):
    model, workdir = finished
    judge = checkpoints.reward_model(tmp_path / "judge", tokenizer_files.llama2)
    flags = [*chat_arguments(str(model), workdir.parent), f"--workdir={tmp_path / 'run'}", f"--inputs={workdir}"]
    assert main([*flags, f"--config.ppo.reward_model={judge}", "--stage=ppo"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(np.isfinite(row["objective/scores"]) for row in rows)


@pytest.mark.nightly
def test_a_language_model_is_no_reward_model(finished, tmp_path, capsys):
    model, workdir = finished
    flags = [*chat_arguments(str(model), workdir.parent), f"--workdir={tmp_path / 'run'}", f"--inputs={workdir}"]
    assert main([*flags, f"--config.ppo.reward_model={model}", "--stage=ppo"]) == 1
    assert "is a language model where a reward model is needed" in capsys.readouterr().err


def test_more_tokens_than_learnt_positions_are_refused(tmp_path, capsys):
    fields = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 40, "vocab_size": 370}
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **fields}
    shape = model_config(GPT2Config(**fields), param_dtype="float32", compute_dtype="float32")
    params = PolicyNetwork(shape, 370, ()).init(jax.random.key(0))
    hf.save_pretrained(tmp_path / "model", "policy", params, config)
    tokenizer_files.chatml(tmp_path / "model")
    flags = [*chat_arguments(str(tmp_path / "model"), tmp_path), f"--workdir={tmp_path / 'run'}", "--stage=sft"]
    assert main(flags) == 1
    assert "supports at most 40 positions" in capsys.readouterr().err
