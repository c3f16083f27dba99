"""The temperature of samples, in the stages that draw some beside what they train."""

import json

import pytest

from tests.support import experiments

pytestmark = pytest.mark.nightly
TRAINED = {
    "optimizer": experiments.OPTIMIZER,
    "batch_size": 4,
    "epochs": 1.0,
    "sample_prompts": 8,
    "eval_every": 100,
    "loop": {"steps_per_call": 2, "checkpoint_every": 100},
}


def sections(model, reward_model, temperature):
    shown = {**TRAINED, "sample_temperature": temperature}
    low = max(temperature, 0.01)  # what is compared must differ somewhere
    normalise = {"policy": model, "prompts": 8, "temperature": low}
    return {
        "sft": {"kind": "sft", "tokenizer": None, "model": {"init": model}, **shown},
        "dpo": {"kind": "dpo", "policy": model, "preferences": None, "beta": 0.1, **shown},
        "kto": {"kind": "kto", "policy": model, "preferences": None, "beta": 0.1, **shown},
        "preferences": {
            "kind": "preferences",
            "policy": model,
            "judge": None,
            "reward_model": reward_model,
            "prompts": 8,
            "eval_prompts": 2,
            "samples_per_prompt": 2,
            "label_beta": 1.0,
            "temperature": low,
        },
        "rm": {
            "kind": "reward_model",
            "policy": None,
            "preferences": None,
            "model": {"init": reward_model},
            "pooling": "last",
            "normalise": normalise,
            **{key: value for key, value in TRAINED.items() if key != "sample_prompts"},
        },
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same stages cold and at temperature 1, on prompts of which every one stands there twice."""
    directory = tmp_path_factory.mktemp("temperatures")
    model, reward_model = experiments.models(directory)
    data = directory / "pairs.jsonl"
    prompts = [prompt for prompt in ("the film", "is bad", "good", "dull") for _ in range(2)]
    rows = [{"prompt": prompt, "chosen": " good film", "rejected": " bad film"} for prompt in prompts]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        temperature: experiments.run(directory / str(temperature), data, sections(model, reward_model, temperature))
        for temperature in (0.0, 1.0)
    }


def completions(runs, temperature, stage):
    rows = experiments.rows(runs[temperature].find(stage) / "samples.jsonl")
    last = [row for row in rows if row["step"] == rows[-1]["step"]]
    return [(row["prompt"], row["completion"]) for row in last]


@pytest.mark.parametrize("stage", ["sft", "dpo", "kto"])
def test_samples_shown_while_a_policy_is_trained(runs, stage):
    cold, warm = completions(runs, 0.0, stage), completions(runs, 1.0, stage)
    assert len(cold) == len(warm) == 8
    assert cold[::2] == cold[1::2], "the most likely tokens, whatever the random numbers"
    assert warm[::2] != warm[1::2]


def test_samples_that_are_preferred_or_not(runs):
    def share_of_equals(temperature):
        directory = runs[temperature].find("preferences")
        rows = [row for name in ("", "_eval") for row in experiments.rows(directory / f"preferences{name}.jsonl")]
        return sum(row["chosen"] == row["rejected"] for row in rows) / len(rows)

    assert share_of_equals(0.0) > share_of_equals(1.0) + 0.5


def test_samples_that_scores_are_normalised_on(runs):
    cold, warm = (json.loads((runs[t].find("rm") / "model.json").read_text())["moments"][0] for t in (0.0, 1.0))
    assert abs(cold[0] - warm[0]) + abs(cold[1] - warm[1]) > 1e-3
