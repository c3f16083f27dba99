"""The first steps of whole runs equal those of TRL's trainers; `tests/parity/test_curves.py` compares all steps."""

import numpy as np
import pytest

from tests.support import curves, curves_online
from tests.support.against_trl import read


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return curves.make_world(tmp_path_factory.mktemp("world"))


RUNS = dict.fromkeys(curves.SECTIONS, curves.run) | dict.fromkeys(curves_online.SECTIONS, curves_online.run)
QUICK = ("dpo",)
"""Runs of the quick tier. `make parity` compares the whole runs of all with those that TRL makes then."""


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.nightly) for name in RUNS]
)
def test_a_run_begins_as_trls(name, world, tmp_path):
    _, golden = read(curves.GOLDEN)
    ours = RUNS[name](name, world, tmp_path)
    for part in ("loss", "grad_norm"):
        first = getattr(ours, part)[: curves.FIRST]
        np.testing.assert_allclose(first, golden[f"{name}/{part}"], rtol=1e-4, atol=5e-6, err_msg=part)
