# torch and transformers are in .venv-parity only, where types are not checked.
# pyrefly: ignore-errors[missing-import]
"""Exports of `rlhf-jax export`: transformers and PEFT load them without warnings and give the same answers."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peft
import pytest
import torch
import transformers

from rlhf_jax.core.sequences import joined
from rlhf_jax.loading.models import Policy, RewardModel, as_reward_model
from rlhf_jax.loading.pretrained import load_checkpoint
from rlhf_jax.loading.stage_models import Base
from rlhf_jax.types import Rollout
from tests.support import checkpoints, tokenizer_files
from tests.support.commands import reads, succeeds
from tests.support.trained_stages import adapted, write_stage

NEW = 30


@pytest.mark.parametrize("tokenizer", [tokenizer_files.chatml, tokenizer_files.gemma])
def test_an_exported_policy_answers_alike(tokenizer, tmp_path, capsys, caplog):
    source, out = checkpoints.policy(tmp_path / "source", tokenizer), tmp_path / "out"
    succeeds(capsys, "export", f"--model={source}", f"--out={out}")
    with caplog.at_level("WARNING"):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        theirs: Any = transformers.AutoTokenizer.from_pretrained(out)
    assert not caplog.records, caplog.text
    assert not any(info.values()), info
    messages = [{"role": "user", "content": "Is it good?"}]
    asked = theirs.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        whole = model.eval().generate(**asked, do_sample=False, max_new_tokens=NEW)
    answer = theirs.decode(whole[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    flags = ["--chat", "--prompt=Is it good?", "--temperature=0", f"--max-new-tokens={NEW}"]
    assert succeeds(capsys, "sample", f"--model={out}", *flags).rstrip("\n") == answer.rstrip("\n\ufffd")
    assert len(answer) > 2


def test_an_exported_reward_model_loads(tmp_path, capsys, caplog):
    source, out = checkpoints.reward_model(tmp_path / "source"), tmp_path / "out"
    succeeds(capsys, "export", f"--model={source}", f"--out={out}")
    with caplog.at_level("WARNING"):
        _, info = transformers.AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not caplog.records, caplog.text
    assert not any(info.values()), info


ROWS = [{"prompt": "The film", "completion": " was good."}, {"prompt": "Is it", "completion": " dull?"}]


def logprobs(capsys, monkeypatch, model: Path) -> list[list[float]]:
    reads(monkeypatch, "".join(json.dumps(row) + "\n" for row in ROWS))
    printed = succeeds(capsys, "logprobs", f"--model={model}")
    return [json.loads(line)["token_logprobs"] for line in printed.splitlines()]


def their_logprobs(model, tokenizer) -> list[list[float]]:
    found = []
    for row in ROWS:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = [*tokenizer(row["prompt"] + row["completion"])["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            each = torch.log_softmax(model.eval()(input_ids=torch.tensor([ids])).logits[0], -1)
        found.append([float(each[i - 1, ids[i]]) for i in range(len(prompt), len(ids))])
    return found


def test_an_exported_adapter_is_peft_s(tmp_path, capsys, monkeypatch, caplog):
    source = checkpoints.policy(tmp_path / "source")
    start = load_checkpoint(str(source))
    assert isinstance(start, Policy)
    write_stage(tmp_path / "run" / "dpo", adapted(start), Base(str(source), is_stage=False))
    out = tmp_path / "out"
    succeeds(capsys, "export", f"--workdir={tmp_path / 'run'}", "--stage=dpo", f"--out={out}", "--adapter")
    with caplog.at_level("WARNING"):
        model = peft.AutoPeftModelForCausalLM.from_pretrained(out)
        theirs = transformers.AutoTokenizer.from_pretrained(out)
    assert not caplog.records, caplog.text
    expected = their_logprobs(model, theirs)
    for ours, row in zip(logprobs(capsys, monkeypatch, out), expected, strict=True):
        np.testing.assert_allclose(ours, row, atol=1e-3)
    assert not np.allclose(logprobs(capsys, monkeypatch, source)[0], expected[0], atol=0.1)


def test_an_adapter_that_peft_saved_is_read_beside_its_base(tmp_path, capsys, monkeypatch):
    source = checkpoints.policy(tmp_path / "source")
    base = transformers.AutoModelForCausalLM.from_pretrained(source)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = random_adapter(peft.get_peft_model(base, config))
    model.save_pretrained(tmp_path / "adapter")
    expected = their_logprobs(model, transformers.AutoTokenizer.from_pretrained(source))
    for ours, row in zip(logprobs(capsys, monkeypatch, tmp_path / "adapter"), expected, strict=True):
        np.testing.assert_allclose(ours, row, atol=1e-3)


def random_adapter(model):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def test_reward_models_as_adapters_of_language_models(tmp_path, capsys):
    """Out, as PEFT reads it, and in again what PEFT writes of the same model."""
    source = checkpoints.policy(tmp_path / "source")
    start = load_checkpoint(str(source))
    assert isinstance(start, Policy)
    judge = adapted(as_reward_model(start, jax.random.key(1)))
    write_stage(tmp_path / "run" / "judge", judge, Base(str(source), is_stage=False))
    out = tmp_path / "out"
    succeeds(capsys, "export", f"--workdir={tmp_path / 'run'}", "--stage=judge", f"--out={out}", "--adapter")
    pad = judge.tokenizer.pad_id
    model = peft.AutoPeftModelForSequenceClassification.from_pretrained(out, num_labels=1, pad_token_id=pad).eval()
    ids = np.random.default_rng(0).integers(5, 300, (3, 9)).astype(np.int32)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(ids, dtype=torch.long)).logits[:, 0].numpy()
    model.save_pretrained(tmp_path / "theirs")
    everything = np.ones((3, 4), bool), np.ones((3, 5), bool)
    rollout = Rollout(ids[:, :4], everything[0], ids[:, 4:], everything[1])
    for directory in (out, tmp_path / "theirs"):
        back = load_checkpoint(str(directory))
        assert isinstance(back, RewardModel)
        np.testing.assert_allclose(jax.jit(back.network.scores)(back.params, joined(rollout)), expected, atol=2e-4)
