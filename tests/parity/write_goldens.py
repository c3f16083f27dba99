"""Writes tests/goldens: what TRL computes for one seed, so that tests without torch can hold our losses against it.

.venv-parity/bin/python -m tests.parity.write_goldens
"""

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np

from tests.parity import (
    trl_1_12,
    trl_1_16,
    trl_1_16_online,
    trl_1_16_preferences,
    trl_curves,
    trl_curves_online,
    trl_curves_ppo,
)
from tests.support import curves, curves_online

SEED = 0
GOLDENS = Path(__file__).parents[1] / "goldens"


def write(folder: Path) -> None:
    """Results of the trainers on one batch."""
    for name, module, record in (
        ("dpo", trl_1_16, trl_1_16.record_dpo),
        ("sft", trl_1_16, trl_1_16.record_sft),
        ("reward", trl_1_16, trl_1_16.record_reward),
        ("centered_reward", trl_1_16, trl_1_16.record_centered_reward),
        ("ppo", trl_1_12, trl_1_12.record),
        ("online", trl_1_16_online, trl_1_16_online.record),
        ("preferences", trl_1_16_preferences, trl_1_16_preferences.record),
    ):
        _write(folder / f"{name}.json", module.VERSION, record(SEED))


def write_curves(path: Path) -> None:
    """Loss and gradient norm of the first steps of whole runs."""
    with tempfile.TemporaryDirectory() as folder:
        world, arrays = trl_curves.make_world(Path(folder)), {}
        runs = {name: trl_curves.run(name, world, curves.order()) for name in curves.SECTIONS}
        runs |= {name: trl_curves_online.run(name, world, seed=0) for name in trl_curves_online.KINDS}
        runs["ppo"] = trl_curves_ppo.run(world, [np.tile(np.arange(curves.BATCH), (curves_online.ITERATIONS, 1))])[0]
        for name, run in runs.items():
            for part in ("loss", "grad_norm"):
                arrays[f"{name}/{part}"] = getattr(run, part)[: curves.FIRST].astype(np.float32)
    _write(path, trl_curves.VERSION, arrays)


def _write(path: Path, trl_version: str, arrays: dict[str, np.ndarray]) -> None:
    versions = {"trl": trl_version} | {name: version(name).split("+")[0] for name in ("torch", "transformers")}
    rows = [f"{json.dumps(key)}: {json.dumps(_plain(array))}" for key, array in arrays.items()]
    lines = ['{"script": "tests/parity/write_goldens.py",', f'"versions": {json.dumps(versions)},', '"arrays": {']
    path.write_text("\n".join([*lines, ",\n".join(rows), "}}", ""]))


def _plain(array: np.ndarray) -> object:
    if array.ndim:
        return [_plain(row) for row in array]
    # The fewest digits that give the same float32.
    return float(str(array)) if array.dtype == np.float32 else array.item()


if __name__ == "__main__":
    GOLDENS.mkdir(exist_ok=True)
    write(GOLDENS)
    write_curves(curves.GOLDEN)
    sys.stdout.write(f"wrote {GOLDENS}\n")
