"""Sampling and scoring in bulk on several devices: results in the caller's order, and those of one device."""

import jax
import numpy as np
import pytest

from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.scalars import ScalarNetwork
from rlhf_jax.models.sharding import on_devices
from rlhf_jax.runtime.programs import RuntimeConfig, make_placement
from rlhf_jax.sampling import batches
from rlhf_jax.sampling.choice import Sampling
from rlhf_jax.sampling.compiled import mesh_of, row_devices_of
from tests.support import tiny
from tests.support.layouts import LAYOUTS
from tests.support.networks import EOS, SUPPRESSED, config, padded, random_params

VOCAB, SHAPE = 16, config(n_layers=1, n_heads=4)
POLICY, REWARD = PolicyNetwork(SHAPE, VOCAB, SUPPRESSED), ScalarNetwork(SHAPE, VOCAB, "mean")
ROWS, LIMIT, SAMPLES = 21, 5, 2
ONE = tiny.ONE_DEVICE
SLOW = [pytest.param(name, marks=pytest.mark.nightly) for name in LAYOUTS if name != "data=8"]


def placed(network, where: RuntimeConfig, seed: int = 0):
    """Parameters that lie where those of a loaded model do."""
    params = random_params(network, seed)
    return jax.device_put(params, on_devices(params, make_placement(where, 1).where))


def sampled(where: RuntimeConfig, limits=None):
    rng = np.random.default_rng(0)
    texts = [rng.integers(4, VOCAB, 1 + i % 3).astype(np.int32) for i in range(ROWS)]
    prompts = padded(texts, [2 - i % 3 for i in range(ROWS)], 3)
    sampling, key = Sampling(LIMIT, 0.9, (EOS,) if limits is None else ()), jax.random.key(1)
    options = {"samples": SAMPLES, "batch_size": 16, "limits": limits}
    return batches.sample_all(POLICY, placed(POLICY, where), prompts, key, sampling, **options)


def test_parameters_say_where_programs_run():
    assert row_devices_of(random_params(POLICY)) == row_devices_of(placed(POLICY, ONE)) == 1
    found = {name: row_devices_of(placed(POLICY, where)) for name, where in LAYOUTS.items()}
    assert found == {"data=8": 8, "fsdp=8": 8, "data=2 x tensor=4": 2, "fsdp=4 x tensor=2": 4, "pmap=8": 8}


@pytest.mark.nightly
@pytest.mark.parametrize("layout", ["data=8", *SLOW])
def test_samples_and_scores_are_those_of_one_device(layout):
    where = LAYOUTS[layout]
    found, expected = sampled(where), sampled(ONE)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    scores = [batches.score_all(REWARD, placed(REWARD, each, 2), found, 16) for each in (where, ONE)]
    np.testing.assert_allclose(*scores, rtol=1e-5, atol=1e-5)
    assert len(set(np.round(scores[1], 3))) > ROWS
    models = [[(POLICY, placed(POLICY, each, seed)) for seed in (0, 1)] for each in (where, ONE)]
    kl = [batches.sequence_kl(*own, other, found, batch_size=16, temperature=0.9) for own, other in models]
    np.testing.assert_allclose(*kl, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", [pytest.param("data=8", marks=pytest.mark.nightly), *SLOW])
def test_every_device_has_a_queue_of_its_own_where_weights_are_whole(layout, monkeypatch):
    queued, run = [], batches.sample_queue
    monkeypatch.setattr(batches, "sample_queue", lambda *args: queued.append(mesh_of(args)) or run(*args))
    limits = 1 + (LIMIT - 1) * (np.arange(ROWS) // 3 % 2)  # uneven
    found, expected = sampled(LAYOUTS[layout], limits), sampled(ONE, limits)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert [mesh is None for mesh in queued] == ([False, True] if layout in ("data=8", "pmap=8") else [True])
