"""Some of the random configs against transformers, and the record of all that were compared."""

import json

import pytest

from tests.parity import compare_random_configs, comparison, random_configs

# Two of each family, one of them with gradients and padding, the other through a cache. Among them: an odd number of
# rotary channels (109), every type of rope scaling, windows, soft caps, and fields of other families.
IN_ONE_PASS = (72, 109, 38, 123, 100, 77, 78, 43, 44, 45, 58, 131)
THROUGH_A_CACHE = (108, 73, 86, 39, 124, 113, 18, 7, 128, 141, 34, 95)


@pytest.mark.parametrize("number", IN_ONE_PASS + THROUGH_A_CACHE)
def test_a_random_config_is_computed_as_transformers_does(number):
    family, fields = random_configs.config(number)
    checks = comparison.WHOLE if number in IN_ONE_PASS else comparison.CACHED
    apart = comparison.differences(family, fields, checks)
    assert isinstance(apart, dict), f"refused: {apart}"
    assert max(apart[check] for check in checks) < comparison.TOLERANCE, (apart, fields)


def test_every_family_is_among_them():
    for numbers in (IN_ONE_PASS, THROUGH_A_CACHE):
        assert [random_configs.config(number)[0] for number in numbers] == list(random_configs.FAMILIES)


def test_the_record_is_of_these_configs_and_says_what_its_rows_say():
    rows, said = compare_random_configs.read(), json.loads(compare_random_configs.SUMMARY.read_text())
    assert [row["number"] for row in rows] == list(range(300))
    for row in rows:
        assert (row["family"], row["config"]) == random_configs.config(row["number"])
        assert (
            "refused" in row or max(row["apart"][c] for c in comparison.WHOLE + comparison.CACHED) < said["tolerance"]
        )
    again = compare_random_configs.summary(rows, comparison)
    for name in ("configs", "compared", "greatest difference", "refused", "families"):
        assert again[name] == said[name], name
    assert said["beyond tolerance"] == []
