"""Rewards in Python where a verb takes a reward: one function or several, with weights, of answers and columns."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.commands import best_of_n, fails, jsonl, reads, said

FUNCTIONS = """
def vowels(prompts, completions, completion_ids, wanted):
    assert len(set(map(str, prompts))) == 1 and len(completions) == len(completion_ids) == 3
    said = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    return [None if w is None else sum(c in w for c in text) for text, w in zip(said, wanted)]

def shortness(completions, **columns):
    assert set(columns) <= {"wanted", "id", "completion_ids", "prompts"}, columns
    return [-len(c if isinstance(c, str) else c[0]["content"]) for c in completions]

def silent(completions):
    return [None] * len(completions)
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "mine.py"
    path.write_text(FUNCTIONS)
    return path


def test_rewards_may_be_python_of_answers_and_columns(models, mine, tmp_path, capsys, monkeypatch):
    rows: list[dict[str, Any]] = [
        {"prompt": "The film", "wanted": "aeiou"},
        {"prompt": [{"role": "user", "content": "is it good?"}], "wanted": None, "id": 2},
    ]
    flags = [models[0], *models[2:], f"--reward={mine}:vowels", f"--reward={mine}:shortness"]
    plain, weighted = (
        best_of_n(capsys, monkeypatch, rows, *flags, *more)
        for more in ([], ["--reward-weights=2,0.5", "--batch-size=1"])
    )
    for found, (vowels, short) in ((plain, (1, 1)), (weighted, (2, 0.5))):
        for asked, row in zip(rows, found, strict=True):
            answers = [said(answer) for answer in row["completions"]]
            wanted = asked["wanted"] or ""  # of the second row the first function says nothing
            expected = [vowels * sum(c in wanted for c in text) - short * len(text) for text in answers]
            assert row["scores"] == expected
            assert row["completion"] == row["completions"][int(np.argmax(expected))]
    assert [row["completions"] for row in plain] == [row["completions"] for row in weighted]

    out = f"--out={tmp_path / 'best.jsonl'}"
    best_of_n(capsys, monkeypatch, rows, *flags, out)
    reads(monkeypatch, jsonl(rows))
    assert "was made with other settings: reward_weights was None" in fails(
        capsys, "best-of-n", *flags, out, "--reward-weights=1,1"
    )
    mine.write_text(FUNCTIONS + "\n# changed")
    reads(monkeypatch, jsonl(rows))
    assert "was made with other settings: reward was [" in fails(capsys, "best-of-n", *flags, out)

    reads(monkeypatch, jsonl([rows[0], {"prompt": "x"}]))
    assert "row 2 of the data: reward function" in (told := fails(capsys, "best-of-n", *flags))
    assert "vowels needs wanted, but only prompts, completions, completion_ids" in told
    reads(monkeypatch, jsonl([rows[0], rows[1]]))
    assert "row 1 of the data: no reward applies to the completion" in fails(
        capsys, "best-of-n", models[0], *models[2:], f"--reward={mine}:silent"
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--reward-model=x", "--reward=mine.py:f"], "--reward-model and --reward name 2 rewards: keep one"),
        (["--reward-stage=x", "--reward=mine.py:f"], "--reward-stage and --reward name 2 rewards"),
        (["--reward=mine.py"], "'mine.py' names no reward function: write package.module:function"),
        (["--reward=nowhere.py:f"], "nowhere.py:f cannot be loaded: FileNotFoundError"),
        (
            ["--reward=mine.py:f", "--reward-weights=1,2"],
            "--reward-weights = (1.0, 2.0) must have one weight for each of 1",
        ),
        (["--reward=mine.py:f", "--reward-weights=nan"], "--reward-weights = (nan,) must be finite numbers"),
        (["--reward=mine.py:f", "--reward-weights=1;2"], "'1;2' should be comma-separated numbers"),
        (["--reward-weights=1", "--reward-model=x"], "--reward-weights are only used with --reward"),
    ],
)
def test_rewards_that_cannot_be(models, flags, words, capsys, monkeypatch):
    reads(monkeypatch, "")
    assert words in fails(capsys, "best-of-n", models[0], *flags)
