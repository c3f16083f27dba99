"""`rlhf-jax logprobs`: the numbers of `response_stats`, whatever the batch, and rows that cannot be."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.core.sequences import joined
from rlhf_jax.loading.models import Policy
from rlhf_jax.loading.pretrained import load_checkpoint
from rlhf_jax.main import main
from rlhf_jax.types import Rollout
from tests.support import checkpoints, tokenizer_files
from tests.support.commands import fails, reads, succeeds
from tests.support.compilations import compilations

ROOT = Path(__file__).parents[2]
TEXTS = [
    {"prompt": "The film", "completion": " was good.", "id": 7},
    {"prompt": "", "completion": "It is the best of films, it is the worst of films."},
    {"prompt": "A question, and a long one:", "completion": "", "more": {"kept": [1, None]}},
]
CHATS = [
    {"prompt": [{"role": "user", "content": f"is it {word}?", "name": None}],
     "completion": [{"role": "assistant", "content": word}]}
    for word in ("good", "the best film, é日")
]  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return checkpoints.policy(tmp_path_factory.mktemp("checkpoint") / "policy")


def jsonl(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def expected(directory, row, eos: bool) -> list[float]:
    """From the definition: the prompt's tokens, the completion's, and what ends it."""
    policy = load_checkpoint(str(directory))
    assert isinstance(policy, Policy)
    tokenizer = policy.tokenizer
    if isinstance(row["prompt"], str):
        prompt, response = tokenizer.encode(row["prompt"]), tokenizer.encode(row["completion"])
        response.append(tokenizer.eos_id)
        prompt = prompt or [tokenizer.start_id]
    else:
        answer = row["completion"][0]["content"]
        question = [{"role": "user", "content": row["prompt"][0]["content"]}]
        prompt = tokenizer.encode(tokenizer.render(question, add_generation_prompt=True))
        response = tokenizer.encode(f"{answer}<|im_end|>")
    arrays = [jnp.array([ids], jnp.int32) for ids in (prompt, response)]
    rollout = Rollout(arrays[0], arrays[0] >= 0, arrays[1], arrays[1] >= 0)
    stats = jax.jit(functools.partial(policy.network.response_stats, temperature=1.0))(policy.params, joined(rollout))
    logprobs = stats.logprobs[0].tolist()
    return logprobs if eos else logprobs[:-1]


@pytest.mark.nightly_rest
@pytest.mark.parametrize("eos", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_numbers_are_those_of_the_policy(directory, eos, batch_size, capsys, monkeypatch):
    rows = [TEXTS[0], CHATS[0], TEXTS[1], CHATS[1], TEXTS[2]]
    reads(monkeypatch, jsonl(rows))
    flags = [f"--batch-size={batch_size}", *([] if eos else ["--no-eos"])]
    written = [json.loads(line) for line in succeeds(capsys, "logprobs", f"--model={directory}", *flags).splitlines()]
    assert len(written) == len(rows)
    for row, found in zip(rows, written, strict=True):
        tokens, total = found.pop("token_logprobs"), found.pop("logprob")
        assert found == row  # every column as it was
        np.testing.assert_allclose(tokens, expected(directory, row, eos), atol=1e-4)
        assert total == pytest.approx(sum(tokens))
        assert total <= 0


def test_bfloat16_is_near_and_not_the_same(directory, capsys, monkeypatch):
    found = []
    for flags in ([], ["--dtype=bfloat16"]):
        reads(monkeypatch, jsonl(TEXTS[:1]))
        (line,) = succeeds(capsys, "logprobs", f"--model={directory}", *flags).splitlines()
        found.append(json.loads(line)["token_logprobs"])
    assert 1e-3 < np.abs(np.subtract(*found)).max() < 1


@pytest.mark.nightly
def test_mixed_lengths_compile_a_handful_of_programs(directory, capsys, monkeypatch):
    rows = [{"prompt": "x" * (1 + 7 * i % 90), "completion": "y" * (1 + 11 * i % 90)} for i in range(40)]
    reads(monkeypatch, jsonl(rows))
    with compilations() as compiled:
        succeeds(capsys, "logprobs", f"--model={directory}", "--batch-size=3")
    assert 0 < compiled["logprobs_of"] <= 9  # 32 to 192 tokens, and their halves for completions


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "row 3 is not JSON"),
        (b"\xff", "row 3 is not JSON"),
        ("[1]", "row 3 is not a JSON object"),
        ('{"prompt": "x"}', "row 3 has no column completion (it has prompt)"),
        ('{"prompt": "x", "completion": 3}', "row 3, column completion is of type int, not text"),
        ('{"prompt": "x", "completion": [{"role": "assistant", "content": "y"}]}', "row 3, column completion"),
        ('{"prompt": [{"role": "user"}], "completion": []}', "row 3, column prompt, message 1 has no content"),
        (jsonl([{"prompt": "word " * 100, "completion": "word " * 100}]), "tokens, but the model's context is 256"),
    ],
)
def test_a_bad_row_is_named_by_its_number(directory, line, words, capsys, monkeypatch):
    good = jsonl(TEXTS[:1]).encode()
    reads(monkeypatch, good + b"\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n" + good)
    assert words in fails(capsys, "logprobs", f"--model={directory}")


def test_chats_need_a_template_and_batches_a_size(directory, tmp_path, capsys, monkeypatch):
    plain = checkpoints.policy(tmp_path / "gpt2", tokenizer_files.gpt2)
    reads(monkeypatch, jsonl([TEXTS[0], CHATS[0]]))
    message = fails(capsys, "logprobs", f"--model={plain}")
    assert "row 2" in message
    assert "no chat template" in message
    assert "--batch-size=0" in fails(capsys, "logprobs", f"--model={directory}", "--batch-size=0")


def test_completions_encoded_apart_are_counted(directory, capsys, monkeypatch):
    reads(monkeypatch, jsonl([TEXTS[0], {"prompt": "The fil", "completion": "m was good"}]))
    assert main(["logprobs", f"--model={directory}"]) == 0
    assert "1 completions (the first is row 2) were encoded separately from their prompts" in capsys.readouterr().err


@pytest.mark.nightly
def test_a_closed_pipe_ends_quietly(directory, tmp_path):
    (tmp_path / "rows.jsonl").write_text(jsonl(TEXTS[:1] * 3000))
    command = f"{sys.executable} -m rlhf_jax logprobs --model={directory} < {tmp_path}/rows.jsonl | head -n 2"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0
    assert done.stderr == ""
    assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == [7, 7]
