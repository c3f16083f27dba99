"""Summary of the data that is printed and written before a stage works."""

import dataclasses
import io
import json
from typing import Any

import pytest
from rich.console import Console

from rlhf_jax.data import pipeline
from rlhf_jax.loading.context import Context
from rlhf_jax.loading.data_report import report_answers, report_prompts, unseen
from rlhf_jax.runtime.progress import Display
from rlhf_jax.runtime.workdir import Workdir
from rlhf_jax.text.tokenizer import TokenizerConfig, train_tokenizer
from tests.support import experiments, tiny

WORDS = ("the", "film", "is", "good", "bad", "dull", "old")
TOKENIZER = train_tokenizer(TokenizerConfig("word", 32), [" ".join(WORDS)])


def pairs(numbers, **further):
    """Pairs with a prompt of their own each."""
    words = [" ".join(WORDS[digit] for digit in divmod(number, len(WORDS))) for number in numbers]
    return [{"prompt": prompt, "chosen": " is good", "rejected": " is bad", **further} for prompt in words]


class Stages:
    """Stages of an experiment, which report on their data one after the other."""

    def __init__(self, root, splits, **data):
        root.mkdir()
        for name, rows in splits.items():
            (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources: dict[str, Any] = {name: str(root / f"{name}.jsonl") for name in splits}
        self._root, self._output = root, io.StringIO()
        self.data = dataclasses.replace(experiments.data_config(""), **sources, **data)

    def report(self, stage, function, *arguments):
        """Return the printed lines of a stage and its file."""
        display, place = Display(Console(file=self._output, width=80)), Workdir(self._root)
        place.directory(stage).mkdir()
        start = self._output.tell()
        with display.bar(stage) as bar:
            context = Context(place, ("sft", "dpo", "ppo"), stage, 0, 1, self.data, tiny.ONE_DEVICE, bar)
            function(context, TOKENIZER, *arguments)
        *lines, _ = self._output.getvalue()[start:].splitlines()
        return [line.rstrip() for line in lines], json.loads((place.directory(stage) / "data.json").read_text())

    def answers(self, stage):
        rows = {split: pipeline.load_rows(self.data, split) for split in ("train", "eval")}
        return self.report(stage, report_answers, rows, None)

    def prompts(self, stage):
        return self.report(stage, report_prompts, {"train": pipeline.load_rows(self.data, "train")})


def test_every_split_is_described_and_the_test_split_is_compared_with_training(tmp_path):
    splits = {"train": pairs(range(40), id=7), "eval": pairs([40, 41, 41], id=8), "test": pairs([3, *range(42, 48)])}
    lines, written = Stages(tmp_path / "run", splits).answers("sft")
    assert lines[0] == "sft: data, with lengths in tokens"
    assert max(map(len, lines)) <= 80
    said = " ".join(lines)
    assert "train, eval: columns prompt, chosen, rejected; further columns: id." in said
    assert "test: columns prompt, chosen, rejected." in said
    assert "Warning: eval: 1 of 3 rows repeat an earlier row." in said
    assert "Warning: test: 1 of 7 rows have the same prompt as a row of train: results on test" in said
    described = written["splits"]
    assert [described[split]["rows"] for split in ("train", "eval", "test")] == [40, 3, 7]
    assert [described[split]["repeated"] for split in ("train", "eval", "test")] == [0, 1, 0]
    assert "shared" not in described["train"] and described["eval"]["shared"] == 0
    assert [row["column"] for row in described["test"]["lengths"]] == ["prompt"]


def test_few_repetitions_are_a_note_and_many_a_warning(tmp_path):
    few = {"train": pairs([*range(40), 0]), "eval": pairs(range(41, 45))}
    _, written = Stages(tmp_path / "few", few).answers("sft")
    assert "train: 1 of 41 rows repeat an earlier row." in written["notes"] and not written["warnings"]
    many = {"train": pairs([*range(10), 0]), "eval": pairs(range(41, 45))}
    _, written = Stages(tmp_path / "many", many).answers("sft")
    assert written["warnings"] == ["train: 1 of 11 rows repeat an earlier row."]


def test_evaluation_rows_that_are_the_test_rows_are_mentioned(tmp_path):
    rows = {"train": pairs(range(40)), "eval": pairs(range(41, 45))}
    note = "eval: these rows are the test split too (data.test)"
    for name, further, mentioned in (
        ("none", {}, True),
        ("same", {"test": rows["eval"]}, True),
        ("other", {"test": pairs(range(45, 48))}, False),
    ):
        _, written = Stages(tmp_path / name, rows | further).answers("sft")
        assert any(each.startswith(note) for each in written["notes"]) == mentioned, name


def test_rows_beyond_the_limit_are_mentioned(tmp_path):
    splits = {"train": pairs(range(40)), "eval": pairs(range(41, 45))}
    _, written = Stages(tmp_path / "run", splits, limit=8).answers("sft")
    assert written["splits"]["train"]["rows"] == 8
    assert "train: the first 8 of 40 rows are used (data.limit)." in written["notes"]
    assert not any(note.startswith("eval: the first") for note in written["notes"])


def test_texts_without_a_prompt_are_mentioned(tmp_path):
    texts = [{"text": text} for text in ("good", "the film is bad", "nobody knows it", "the film is good")]
    _, written = Stages(tmp_path / "run", {"train": texts, "eval": texts}).prompts("ppo")
    share = "train: 50.0% of the texts give no prompt, because they are too short for text_prompt_tokens or start with"
    assert f"{share} unknown words." in written["notes"]


def test_a_stage_prints_only_what_no_earlier_stage_printed(tmp_path):
    run = Stages(tmp_path / "run", {"train": pairs(range(40)), "eval": pairs([1, 41])}, max_response_tokens=2)
    lines, first = run.answers("sft")
    assert "Warning: data.max_response_tokens cuts 100% of chosen (train)" in " ".join(lines)
    lines, second = run.answers("dpo")
    assert lines == [] and second == first
    lines, third = run.prompts("ppo")
    assert lines == [] and third["splits"]["train"]["lengths"] == first["splits"]["train"]["lengths"][:1]


@pytest.mark.parametrize("changed", ["lengths", "notes"])
def test_what_is_new_in_a_report_is_found(changed):
    def report(length, note):
        return {"splits": {"train": {"lengths": [{"longest": length}]}}, "notes": [note], "warnings": []}

    new = unseen(report(3 if changed == "lengths" else 2, "b" if changed == "notes" else "a"), [report(2, "a")])
    assert bool(new["splits"]) == (changed == "lengths") and bool(new["notes"]) == (changed == "notes")
