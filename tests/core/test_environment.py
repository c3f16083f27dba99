"""Guarantees of tests/conftest.py, without which a test elsewhere could pass for the wrong reason."""

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from rlhf_jax.core import masking


def test_there_are_eight_cpu_devices():
    assert [device.platform for device in jax.devices()] == ["cpu"] * 8


def test_ranks_and_dtypes_are_not_promoted_silently():
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones(3) + jnp.ones((2, 3))
    with pytest.raises(ValueError, match="promotion"):
        jnp.ones(3) + jnp.ones(3, jnp.int32)


@pytest.mark.nightly  # `make test` leaves shapes unchecked
@pytest.mark.parametrize("mask", [jnp.ones(3, bool), jnp.ones((2, 3))])
def test_shapes_and_dtypes_of_arguments_are_checked(mask):
    with pytest.raises(jaxtyping.TypeCheckError):
        masking.lengths(mask)


def test_a_warning_is_an_error():
    with pytest.raises(UserWarning):
        jnp.ones(3, jnp.float64)
