"""Published solutions of GSM8K: their final numbers, and the table of which are right."""

import json
import runpy
from pathlib import Path

import pytest

from rlhf_jax.data import fetch
from rlhf_jax.papers import suite
from rlhf_jax.types import RlhfError

FILE = suite.papers_directory() / "cobbe_2021" / "paper.py"


@pytest.fixture(scope="module")
def paper() -> dict:
    return runpy.run_path(str(FILE))


@pytest.mark.parametrize(
    ("solution", "number"),
    [
        ("3 * 4 = <<3*4=12>>12\nA: 12", 12.0),
        ("A: 90,000", 90000.0),
        ("A: 3.0 ", 3.0),
        ("A: -.5", -0.5),
        ("A: 12 apples", None),
        ("He has 12", None),
        ("A: 3\nShe has 4", None),
    ],
)
def test_the_final_number(paper: dict, solution: str, number: float | None):
    assert paper["final_number"](solution) == number


def test_flags_and_numbers_of_each_problem(paper: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RLHF_JAX_DATA", str(tmp_path))
    place = fetch.location("gsm8k_solutions")
    place.mkdir(parents=True)
    right, wrong = {"is_correct": True, "solution": "A: 1,000"}, {"is_correct": False, "solution": "A: 7"}
    mislabelled = {"is_correct": True, "solution": "A: 7"}
    rows = [
        dict(zip(paper["SYSTEMS"], (wrong, right, wrong, right), strict=True)) | {"ground_truth": "A: 1000"},
        dict(zip(paper["SYSTEMS"], (right, right, wrong, mislabelled), strict=True)) | {"ground_truth": "A: 1000.0"},
    ]
    (place / "solutions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = paper["measure"]("cpu", [0], tmp_path)
    assert table["6b_verification"].tolist() == [1, 1]
    assert paper["points"](table, "6b_verification", "6b_finetuning").tolist() == [100.0, 0.0]
    assert paper["agreement"](table).tolist() == [7 / 8]
    with pytest.raises(RlhfError, match="give --seeds=1"):
        paper["measure"]("cpu", [0, 1], tmp_path)
