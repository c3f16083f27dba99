"""The benchmark of training beside TRL: both sides train on the same tokens, in turns."""

import sys
from pathlib import Path

import pytest

from experiments.benchmarks import training
from tests.parity import trl_1_12

PAIRS = Path(__file__).parents[2] / "experiments/smoke/pairs_train.jsonl"
FLAGS = ["--batch=4", "--group=2", "--rows=8", "--prompt=24", "--response=8", "--rounds=1", "--peer=trl"]
SIDES = {kind: ["ours", "trl", *["trl, grouped"] * (kind in training.GROUPED)] for kind in training.PASSES}


@pytest.mark.nightly
@pytest.mark.parametrize("kind", SIDES)
def test_both_sides_train_on_the_same_tokens(kind):
    python = trl_1_12.python() if kind == "ppo" else sys.executable
    rows = training.main([*FLAGS, f"--kind={kind}", f"--data={PAIRS}", f"--peer-python={python}"])
    assert [row["side"] for row in rows] == SIDES[kind]
    version = trl_1_12.VERSION if kind == "ppo" else "1.16.0"
    assert [row["packages"].get("trl") for row in rows] == [None, *[version] * (len(rows) - 1)]
    if kind in training.ONLINE:  # each side samples its own responses, of up to 8 tokens
        responses = rows[0]["batch"] * rows[0]["steps"]
        assert all(responses <= row["tokens"] <= 8 * responses for row in rows)
    else:
        assert len({row["tokens"] for row in rows}) == 1
    for row in rows:
        speed = row["tokens"] / row["seconds"]
        assert row["ratio"] == pytest.approx(rows[0]["tokens_per_second"] / speed)
        assert row["utilisation"] == pytest.approx(row["flops"] / row["seconds"] / row["matrix_flops_per_second"])
