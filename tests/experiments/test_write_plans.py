"""docs/explanation/scale.md has the table of the committed plans."""

import json

from experiments.benchmarks import plans, write_plans


def test_the_page_has_the_table_of_the_plans():
    text = write_plans.PAGE.read_text(encoding="utf-8")
    assert write_plans.page(text) == text, "run python -m experiments.benchmarks.write_plans"


def test_a_program_that_does_not_fit_is_marked(monkeypatch, tmp_path):
    row = json.loads(write_plans.ROWS.read_text().splitlines()[0])
    (program,) = row["programs"]
    program |= {"fits": False, "needed": 20 * 2**30}
    row["programs"].append({**program, "program": "second", "needed": None})
    changed = tmp_path / "plans.jsonl"
    changed.write_text(json.dumps(row) + "\n")
    monkeypatch.setattr(write_plans, "ROWS", changed)
    first, second = write_plans.table()[2:4]
    assert "| **20.0 of 15.8** |" in first and "| second | **over 15.8** |" in second


def test_every_case_is_a_config_with_the_model_of_its_shape(tmp_path):
    for case in plans.CASES:
        found = plans.flags(case, "ppo", tmp_path)
        assert f"--topology={case.topology}" in found
        for stage in plans.TRAINED:  # the verb checks all stages
            assert f"--config.{stage}.batch_size={case.rows}" in found
        shape, written = plans.SHAPES[case.shape], json.loads((tmp_path / "config.json").read_text())
        assert written["num_hidden_layers"] == shape.layers and written["hidden_size"] == shape.width
        assert case.rows % case.fsdp == 0
