"""gold: ratings that are no numbers are named by their row."""

import json

import pytest

from rlhf_jax.types import RlhfError
from tests.support import experiments

GOLD = {"gold": {"kind": "gold", "model": {"alpha": 1.0, "min_df": 1}, "rating": "rating"}}
ROWS = [{"text": f"{word} film", "rating": place} for place, word in enumerate(["bad", "dull", "good", "bright"])]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "three"])
def test_a_rating_that_is_no_number_is_named(value, tmp_path):
    data = tmp_path / "rated.jsonl"
    rows = [*ROWS[:2], ROWS[2] | {"rating": value}, ROWS[3]]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RlhfError) as caught:
        experiments.run(tmp_path / "run", data, GOLD)
    assert str(caught.value) == (f"{data}, row 3, column rating is {value!r}: give a finite number, or remove the row")


def test_ratings_of_a_csv_file_are_read_as_numbers(tmp_path):
    plain, csv = tmp_path / "rated.jsonl", tmp_path / "rated.csv"
    plain.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    csv.write_text("text,rating\n" + "".join(f"{row['text']},{row['rating']}\n" for row in ROWS))
    found = []
    for data in (plain, csv):
        place = experiments.run(tmp_path / data.suffix, data, GOLD).find("gold")
        found.append(json.loads((place / "summary.json").read_text())["correlation"])
    assert found[0] == found[1] > 0.5


def test_texts_without_a_word_of_vaders_have_no_correlation_with_it(tmp_path):
    data = tmp_path / "rated.jsonl"
    rows = [{"text": f"{word} 电影", "rating": place} for place, word in enumerate(["一", "二", "三", "四"])]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = experiments.run(tmp_path / "run", data, GOLD).find("gold")
    assert json.loads((place / "summary.json").read_text())["vader_correlation"] is None
