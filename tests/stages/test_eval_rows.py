"""Evaluations during training read a stated number of held-out rows."""

import json

import pytest

from rlhf_jax.loading.tables import evaluation_rows
from tests.support import experiments

ROWS = [{"prompt": str(number)} for number in range(50)]


def test_the_rows_are_the_same_every_time_in_their_order_and_from_everywhere():
    drawn = evaluation_rows(ROWS, 10)
    assert drawn == evaluation_rows(ROWS, 10) == sorted(drawn, key=ROWS.index)
    assert len({row["prompt"] for row in drawn}) == 10 and drawn not in (ROWS[:10], ROWS[-10:])


def test_few_rows_are_all_read():
    assert evaluation_rows(ROWS, 50) == evaluation_rows(ROWS, None) == ROWS


@pytest.mark.nightly
def test_a_stage_evaluates_on_the_number_of_its_config(tmp_path):
    policy, _ = experiments.models(tmp_path)
    pairs = experiments.preference_rows(tmp_path / "pairs.jsonl")
    losses = {}
    for count in (None, 7):
        section = experiments.dpo_section(policy, epochs=1.0, eval_every=3, eval_rows=count)
        stage = experiments.run(tmp_path / str(count), pairs, {"dpo": section}).find("dpo")
        assert json.loads((stage / "summary.json").read_text())["eval_pairs"] == (count or 24)
        losses[count] = experiments.rows(stage / "metrics.jsonl")[-1]["eval/loss"]
    assert losses[None] != losses[7]
