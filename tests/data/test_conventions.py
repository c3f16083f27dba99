"""Columns of well-known data sets, and columns that a config names, read as our own."""

import dataclasses
import json

import pytest

from rlhf_jax.config import build
from rlhf_jax.data import pipeline
from rlhf_jax.data.conventions import ALPACA, Columns, convention_of, converted
from rlhf_jax.data.splits import DataConfig, read_source
from rlhf_jax.types import RlhfError
from tests.support import experiments

OWN = Columns()
TURNS = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
CHAT = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a"},
]
PAIR = {"chosen": CHAT, "rejected": [*CHAT[:2], {"role": "assistant", "content": "b"}]}

EXAMPLES = {
    "ShareGPT": ({"id": 1, "conversations": TURNS}, {"id": 1, "messages": CHAT}),
    "ShareGPT, other names": ({"conversation": CHAT}, {"messages": CHAT}),
    "ShareGPT in messages": ({"messages": TURNS}, {"messages": CHAT}),
    "ShareGPT pairs": (
        {"conversations": TURNS[:2], "chosen": TURNS[2], "rejected": {"from": "gpt", "value": "b"}},
        {"prompt": CHAT[:2], "chosen": CHAT[2:], "rejected": PAIR["rejected"][2:]},
    ),
    "Alpaca": (
        {"instruction": "Add.", "input": "1 + 1", "output": "2"},
        {
            "prompt": "Below is an instruction that describes a task, paired with an input that provides further "
            "context. Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### "
            "Input:\n1 + 1\n\n### Response:\n",
            "completion": "2",
        },
    ),
    "Alpaca without input": (
        {"instruction": "Sing.", "output": "La", "text": "whole"},
        {"prompt": ALPACA.format(further="", instruction="Sing.", input=""), "completion": "La", "text": "whole"},
    ),
    "UltraFeedback": (
        {
            "source": "x",
            "instruction": "q",
            "completions": [
                {"response": "b", "overall_score": 2.5, "model": "m"},
                {"response": "a", "overall_score": 8},
            ],
        },
        {"source": "x", "prompt": "q", "completions": ["b", "a"], "scores": [2.5, 8]},
    ),
    "UltraFeedback, binarised": ({"prompt": "q", **PAIR, "score_chosen": 8.0}, {**PAIR, "score_chosen": 8.0}),
    "UltraChat": ({"prompt": "q", "prompt_id": "7", "messages": CHAT}, {"prompt_id": "7", "messages": CHAT}),
    "a text and answers of one message": (
        {"prompt": "q", "chosen": CHAT[2:], "rejected": PAIR["rejected"][2:]},
        {"prompt": [CHAT[1]], "chosen": CHAT[2:], "rejected": PAIR["rejected"][2:]},
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_rows_of_well_known_data_sets(name):
    row, expected = EXAMPLES[name]
    assert converted([row, row], OWN, "file") == [expected, expected]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        PAIR,
        {"prompt": CHAT[:2], "completion": CHAT[2:]},
        {"messages": CHAT},
        {"prompt": "q", "completions": ["a", "b"]},
        {"text": "a", "instruction": "not Alpaca"},
    ],
)
def test_our_own_columns_are_read_as_they_are(row):
    assert convention_of(row) is None and converted([row], OWN, "file") == [row]


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ("ShareGPT", {"conversations": [{"from": "nobody", "value": "x"}]}, "row 2, conversations, message 1 is from"),
        ("ShareGPT", {"text": "x"}, "row 2 has not the form of ShareGPT"),
        ("Alpaca", {"instruction": 3, "output": "x"}, "row 2: instruction, input and output must be texts"),
        ("UltraFeedback", {"instruction": "q", "completions": ["a"]}, "row 2, completions: each needs a response"),
    ],
)
def test_rows_of_another_form_are_named(first, second, words):
    with pytest.raises(RlhfError, match=words):
        converted([EXAMPLES[first][0], second], OWN, "file")


def test_a_config_names_columns():
    section = {"prompt": "question", "chosen": "better", "rejected": "worse"}
    columns = build(Columns, section, "config.data.columns")
    rows = [{"question": "q", "better": "a", "worse": "b", "prompt": "not this", "id": 3}]
    assert converted(rows, columns, "file") == [{"prompt": "q", "chosen": "a", "rejected": "b", "id": 3}]
    with pytest.raises(RlhfError, match=r"row 2 has no column worse, which data\.columns\.rejected names"):
        converted([*rows, {"question": "q", "better": "a"}], columns, "file")
    swapped = Columns(chosen="rejected", rejected="chosen")
    assert converted([{"prompt": "q", "chosen": "a", "rejected": "b"}], swapped, "file") == [
        {"prompt": "q", "chosen": "b", "rejected": "a"}
    ]
    assert converted([{"dialog": TURNS}], Columns(messages="dialog"), "file") == [{"messages": CHAT}]


def data(path, rows, **changes) -> DataConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return dataclasses.replace(experiments.data_config(str(path)), **changes)


def test_a_split_is_loaded_with_our_columns_and_its_source_names_theirs(tmp_path):
    rows = [{"question": "q", "better": " a", "worse": " b", "id": 3}] * 3
    config = data(tmp_path / "mapped.jsonl", rows, limit=2, columns=Columns("question", "better", "worse"))
    assert pipeline.load_rows(config, "train") == [{"prompt": "q", "chosen": " a", "rejected": " b", "id": 3}] * 2
    source = read_source(config, "train")
    assert (source.rows, source.columns, source.further) == (3, ["question", "better", "worse"], ["id"])
    assert source.convention is None

    config = data(tmp_path / "sharegpt.jsonl", [EXAMPLES["ShareGPT"][0]])
    assert pipeline.load_rows(config, "train") == [{"id": 1, "messages": CHAT}]
    source = read_source(config, "train")
    assert (source.columns, source.further, source.convention) == (["conversations"], ["id"], "ShareGPT")
    binarised = data(tmp_path / "binarised.jsonl", [EXAMPLES["UltraFeedback, binarised"][0]])
    (row,) = pipeline.load_rows(binarised, "train")
    assert row["prompt"] == CHAT[:2] and row["rejected"] == [{"role": "assistant", "content": "b"}]
    assert read_source(binarised, "train").further == ["prompt", "score_chosen"]


def test_own_names_leave_settings_as_they_were():
    config = experiments.data_config("x")
    assert "columns" not in config.settings and "limit" in config.settings
    assert dataclasses.replace(config, columns=Columns(prompt="q")).settings["columns"]["prompt"] == "q"
