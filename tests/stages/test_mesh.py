"""Stages on a mesh that splits the weights: models are loaded in parts, whole on no device, and train the same."""

from collections.abc import Callable

import jax
import numpy as np
import pytest

from rlhf_jax import config as configs
from rlhf_jax.loading.context import Context
from rlhf_jax.loading.models import Policy, RewardModel
from rlhf_jax.loading.stage_models import load_stage_policy
from rlhf_jax.models.sharding import shardings
from rlhf_jax.runtime.programs import MeshPlacement, RuntimeConfig, make_placement
from tests.support import experiments

MESH = {**experiments.RUNTIME, "fsdp": 4, "tensor": 2}


def whole_on_a_device(leaf: jax.Array) -> bool:
    return leaf.addressable_shards[0].data.size == leaf.size


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A stage on one device and on eight; what the latter loaded, and what else was then on devices."""
    directory = tmp_path_factory.mktemp("mesh")
    model, _ = experiments.models(directory)
    pairs = experiments.preference_rows(directory / "pairs.jsonl")
    loop = {"steps_per_call": 3, "checkpoint_every": 100}
    stages = {"dpo": experiments.dpo_section(model, epochs=1.0, sample_prompts=2, loop=loop)}
    loads, load = [], Context.model

    def spied(self, *arguments):
        loads.append(present(lambda: load(self, *arguments)))
        return loads[-1][0]

    one = experiments.run(directory / "one", pairs, stages)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Context, "model", spied)
        mesh = experiments.run(directory / "mesh", pairs, stages, runtime=MESH)
    assert len(loads) == 1
    return one.find("dpo"), mesh.find("dpo"), loads[0]


def present(load: Callable[[], Policy | RewardModel]) -> tuple[Policy | RewardModel, list[jax.Array]]:
    """A model, and all arrays that are there once it is loaded and were not before."""
    before = jax.live_arrays()
    known, model = set(map(id, before)), load()
    return model, [leaf for leaf in jax.live_arrays() if id(leaf) not in known]


@pytest.mark.nightly
@pytest.mark.parametrize("source", ["checkpoint", "stage"])
def test_what_is_loaded_lies_where_it_is_trained_and_nowhere_else(source, runs):
    _, directory, loaded = runs
    placement = make_placement(configs.build(RuntimeConfig, MESH, "runtime"), 1)
    assert isinstance(placement, MeshPlacement)
    if source == "stage":
        loaded = present(lambda: load_stage_policy(directory, seed=0, step=None, where=placement.where))
    model, arrays = loaded
    layout = shardings(model.params, placement.mesh, leading_axes=0)
    assert all(jax.tree.leaves(jax.tree.map(lambda leaf, there: leaf.sharding == there, model.params, layout)))
    assert len(jax.tree.leaves(model.params)) <= len(arrays)
    assert [leaf.shape for leaf in arrays if leaf.ndim > 1 and whole_on_a_device(leaf)] == []


@pytest.mark.nightly
def test_it_trains_and_evaluates_as_on_one_device(runs):
    one, mesh = (experiments.rows(directory / "metrics.jsonl") for directory in runs[:2])
    assert len(one) == len(mesh) == 3
    for a, b in zip(one, mesh, strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
            np.testing.assert_allclose(a[name], b[name], rtol=2e-3, atol=1e-4, err_msg=name)
    np.testing.assert_allclose(one[-1]["eval/loss"], mesh[-1]["eval/loss"], rtol=2e-3)
    one, mesh = (experiments.rows(directory / "samples.jsonl") for directory in runs[:2])
    assert len(one) == 2 and [row["completion"] for row in one] == [row["completion"] for row in mesh]
