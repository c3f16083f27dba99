"""The judge of a gold stage as a reward: the true reward, where it labels the pairs."""

import json

import pytest

from rlhf_jax.types import RlhfError
from tests.support import experiments

GOLD = {"kind": "gold", "model": {"alpha": 1.0, "min_df": 1}, "rating": "rating"}
RATINGS = {"good": 2.0, "the": 0.5, "is": 0.0, "bad": -1.0, "dull": -2.0}


def best_of_n(policy, reward):
    """Best-of-4 by a reward, scored by the judge."""
    section = {"kind": "best_of_n", "policy": policy, "reward_model": reward, "judge": "gold"}
    return {**section, "prompts": 8, "pool": 4, "temperature": 1.0}


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    directory = tmp_path_factory.mktemp("judged")
    policy, _ = experiments.models(directory)
    data = directory / "rated.jsonl"
    rows = [{"text": f"the film {word}", "rating": rating} for word, rating in RATINGS.items()] * 4
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = directory / "mine.py"
    code.write_text("def zero(completions):\n    return [0.0 for _ in completions]\n")
    stages = {
        "gold": GOLD,
        "best": best_of_n(policy, "gold"),
        "worst": best_of_n(policy, {"model": "gold", "functions": (f"{code}:zero",), "weights": (-0.5, 1.0)}),
    }
    return experiments.run(directory / "run", data, stages)


def curve(place, stage):
    return experiments.rows(place.find(stage) / "curve.jsonl")


def test_selection_by_the_judge_is_selection_by_the_truth(judged):
    rows = curve(judged, "best")
    assert [row["proxy"] for row in rows] == pytest.approx([row["gold"] for row in rows], rel=1e-5)
    assert rows[-1]["gold"] > rows[0]["gold"] + 0.1


def test_the_judge_is_a_part_of_a_sum_with_its_weight(judged):
    rows = curve(judged, "worst")
    assert [row["proxy"] for row in rows] == pytest.approx([-0.5 * row["gold"] for row in rows], rel=1e-5)
    assert rows[-1]["gold"] < rows[0]["gold"] - 0.1


def test_a_judge_has_no_members_to_combine(judged, tmp_path):
    stages = {"gold": GOLD, "best": best_of_n("unread", {"model": "gold", "combine": "mean"})}
    data = judged.root.parent / "rated.jsonl"
    stages["best"]["policy"] = str(judged.root.parent / "model")
    with pytest.raises(RlhfError, match=r"combine = 'mean': gold is a gold stage"):
        experiments.run(tmp_path / "run", data, stages)


def test_chats_are_refused(judged, tmp_path):
    policy = str(judged.root.parent / "model")
    rated = judged.root.parent / "rated.jsonl"
    rows = [json.loads(line) for line in rated.read_text().splitlines()]
    chats = tmp_path / "chats.jsonl"
    turns = [{**row, "prompt": [{"role": "user", "content": row["text"]}]} for row in rows]
    chats.write_text("".join(json.dumps(row) + "\n" for row in turns))
    with pytest.raises(
        RlhfError, match=r"config\.best: the judge of stage gold scores texts, but the prompts are chats"
    ):
        experiments.run(tmp_path / "run", chats, {"gold": GOLD, "best": best_of_n(policy, "gold")})
