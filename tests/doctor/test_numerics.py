"""Numeric checks: they pass on this machine, and find what is wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.core.policy_losses import POLICY_LOSSES
from rlhf_jax.doctor import float64_network, numerics
from rlhf_jax.doctor.numerics import NumericCheck
from rlhf_jax.models.policy import PolicyNetwork


@pytest.fixture(scope="module")
def found() -> dict[str, NumericCheck]:
    return {check.name: check for check in numerics.checks(jax.devices()[0])}


@pytest.mark.nightly
def test_every_path_passes_here(found):
    assert {name: check.error for name, check in found.items() if not check.passed} == {}


@pytest.mark.nightly
def test_bfloat16_is_less_exact_than_float32(found):
    """A check whose errors were 0, or alike, would measure nothing."""
    for path in ("attention by xla, {}", "log-probabilities of a network, {} (nats)"):
        exact, rounded = (found[path.format(dtype)].error for dtype in ("float32", "bfloat16"))
        assert 0 < exact < rounded / 30


@pytest.mark.nightly
def test_a_wrong_loss_is_found(monkeypatch):
    """In float32, the loss is off by one part in a thousand."""
    spec = POLICY_LOSSES["reinforce"]

    def wrong(logprobs, *rest, **options):
        found = spec.function(logprobs, *rest, **options)
        return found._replace(losses=found.losses * (1.001 if logprobs.dtype == jnp.float32 else 1))

    monkeypatch.setitem(POLICY_LOSSES, "reinforce", spec._replace(function=wrong))
    checks = [check for check in numerics.checks(jax.devices()[0]) if not check.passed]
    assert [check.worst for check in checks] == ["reinforce"]


@pytest.mark.nightly
def test_a_wrong_network_is_found(monkeypatch):
    right = PolicyNetwork.response_stats

    def wrong(self, params, sequences, **options):
        return right(self, params, sequences._replace(start=sequences.start + 1), **options)

    monkeypatch.setattr(PolicyNetwork, "response_stats", wrong)
    assert numerics.network_error("float32") > 0.1 and numerics.sampler_error("float32") > 0.1


def test_nan_does_not_pass():
    assert not NumericCheck("x", np.nan, 1.0).passed


def test_the_network_in_numpy_gives_probabilities():
    """They sum to 1 over the vocabulary, and those of a token depend on none after it."""
    config = float64_network.config("float32")
    params = PolicyNetwork(config, 8, ()).init(jax.random.key(0))
    tokens = np.array([[1, 2, token] for token in range(8)])
    found = float64_network.logprobs(config, params, tokens)
    assert np.exp(found[:, 1]).sum() == pytest.approx(1)
    assert np.ptp(found[:, 0]) == 0
