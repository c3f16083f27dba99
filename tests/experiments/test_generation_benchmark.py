"""The benchmark of sampling: its rows are complete, and its numbers agree with each other."""

import json
import runpy
import types
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "experiments/benchmarks/generation.py"
FLAGS = ["--shape=tiny", "--prompt=8", "--repeats=2", "--dtype=float32"]


@pytest.fixture(scope="module")
def benchmark():
    return types.SimpleNamespace(**runpy.run_path(str(FILE)))


@pytest.mark.nightly
def test_rows_of_one_length(benchmark, tmp_path):
    out = tmp_path / "rows.jsonl"
    rows = benchmark.main([*FLAGS, "--new=16", f"--out={out}", "--batch", "2", "4"])
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows
    for row, batch in zip(rows, (2, 4), strict=True):
        assert (row["kind"], row["shape"], row["batch"], row["dtype"]) == ("uniform", "tiny", batch, "float32")
        assert {"device", "jax", "date", "bandwidth_from"} <= row.keys()
        assert 0 < row["seconds_min"] <= row["seconds"]
        assert row["tokens_per_second"] == pytest.approx(batch * 16 / row["seconds"])
        steps = 15 * row["step_milliseconds"] / 1e3
        assert row["prefill_seconds"] + steps == pytest.approx(row["seconds"])
        assert row["roofline_ratio"] == pytest.approx(row["roofline_milliseconds"] / row["step_milliseconds"])
        read = row["roofline_milliseconds"] / 1e3 * row["bandwidth"]
        assert read == pytest.approx(row["weight_bytes"] + row["cache_bytes"])
    # By hand: embedding, two layers (q, o; k, v; three of the MLP; two norms), final norm; half of all tokens to come.
    weights = 4096 * 128 + 2 * (2 * 128**2 + 2 * 128 * 64 + 3 * 128 * 256 + 2 * 128) + 128
    assert rows[0]["weight_bytes"] == 4 * weights
    assert rows[0]["cache_bytes"] == 4 * 2 * (8 + 16 / 2) * 2 * 2 * 64


@pytest.mark.nightly
def test_rows_of_mixed_lengths(benchmark):
    flags = ["--mixed", "--longest=12", "--mean=3", "--queue=4", "--refill=1", "--batch=3"]
    (row,) = benchmark.main([*FLAGS, *flags])
    assert row["kind"] == "mixed" and row["prompts"] == 12
    tokens = row["mean_length"] * row["prompts"]
    assert row["tokens_per_second"] == pytest.approx(tokens / row["seconds"])
    assert row["padded_tokens_per_second"] == pytest.approx(tokens / row["padded_seconds"])
    assert row["steps"] >= (tokens - 12) / 3  # no step gives more than a token a slot, the first is the prefill's
    assert row["steps"] < row["padded_steps"] <= 4 * 11


def test_one_token_has_no_step(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark.main([*FLAGS, "--new=1", "--batch=2"])
    assert "--new must be at least 2" in capsys.readouterr().err
