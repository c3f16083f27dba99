import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.core.interpolation import score_at_kl
from tests.support.padded_arrays import seeds


def test_linear_in_the_root_of_the_divergence():
    # Roots 0, 1, 2, 4: halfway between the last two is a divergence of 9.
    assert score_at_kl([0, 1, 4, 16], [0.0, 10.0, 12.0, 8.0], (0.25, 1, 9, 16)) == pytest.approx([5, 10, 10, 8])


def test_what_was_never_reached_has_no_score():
    assert score_at_kl([0, 1, 4], [0.0, 1.0, 2.0], (3.99, 4.01)) == [pytest.approx(np.sqrt(3.99)), None]


def test_the_first_time_counts_where_a_run_comes_back():
    assert score_at_kl([0, 4, 1, 4], [0.0, 2.0, 5.0, 9.0], (4,)) == [2.0]


def test_estimates_below_0_are_0():
    assert score_at_kl([0, -0.5, 1], [0.0, 3.0, 5.0], (0.25,)) == [4.0]


@given(seeds, st.floats(0.01, 5))
def test_runs_that_are_straight_in_the_root_are_read_off_exactly(seed, slope):
    rng = np.random.default_rng(seed)
    kl = np.append(0, np.cumsum(rng.random(6) + 0.01))
    targets = tuple(rng.uniform(0.01, kl[-1], 5))
    assert score_at_kl(kl, 1 + slope * np.sqrt(kl), targets) == pytest.approx(1 + slope * np.sqrt(targets))
