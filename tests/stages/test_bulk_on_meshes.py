"""Stages that sample and score on several devices write what they write on one, in the same order."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import experiments

LAYOUTS = {
    "data=8": {"data": 8},
    "fsdp=4 x tensor=2": {"fsdp": 4, "tensor": 2},
    "pmap=8": {"strategy": "pmap", "data": 8},
}


def sections(model: str, reward_model: str) -> dict[str, dict[str, Any]]:
    """Stages that only sample and score, and a training stage whose checkpoints `frontier` reads."""
    scored = {"reward_model": reward_model, "temperature": 1.0}
    several = {"policy": model, "prompts": 24, "eval_prompts": 4, "samples_per_prompt": 3, **scored}
    pairs = {"kind": "preferences", "judge": None, "label_beta": None, "pairs": "best_worst", **several}
    judged = {"judge": reward_model, "temperature": 1.0, "prompts": 24}
    return {
        "pairs": pairs,
        "chosen": {"kind": "rejection_sampling", "keep": {"best": 1}, **several},
        "curve": {"kind": "best_of_n", "pool": 4, "soft": (1.0,), **judged, "policy": model, **scored},
        "pool": {"kind": "pool", "samples": 4, "policy": model, "reward_models": (reward_model,), **judged},
        "trained": experiments.dpo_section(model, sample_prompts=4),
        "points": {"kind": "frontier", "reference": model, "policies": ("trained",), "kl_targets": (0.01,), **judged},
        "table": {
            "kind": "evaluate",
            **{"reference": model, "policies": ("trained",), "best_of": (2,), "selection_prompts": 8},
            **judged,
            "reward_model": reward_model,
        },
    }


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bulk")
    pairs = experiments.preference_rows(directory / "pairs.jsonl")
    return pairs, sections(*experiments.models(directory))


@pytest.fixture(scope="module")
def written(inputs, tmp_path_factory):
    return files(experiments.run(tmp_path_factory.mktemp("one"), *inputs).root)


def files(root: Path) -> dict[str, Any]:
    """Results of all stages: rows by file, and arrays."""
    rows = {str(path.relative_to(root)): experiments.rows(path) for path in root.glob("*/*.jsonl")}
    del rows["trained/metrics.jsonl"]  # shares of pairs whose rewards are next to equal
    with np.load(root / "pool" / "pool.npz") as arrays:
        return rows | {f"pool {name}": arrays[name] for name in arrays.files}


def assert_alike(found: Any, expected: Any, place: str) -> None:
    """Texts are equal, and numbers equal up to rounding; times are not compared."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for name in expected:
            if not name.startswith(("time/", "seconds")):
                assert_alike(found[name], expected[name], f"{place} {name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for number, pair in enumerate(zip(found, expected, strict=True)):
            assert_alike(*pair, f"{place} {number}")
    elif isinstance(expected, (float, int, np.ndarray)):
        np.testing.assert_allclose(found, expected, rtol=5e-3, atol=1e-3, err_msg=place)
    else:
        assert found == expected, f"{place}: {json.dumps(found)}"


@pytest.mark.nightly
@pytest.mark.parametrize("layout", LAYOUTS)
def test_stages_on_several_devices_write_what_they_write_on_one(layout, inputs, written, tmp_path):
    runtime = {**experiments.RUNTIME, **LAYOUTS[layout]}
    found = files(experiments.run(tmp_path, *inputs, runtime=runtime).root)
    assert len(written) >= 15
    assert_alike(found, written, layout)
