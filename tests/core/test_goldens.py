from pathlib import Path

import pytest

from tests.support.against_trl import CHECKS, read

GOLDENS = Path(__file__).parents[1] / "goldens"
CASES = [(name, check) for name, checks in CHECKS.items() for check in checks]
NAMES = [getattr(check, "func", check).__name__ for _, check in CASES]


@pytest.mark.parametrize(("name", "check"), CASES, ids=NAMES)
def test_our_numbers_are_those_that_trl_computed(name, check):
    versions, record = read(GOLDENS / f"{name}.json")
    assert versions["trl"].startswith("1.")
    check(record)
