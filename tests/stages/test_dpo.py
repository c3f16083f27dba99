"""DPO as a stage: several seeds at once, each the run that it would be alone, also where it is interrupted."""

import json

import numpy as np
import pytest

from tests.support import experiments


@pytest.mark.nightly
def test_seed_k_of_several_is_the_single_run_with_that_seed(tmp_path):
    model, _ = experiments.models(tmp_path)
    rng = np.random.default_rng(0)
    data = tmp_path / "pairs.jsonl"
    with data.open("w") as file:
        for _ in range(48):
            prompt = [{"role": "user", "content": " ".join(rng.choice(experiments.WORDS, 2))}]
            answers = {
                name: [{"role": "assistant", "content": text}]
                for name, text in (("chosen", "good good"), ("rejected", "dull dull"))
            }
            file.write(json.dumps({"prompt": prompt, **answers}) + "\n")
    section = {
        "kind": "dpo",
        "policy": model,
        "preferences": None,
        "beta": 0.1,
        "loss": {"losses": ("sigmoid", "sft"), "loss_weights": (1.0, 0.1)},
        "reference_update": {"alpha": 0.5, "every": 3},  # then the state holds the reference too
        "optimizer": experiments.OPTIMIZER,
        "batch_size": 16,
        "epochs": 4.0,
        "sample_prompts": 2,
        "eval_every": 4,
        "loop": experiments.LOOP | {"checkpoint_every": 4},
        "tuning": {"lora": {"rank": 2, "alpha": 4.0, "targets": ("attention/[qv]", "up")}},
    }
    several = experiments.run(tmp_path / "several", data, {"dpo": section}, seeds=2).find("dpo")
    alone = experiments.run(tmp_path / "alone", data, {"dpo": section}, seed=1).find("dpo")
    first, second = (
        [row for row in experiments.rows(several / "metrics.jsonl") if row["seed"] == seed] for seed in (0, 1)
    )
    rows = experiments.rows(alone / "metrics.jsonl")
    assert len(first) == len(second) == len(rows) == 12
    assert any("eval/loss" in row for row in rows)
    for row, one in zip(second, rows, strict=True):
        assert row.keys() == one.keys()
        for name in row:
            if not name.startswith("time/"):
                assert row[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name
    assert first[-1]["loss"] != second[-1]["loss"]
    assert rows[-1]["eval/rewards/margins"] > rows[3]["eval/rewards/margins"] > 0
    experiments.assert_resumes(tmp_path / "alone", data, {"dpo": section}, seed=1)
