"""Writes tests/goldens: what TRL computes for one seed, so that tests without torch can hold our losses against it.

.venv-parity/bin/python -m tests.parity.write_goldens
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np

from tests.parity import trl_1_12, trl_1_16, trl_1_16_online, trl_1_16_preferences

SEED = 0
GOLDENS = Path(__file__).parents[1] / "goldens"


def write(folder: Path) -> None:
    for name, module, record in (
        ("dpo", trl_1_16, trl_1_16.record_dpo),
        ("sft", trl_1_16, trl_1_16.record_sft),
        ("reward", trl_1_16, trl_1_16.record_reward),
        ("centered_reward", trl_1_16, trl_1_16.record_centered_reward),
        ("ppo", trl_1_12, trl_1_12.record),
        ("online", trl_1_16_online, trl_1_16_online.record),
        ("preferences", trl_1_16_preferences, trl_1_16_preferences.record),
    ):
        versions = {"trl": module.VERSION} | {name: version(name).split("+")[0] for name in ("torch", "transformers")}
        arrays = [f"{json.dumps(key)}: {json.dumps(_plain(array))}" for key, array in record(SEED).items()]
        lines = ['{"script": "tests/parity/write_goldens.py",', f'"versions": {json.dumps(versions)},', '"arrays": {']
        (folder / f"{name}.json").write_text("\n".join([*lines, ",\n".join(arrays), "}}", ""]))


def _plain(array: np.ndarray) -> object:
    if array.ndim:
        return [_plain(row) for row in array]
    # The fewest digits that give the same float32.
    return float(str(array)) if array.dtype == np.float32 else array.item()


if __name__ == "__main__":
    GOLDENS.mkdir(exist_ok=True)
    write(GOLDENS)
    sys.stdout.write(f"wrote {GOLDENS}\n")
