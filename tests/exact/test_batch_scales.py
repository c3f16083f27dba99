"""Advantages that are scaled over the batch: the bias of their gradient falls as batches grow."""

import dataclasses

import pytest

from tests.support import exact_world as exact
from tests.support.exact_world import cosine, every_batch, of_group, world


def bias(advantage: str, size: int) -> float:
    """1 less the cosine of the expected gradient and the score's own, for groups of two in batches of `size`."""
    config = dataclasses.replace(of_group("dr_grpo", 2, advantage=advantage), batch_size=size)
    return 1 - cosine(every_batch(world(1), config).mean(), exact.gradient(exact.mean_score, world(1)))


@pytest.mark.nightly
def test_a_deviation_of_the_batch_is_biased_less_in_a_larger_batch_and_that_of_the_group_is_not():
    group = bias("grpo", 4)
    assert abs(group - 0.0165) < 1e-3 and abs(group - bias("grpo", 2)) < 1e-4
    for advantage in ("grpo_batch_std", "rloo_normalized", "reinforce_plus_plus_baseline"):
        assert 1e-3 < bias(advantage, 4) < 0.55 * group
