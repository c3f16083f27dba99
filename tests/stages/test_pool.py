"""pool: scores of one set of samples by several reward models, an ensemble's members apart, and by the judge."""

import numpy as np
import pytest

from rlhf_jax.stages import pool
from tests.support import experiments

SECTION = {"kind": "pool", "prompts": 3, "samples": 5, "temperature": 1.0, "judge": None}
TRAINED = {
    "kind": "reward_model",
    "policy": None,
    "preferences": "preferences",
    "pooling": "last",
    "optimizer": experiments.OPTIMIZER | {"learning_rate": 1e-8},
    "batch_size": 4,
    "epochs": 1.0,
    "eval_every": 100,
    "loop": experiments.LOOP,
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pool")
    model, judge = experiments.models(directory)
    counter = directory / "counter.py"
    counter.write_text("def count(completion_ids, **columns):\n    return [len(ids) for ids in completion_ids]\n")
    stages = {
        "preferences": {
            "kind": "preferences",
            "policy": model,
            "judge": None,
            "reward_model": judge,
            "prompts": 8,
            "eval_prompts": 2,
            "samples_per_prompt": 3,
            "label_beta": 2.0,
        },
        "members": TRAINED | {"model": {"init": judge}, "ensemble": {"members": 2, "combine": "mean"}},
        "both": SECTION | {"policy": model, "reward_models": (judge, "members")},
        "judged": SECTION | {"policy": model, "reward_models": (judge,), "judge": {"model": judge}},
        "counted": SECTION | {"policy": model, "reward_models": (), "judge": {"functions": (f"{counter}:count",)}},
    }
    place = experiments.run(directory / "run", experiments.questions(directory / "questions.jsonl", 16), stages)
    return judge, place


@pytest.mark.nightly
def test_every_reward_model_scores_the_same_samples(found):
    judge, place = found
    arrays = pool.load_pool(place.find("both"))
    assert set(arrays) == {"length", judge, "members"}
    assert arrays["length"].shape == arrays[judge].shape == (3, 5)
    assert arrays["members"].shape == (2, 3, 5)
    assert arrays["length"].min() >= 1
    # The members started from the judge and learned next to nothing.
    for scores in arrays["members"]:
        np.testing.assert_allclose(scores, arrays[judge], rtol=1e-3, atol=1e-4)
    assert arrays[judge].std() > 0.1


@pytest.mark.nightly
def test_the_judge_is_any_reward(found):
    judge, place = found
    judged, counted = (pool.load_pool(place.find(stage)) for stage in ("judged", "counted"))
    assert judged["gold"].std() > 0.1
    np.testing.assert_array_equal(judged["gold"], judged[judge])
    assert set(counted) == {"gold", "length"} and counted["gold"].std() > 0
    np.testing.assert_array_equal(counted["gold"], counted["length"])


@pytest.mark.parametrize("names", [("a", "a"), ("gold",), ("length", "a")])
def test_names_of_the_arrays_are_unique(names):
    with pytest.raises(ValueError, match="names must differ"):
        pool.PoolConfig(policy="sft", reward_models=names, **SECTION)  # pyrefly: ignore[bad-argument-type]
