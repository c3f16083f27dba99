"""frontier: a point for every checkpoint of every seed, measured once, whatever interrupts it."""

import json
import shutil
from typing import Any

import numpy as np
import pytest

from rlhf_jax.config import ModelSource, StageName
from rlhf_jax.rewards.http_judge import HTTPJudgeConfig
from rlhf_jax.runtime.checkpoints import steps_of
from rlhf_jax.runtime.files import read_json
from rlhf_jax.stages.frontier import FrontierConfig, match
from tests.support import experiments

TARGETS = (0.001, 1e6)


@pytest.mark.nightly
def test_points_are_every_checkpoint_and_an_interrupted_stage_goes_on(tmp_path):
    model, reward_model = experiments.models(tmp_path)
    rng = np.random.default_rng(0)
    data = tmp_path / "rated.jsonl"
    with data.open("w") as file:
        for _ in range(48):
            words = rng.choice(experiments.WORDS, 4).tolist()
            rating = words.count("good") - words.count("bad") + rng.normal(0, 0.1)
            file.write(json.dumps({"text": " ".join(words), "rating": rating}) + "\n")
    stages: dict[str, dict[str, Any]] = {
        "gold": {"kind": "gold", "model": {"alpha": 1.0, "min_df": 1}, "rating": "rating"},
        "online": {
            "kind": "group_rl",
            "method": "dr_grpo",
            "num_generations": 2,
            "policy": model,
            "reward_model": reward_model,
            "iterations": 8,
            "batch_size": 8,
            "minibatches": 1,
            "epochs": 1,
            "temperature": 1.0,
            "optimizer": experiments.OPTIMIZER | {"learning_rate": 1e-2},
            "samples_every": 8,
            "samples_written": 2,
            "loop": {"steps_per_call": 2, "checkpoint_every": 2, "keep": 3},
        },
        "frontier": {
            "kind": "frontier",
            "reference": model,
            "policies": ("online",),
            "judge": "gold",
            "prompts": 24,
            "temperature": 1.0,
            "kl_targets": TARGETS,
        },
    }
    place = experiments.run(tmp_path / "run", data, stages, seeds=2)
    directory = place.find("frontier")
    points = experiments.rows(directory / "points.jsonl")
    trained = read_json(place.find("online") / "summary.json")["provenance"]
    assert trained["seeds"] == [0, 1] and trained["batch"]["rows"] == 8
    assert read_json(directory / "summary.json")["provenance"]["seeds"] == [0]
    at_kl = experiments.rows(directory / "at_kl.jsonl")
    assert [(row["seed"], row["kl"]) for row in at_kl] == [(seed, kl) for seed in (0, 1) for kl in TARGETS]
    assert steps_of(place.find("online") / "checkpoints") == [4, 6, 8]
    assert [(point["method"], point["seed"], point["step"]) for point in points] == [
        ("reference", 0, 0),
        *(("online", seed, step) for seed in (0, 1) for step in (4, 6, 8)),
    ]
    assert points[0]["kl"] == points[0]["kl_se"] == 0
    assert all(point["kl"] != 0 and np.isfinite(point["gold"]) for point in points[1:])
    assert points[3]["kl"] > points[1]["kl"] > 0.001  # 8 steps of seed 0 lead further than 4
    matched = experiments.rows(directory / "matched.jsonl")
    assert matched == match(points, ("online",), TARGETS)
    assert matched[0]["reached"] >= 1 and matched[1]["reached"] == 0 and matched[1]["gold"] is None

    lines = (directory / "points.jsonl").read_text().splitlines(keepends=True)
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    half_done = tmp_path / "again" / "frontier"
    for name in ("complete.json", "summary.json", "matched.jsonl"):
        (half_done / name).unlink()
    kept = json.dumps(json.loads(lines[1]) | {"gold": 7.5}) + "\n"  # what stands is not measured again
    (half_done / "points.jsonl").write_text(lines[0] + kept + lines[2] + lines[3][:20])
    experiments.run(tmp_path / "again", data, stages, seeds=2)
    assert (half_done / "points.jsonl").read_text() == "".join([lines[0], kept, *lines[2:]])

    (tmp_path / "mine.py").write_text(
        "import json\n"
        "def tokens(prompts, completion_ids):\n"
        f"    with open({str(tmp_path / 'asked.jsonl')!r}, 'a') as file:\n"
        "        file.write(json.dumps(prompts) + '\\n')\n"
        "    return [len(ids) for ids in completion_ids]\n"
    )
    mine = f"{tmp_path / 'mine.py'}:tokens"
    judges = {
        "model": reward_model,
        "functions": {"functions": (mine,), "weights": (2.0,)},
        "both": {"model": reward_model, "functions": (mine,)},
    }
    found = {}
    for name, judge in judges.items():
        root = tmp_path / f"by_{name}"
        shutil.copytree(tmp_path / "run", root)
        shutil.rmtree(root / "frontier")
        stages["frontier"]["judge"] = judge
        experiments.run(root, data, stages, seeds=2)
        found[name] = experiments.rows(root / "frontier" / "points.jsonl")
        assert [point["kl"] for point in found[name]] == [point["kl"] for point in points], "the same answers"
    gold = {name: np.array([point["gold"] for point in rows]) for name, rows in found.items()}
    lengths = np.array([point["length"] for point in points])
    np.testing.assert_allclose(gold["functions"], 2 * lengths, rtol=1e-6)
    np.testing.assert_allclose(gold["both"] - gold["model"], lengths, rtol=1e-4)
    assert np.ptp(gold["model"]) > 1e-3
    asked = experiments.rows(tmp_path / "asked.jsonl")
    assert len(asked) == 2 * len(points) and all(prompts == asked[0] for prompts in asked), "the same for all points"
    texts = [row["text"] for row in experiments.rows(data)]
    assert any(not any(text.startswith(prompt) for text in texts[:24]) for prompt in asked[0]), "not the first rows"
    assert read_json(tmp_path / "by_both" / "frontier" / "summary.json")["judge"] == f"{reward_model} + {mine}"

    # Greedy answers are compared at temperature 1.
    shutil.copytree(tmp_path / "run", tmp_path / "greedy")
    shutil.rmtree(tmp_path / "greedy" / "frontier")
    stages["frontier"] |= {"judge": reward_model, "temperature": 0.0}
    experiments.run(tmp_path / "greedy", data, stages, seeds=2)
    greedy = experiments.rows(tmp_path / "greedy" / "frontier" / "points.jsonl")
    assert greedy[0]["kl"] == 0 and all(np.isfinite(point["kl"]) and point["kl"] != 0 for point in greedy[1:])


@pytest.mark.parametrize("targets", [(), (0.0, 1.0)])
def test_divergences_that_cannot_be_are_refused(targets):
    with pytest.raises(ValueError, match="kl_targets"):
        FrontierConfig("frontier", ModelSource("sft"), (StageName("dpo"),), ModelSource("gold"), 24, 1.0, targets)


def test_a_judge_that_only_compares_pairs_is_refused():
    judge = HTTPJudgeConfig(url="http://localhost/v1", model="tiny")
    with pytest.raises(ValueError, match="judge = 'tiny' over HTTP compares two answers, and gives no score"):
        FrontierConfig("frontier", ModelSource("sft"), (StageName("dpo"),), judge, 24, 1.0, TARGETS)
