"""Arithmetic: from generated problems to a verifier, Best-of-N and GRPO, all judged by the exact answer."""

import pytest

import rlhf_jax
from rlhf_jax.data import formats
from rlhf_jax.runtime.files import read_rows


@pytest.mark.nightly
def test_the_smoke_variant_learns_to_answer(tmp_path):
    config = rlhf_jax.load_config("arithmetic:smoke")
    run = rlhf_jax.run(config, tmp_path / "run")
    answers = {row["prompt"]: row["answer"] for row in formats.read_table(config.data.test)}
    samples = read_rows(run.directory("evaluate") / "samples.jsonl")
    assert {row["method"] for row in samples} == {"sft", "best_of_4", "grpo"}
    for row in samples:
        assert row["gold"] == float(row["completion"].split("\n")[-1] == f"#### {answers[row['prompt']]}")
    pairs = run.pairs("pairs")
    assert set(pairs["chosen_score"]) == {1.0} and set(pairs["rejected_score"]) == {0.0}
    curve = run.best_of_n_curve("best_of_n")
    assert curve["gold"].min() >= 0 and curve["gold"].max() <= 1
    scores = run.metrics("grpo")["objective/scores"]
    assert scores.between(0, 1).all() and scores.max() > 0
