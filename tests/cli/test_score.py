"""`rlhf-jax score`: the scores of `rlhf_jax.score`, whatever the batch, and rows that cannot be scored."""

import json

import numpy as np
import pytest

import rlhf_jax
from rlhf_jax.reports.run import Run
from tests.support import checkpoints, workdirs
from tests.support.commands import fails, jsonl, reads, succeeds
from tests.support.own_data import ROOT

ROWS = [
    {"prompt": "The film", "completion": " was good.", "word": "good"},
    {
        "prompt": [{"role": "user", "content": "is it?"}],
        "completion": [{"role": "assistant", "content": "yes"}],
        "id": 7,
    },
    {"prompt": "It", "completion": " is the best of films, and the worst.", "word": "film", "more": [1, None]},
]
REWARD = f"{ROOT}/examples/reward.py"


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return checkpoints.reward_model(tmp_path_factory.mktemp("checkpoint") / "judge")


def scored(capsys, monkeypatch, rows, *flags):
    reads(monkeypatch, jsonl(rows))
    return [json.loads(line) for line in succeeds(capsys, "score", *flags).splitlines()]


def test_scores_are_those_of_the_function_whatever_the_batch(judge, capsys, monkeypatch):
    expected = rlhf_jax.score(rlhf_jax.load_reward_model(judge), ROWS)["score"]
    assert len(set(expected)) == len(ROWS)
    for flags in ([], ["--batch-size=2"]):
        found = scored(capsys, monkeypatch, ROWS, f"--reward-model={judge}", *flags)
        np.testing.assert_allclose([row.pop("score") for row in found], expected, atol=1e-6)
        assert found == ROWS, "other columns are kept"


def test_python_rewards_see_the_columns_of_their_row(capsys, monkeypatch):
    found = scored(capsys, monkeypatch, ROWS, f"--reward={REWARD}:brevity")
    assert [row["score"] for row in found] == pytest.approx([-0.2, -0.1, -0.8])
    flags = [f"--reward={REWARD}:brevity", f"--reward={REWARD}:keyword", "--reward-weights=10,3"]
    found = scored(capsys, monkeypatch, [ROWS[0], ROWS[2] | {"word": None}], *flags)
    assert [row["score"] for row in found] == pytest.approx([-2 + 3, -8])


def test_the_reward_model_of_a_stage(tmp_path, capsys, monkeypatch):
    workdirs.write_models(tmp_path)
    rows = [ROWS[0], ROWS[2]]
    found = scored(capsys, monkeypatch, rows, f"--workdir={tmp_path}", "--reward-stage=reward_model")
    expected = rlhf_jax.score(Run(tmp_path).load_reward_model("reward_model"), rows)["score"]
    np.testing.assert_allclose([row["score"] for row in found], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("flags", "rows", "words"),
    [
        ([], ROWS, "no reward given: use --reward-model=DIR"),
        (["--batch-size=0"], ROWS, "--batch-size=0 must be at least 1"),
        (
            [f"--reward={REWARD}:brevity", "--batch-size=1"],
            [ROWS[0], {"prompt": "x"}],
            "row 2 has no column completion",
        ),
        ([f"--reward={REWARD}:keyword"], [ROWS[1]], "needs word, but only"),
    ],
)
def test_rows_that_cannot_be_scored(flags, rows, words, capsys, monkeypatch):
    reads(monkeypatch, jsonl(rows))
    assert words in fails(capsys, "score", *flags)


def test_no_rows_have_no_scores(judge):
    assert rlhf_jax.score(rlhf_jax.load_reward_model(judge), [])["score"].tolist() == []
