# torch and transformers are in .venv-parity only, where types are not checked.
# pyrefly: ignore-errors[missing-import]
"""What `rlhf-jax export` writes, as transformers loads it: without a word, and with the same answers."""

from typing import Any

import pytest
import torch
import transformers

from tests import checkpoints
from tests.text import checkpoints as tokenizers
from tests.verbs.commands import succeeds

NEW = 30


@pytest.mark.parametrize("tokenizer", [tokenizers.chatml, tokenizers.gemma])
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
