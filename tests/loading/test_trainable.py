"""Advice about the compilation of deep networks."""

import dataclasses

import pytest

from rlhf_jax.loading.trainable import DEEP, depth_advice
from rlhf_jax.models.lora import LoraConfig
from tests.support import tiny


def network(**changes):
    return dataclasses.replace(tiny.POLICY, config=dataclasses.replace(tiny.POLICY.config, **changes))


def test_a_deep_network_can_compile_one_layer_instead():
    advice = depth_advice(network(n_layers=DEEP))
    assert advice is not None
    assert f"it compiles {DEEP} layers one by one" in advice and "scan_layers = True" in advice


@pytest.mark.parametrize(
    "other",
    [
        network(n_layers=DEEP - 1),
        network(n_layers=DEEP, scan_layers=True),
        dataclasses.replace(network(n_layers=DEEP), lora=LoraConfig(2, 1.0, ("up",))),
    ],
    ids=["few layers", "already a loop", "an adapter, which a loop does not support"],
)
def test_no_advice_where_it_does_not_help(other):
    assert depth_advice(other) is None
