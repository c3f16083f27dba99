"""`rlhf-jax best-of-n`: answers as `sample` draws them, the reward model's own scores, and runs that go on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from rlhf_jax.data.padding import pad_left, pad_right
from rlhf_jax.loading.models import Policy, RewardModel
from rlhf_jax.loading.pretrained import load_checkpoint
from rlhf_jax.main import main
from rlhf_jax.sampling.batches import score_all
from rlhf_jax.sampling.choice import Sampling
from rlhf_jax.sampling.stream import Stream
from rlhf_jax.types import Rollout
from tests.support import checkpoints, tokenizer_files
from tests.support.commands import best_of_n, fails, jsonl, reads, said, succeeds

ROOT = Path(__file__).parents[2]
ROWS: list[dict[str, Any]] = [
    {"prompt": "The film", "id": 7},
    {"prompt": [{"role": "user", "content": "is it good?", "name": None}], "more": {"kept": [1, None, "é日"]}},
    {"prompt": ""},
    {"prompt": "A question, and a rather long one, of which no one knows the answer:", "half": "\ud800"},
    {"prompt": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "x"}], "score_of": 1.5},
]
GAINED = ["completion", "score", "scores", "completions"]


def best(models, capsys, monkeypatch, *flags: str, rows=ROWS) -> list[dict[str, Any]]:
    return best_of_n(capsys, monkeypatch, rows, *models, *flags)


def loaded(models) -> tuple[Policy, RewardModel]:
    policy, judge = (load_checkpoint(flag.split("=")[1]) for flag in models[:2])
    assert isinstance(policy, Policy) and isinstance(judge, RewardModel)
    return policy, judge


def scored(judge: RewardModel, prompt: Any, completion: Any, *, ended: bool = False) -> float:
    """The score of the text, with what ends it if it has ended, by the reward model's own tokenizer and template."""
    tokenizer = judge.tokenizer
    if isinstance(prompt, str):
        before, whole, line = map(tokenizer.encode, (prompt, prompt + completion, "\n"))
        if whole[: len(before)] != before:  # they would share a token
            whole = before + tokenizer.encode("\n" + completion)[len(line) :]
        ids = [*tokenizer.begin(before), *whole[len(before) :], *[tokenizer.eos_id] * (ended or not completion)]
    else:
        messages = [{k: v for k, v in message.items() if v is not None} for message in prompt] + completion
        text = tokenizer.render(messages, add_generation_prompt=False)
        content = completion[0]["content"]
        ids = tokenizer.encode(text.removesuffix("\n") if ended else text[: text.rindex(content) + len(content)])
    rollout = Rollout(*pad_left([ids[:1]], 1), *pad_right([ids[1:]], 128))
    return float(score_all(judge.network, judge.params, rollout, 1)[0])


@pytest.mark.nightly
def test_rows_keep_their_columns_and_gain_the_best_of_what_sample_writes(models, capsys, monkeypatch):
    policy, judge = loaded(models)
    found = best(models, capsys, monkeypatch, "--seed=3")
    sampling = Sampling(6, 1.0, policy.tokenizer.stop_ids)
    stream = Stream(policy.network, policy.params)
    assert [list(row) for row in found] == [[*row, *GAINED] for row in ROWS]
    for i, (asked, row) in enumerate(zip(ROWS, found, strict=True)):
        assert asked.items() <= row.items()
        prompt = asked["prompt"]
        if isinstance(prompt, str):
            ids = policy.tokenizer.begin(policy.tokenizer.encode(prompt))
        else:
            ids = policy.tokenizer.encode(policy.tokenizer.render(prompt, add_generation_prompt=True))
            assert all(answer[0]["role"] == "assistant" and len(answer) == 1 for answer in row["completions"])
        drawn = [[*stream.respond(ids, jax.random.key(3), sampling, row=3 * i + j)] for j in range(3)]
        texts = [policy.tokenizer.decode_completion(ids, tokens).rstrip("\ufffd") for tokens in drawn]
        assert [said(answer) for answer in row["completions"]] == texts
        assert row["completion"] == row["completions"][int(np.argmax(row["scores"]))]
        assert row["score"] == max(row["scores"])
        expected = [
            scored(judge, prompt, answer, ended=tokens[-1] in sampling.stop_ids)
            for answer, tokens in zip(row["completions"], drawn, strict=True)
        ]
        np.testing.assert_allclose(row["scores"], expected, atol=2e-5)


@pytest.mark.nightly
def test_batches_change_nothing_and_seeds_do(models, capsys, monkeypatch):
    one, other = (best(models, capsys, monkeypatch, f"--batch-size={size}") for size in (5, 2))
    assert [row["completions"] for row in one] == [row["completions"] for row in other]
    np.testing.assert_allclose([row["scores"] for row in one], [row["scores"] for row in other], atol=2e-5)
    reseeded = best(models, capsys, monkeypatch, "--seed=1")
    assert all(a["completions"] != b["completions"] for a, b in zip(other, reseeded, strict=True))


@pytest.mark.nightly
def test_a_soft_choice_is_cold_the_best_and_hot_any(models, capsys, monkeypatch):
    rows = [{"prompt": "The film"}] * 24
    cold, hot = (
        best([*models[:2], "--max-new-tokens=2", "--n=2"], capsys, monkeypatch, f"--soft={soft}", rows=rows)
        for soft in (1e-9, 1e9)
    )
    assert all(row["score"] == max(row["scores"]) for row in cold)
    assert [row["scores"] for row in cold] == [row["scores"] for row in hot]
    places = [row["scores"].index(row["score"]) for row in hot]
    assert all(row["completion"] == row["completions"][place] for row, place in zip(hot, places, strict=True))
    assert 5 <= sum(places) <= 19


def test_a_reward_model_reads_texts_by_its_own_tokenizer_and_chats_by_its_own_template(
    models, tmp_path, capsys, monkeypatch
):
    judge = checkpoints.reward_model(tmp_path / "judge", tokenizer_files.llama2)
    found = best([models[0], f"--reward-model={judge}", *models[2:]], capsys, monkeypatch, rows=ROWS[:2])
    reward_model = load_checkpoint(str(judge))
    assert isinstance(reward_model, RewardModel)
    for asked, row in zip(ROWS[:2], found, strict=True):
        expected = [scored(reward_model, asked["prompt"], answer) for answer in row["completions"]]
        np.testing.assert_allclose(row["scores"], expected, atol=2e-5)
    plain = checkpoints.reward_model(tmp_path / "plain", tokenizer_files.gpt2)
    reads(monkeypatch, jsonl(ROWS[:2]))
    message = fails(capsys, "best-of-n", models[0], f"--reward-model={plain}", *models[2:])
    assert "row 2" in message
    assert "the reward model has no chat template" in message


@pytest.mark.nightly
def test_answers_end_at_stop_strings_and_where_the_context_does(models, tmp_path, capsys, monkeypatch):
    (row,) = best(models, capsys, monkeypatch, rows=ROWS[:1])
    stop = row["completions"][0][2:4]
    (cut,) = best(models, capsys, monkeypatch, f"--stop={stop}", "--stop=never said", rows=ROWS[:1])
    assert cut["completions"] == [text.split(stop)[0] for text in row["completions"]] != row["completions"]
    small = checkpoints.policy(tmp_path / "small", context=8)  # the same parameters
    prompts = [{"prompt": "x"}, {"prompt": "x y z "}]  # of 1 and of 6 tokens
    free, bound = (
        best([policy, *models[1:]], capsys, monkeypatch, rows=prompts) for policy in (models[0], f"--model={small}")
    )
    assert bound[0]["completions"] == free[0]["completions"]
    assert bound[1]["completions"] != free[1]["completions"]
    for text, whole in zip(bound[1]["completions"], free[1]["completions"], strict=True):
        assert whole.startswith(text)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "row 3 is not JSON"),
        ("[1]", "row 3 is not a JSON object"),
        ('{"text": "x"}', "row 3 has no column prompt (it has text)"),
        ('{"prompt": 3}', "row 3, column prompt is of type int, not text"),
        ('{"prompt": []}', "row 3, column prompt is an empty chat"),
        ('{"prompt": "x", "completion": "y"}', "row 3 already has a column completion, which would be overwritten"),
        (jsonl([{"prompt": "word " * 200}]), "row 3 of the data: the prompt has"),
    ],
)
def test_a_bad_row_is_named_by_its_number(models, line, words, capsys, monkeypatch):
    reads(monkeypatch, f"{jsonl(ROWS[:1])}\n{line}\n{jsonl(ROWS[:1])}")
    assert words in fails(capsys, "best-of-n", *models)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--n=0"], "--n = 0 must be at least 1"),
        (["--batch-size=0"], "--batch-size = 0 must be at least 1"),
        (["--soft=0"], "--soft = 0 must be above 0"),
        (["--soft=nan"], "--soft = nan must be above 0"),
        (["--temperature=0"], "--temperature = 0 gives the same answer 3 times"),
        (["--top-p=2"], "--top-p = 2.0 must be above 0 and at most 1"),
        (["--reward-stage=x"], "--reward-model and --reward-stage name 2 rewards"),
    ],
)
def test_flags_that_cannot_be(models, flags, words, capsys, monkeypatch):
    reads(monkeypatch, "")
    assert words in fails(capsys, "best-of-n", *models, *flags)


def test_without_a_reward_model_nothing_is_best(models, capsys, monkeypatch):
    reads(monkeypatch, "")
    assert "no reward given: use --reward-model=DIR, --workdir" in fails(capsys, "best-of-n", models[0])
    assert "is a language model" in fails(
        capsys, "best-of-n", models[0], models[0].replace("--model", "--reward-model")
    )
    assert best(models, capsys, monkeypatch, rows=[]) == []


@pytest.fixture
def whole(models, tmp_path, capsys, monkeypatch) -> bytes:
    best(models, capsys, monkeypatch, f"--out={tmp_path / 'whole.jsonl'}")
    return (tmp_path / "whole.jsonl").read_bytes()


def test_a_file_goes_on_after_its_last_whole_line(whole, models, tmp_path, capsys, monkeypatch):
    path = tmp_path / "whole.jsonl"
    assert [json.loads(line) for line in whole.splitlines()] == best(models, capsys, monkeypatch)
    ends = np.cumsum([len(line) for line in whole.splitlines(keepends=True)])
    for cut in (0, 1, ends[0], ends[1] - 1, ends[2] + 5, ends[3], len(whole) - 1, len(whole)):
        path.write_bytes(whole[:cut])
        assert best(models, capsys, monkeypatch, f"--out={path}") == []
        assert path.read_bytes() == whole


def test_other_flags_do_not_go_on_with_it(whole, models, tmp_path, capsys, monkeypatch):
    for flag in ("--seed=1", "--n=2", "--soft=1", "--batch-size=3", "--temperature=0.5", "--stop=x"):
        reads(monkeypatch, jsonl(ROWS))
        name = flag.removeprefix("--").split("=")[0].replace("-", "_")
        message = fails(capsys, "best-of-n", *models, f"--out={tmp_path / 'whole.jsonl'}", flag)
        assert f"was made with other settings: {name} " in message
        assert (tmp_path / "whole.jsonl").read_bytes() == whole


def test_other_models_and_other_rows_do_not_go_on_with_it(whole, models, tmp_path, capsys, monkeypatch):
    path = tmp_path / "whole.jsonl"
    flags = [*models, f"--out={path}"]
    for rows, words in (
        ([*ROWS[:3], {"prompt": "another"}], "made from another input: row 4 differs"),
        (ROWS[:3], "holds 5 rows, and the input only 3"),
    ):
        reads(monkeypatch, jsonl(rows))
        assert words in fails(capsys, "best-of-n", *flags)
    other = checkpoints.policy(tmp_path / "other", context=128)
    assert "was made with other settings: model was '" in fails(capsys, "best-of-n", f"--model={other}", *flags[1:])
    (tmp_path / "whole.jsonl.settings.json").unlink()
    assert "with its settings does not" in fails(capsys, "best-of-n", *flags)
    assert path.read_bytes() == whole
    path.write_bytes(b"")  # as mktemp leaves it
    reads(monkeypatch, jsonl(ROWS))
    succeeds(capsys, "best-of-n", *flags)
    assert path.read_bytes() == whole
    path.write_bytes(b"\0\0\n" + whole)
    reads(monkeypatch, jsonl(ROWS))
    assert "is damaged at row 1" in fails(capsys, "best-of-n", *flags)


@pytest.mark.nightly
def test_a_process_that_is_killed_goes_on(models, tmp_path, capsys, monkeypatch):
    rows = [row | {"id": number} for number in range(40) for row in ROWS[:2]]
    (tmp_path / "rows.jsonl").write_text(jsonl(rows))
    path = tmp_path / "killed.jsonl"
    with (tmp_path / "rows.jsonl").open() as given:
        process = subprocess.Popen(
            [sys.executable, "-m", "rlhf_jax", "best-of-n", *models, f"--out={path}"],
            stdin=given,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    while not path.exists() or path.read_bytes().count(b"\n") < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 3 <= path.read_bytes().count(b"\n") < len(rows)
    assert best(models, capsys, monkeypatch, f"--out={path}", rows=rows) == []
    assert best(models, capsys, monkeypatch, f"--out={tmp_path / 'whole.jsonl'}", rows=rows) == []
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_closed_pipe_ends_quietly(models, capsys, monkeypatch):
    reads(monkeypatch, jsonl(ROWS))
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["best-of-n", *models]) == 0
        monkeypatch.undo()
    assert capsys.readouterr().err == ""


def test_a_file_that_cannot_be_is_one_message(models, tmp_path, capsys, monkeypatch):
    reads(monkeypatch, jsonl(ROWS))
    assert "No such file" in fails(capsys, "best-of-n", *models, f"--out={tmp_path / 'nothing' / 'best.jsonl'}")
