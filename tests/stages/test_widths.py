"""Online stages in two programs, at the widths of each batch: what they write, how they resume, and the field."""

import dataclasses
import io

import numpy as np
import pytest

from rlhf_jax.types import RlhfError
from tests.support import experiments

SECTION = {
    "kind": "group_rl",
    "method": "rloo",
    "kl_coef": 0.05,
    "num_generations": 2,
    "iterations": 4,
    "batch_size": 8,
    "minibatches": 2,
    "epochs": 1,
    "temperature": 1.0,
    "optimizer": experiments.OPTIMIZER,
    "samples_every": 1,
    "samples_written": 4,
    "loop": {"steps_per_call": 2, "checkpoint_every": 2},
}


@pytest.mark.nightly
def test_a_stage_at_the_widths_of_its_batches_learns_the_same_and_resumes(tmp_path):
    policy, judge = experiments.models(tmp_path)
    questions = experiments.questions(tmp_path / "questions.jsonl", 24)
    data = dataclasses.replace(experiments.data_config(questions), max_response_tokens=72)
    places, printed = [], []
    for trims in (True, False):
        section, console = {**SECTION, "policy": policy, "reward_model": judge, "trim_padding": trims}, io.StringIO()
        place = experiments.run(tmp_path / f"trims {trims}", data, {"rloo": section}, console=console)
        places.append(place.root)
        printed.append(console.getvalue())
    said = "programs compiled: sampling for prompts of 24 tokens, learning for rows (responses) of"
    assert said in " ".join(printed[0].split()) and "programs compiled" not in printed[1]
    trimmed, full = (experiments.rows(place / "rloo/metrics.jsonl") for place in places)
    for row, other in zip(trimmed, full, strict=True):
        assert row["token_share"] > 1.3 * other["token_share"]
        for name in ("loss", "objective/scores", "objective/kl", "grad_norm", "completions/max_length", "num_tokens"):
            np.testing.assert_allclose(row[name], other[name], rtol=1e-3, atol=1e-5, err_msg=name)
    texts = [[row["completion"] for row in experiments.rows(place / "rloo/samples.jsonl")] for place in places]
    assert texts[0] == texts[1]
    section = {**SECTION, "policy": policy, "reward_model": judge, "trim_padding": True}
    experiments.assert_resumes(places[0], data, {"rloo": section})


def test_too_few_slots_for_the_responses_to_a_prompt_are_refused(tmp_path):
    section = {**SECTION, "policy": str(tmp_path), "reward_model": str(tmp_path), "slots": 1}
    with pytest.raises(RlhfError, match=r"config\.rloo: slots = 1 must be at least 2, the responses to a prompt"):
        experiments.run(tmp_path / "run", tmp_path / "none.jsonl", {"rloo": section})
