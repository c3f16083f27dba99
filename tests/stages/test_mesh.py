"""Stages on a mesh that splits the weights: models are loaded in parts, whole on no device, and train the same."""

import jax
import numpy as np
import pytest

from rlhf_jax import config as configs
from rlhf_jax.models.sharding import shardings
from rlhf_jax.runtime.programs import MeshPlacement, RuntimeConfig, make_placement
from rlhf_jax.stages.context import Context
from tests.stages import experiments
from tests.stages.test_reference import preference_rows, section

MESH = {**experiments.RUNTIME, "fsdp": 4, "tensor": 2}
LORA = {"rank": 2, "alpha": 4.0, "targets": ["attention/[qv]", "up"]}


def whole_on_a_device(leaf: jax.Array) -> bool:
    return leaf.addressable_shards[0].data.size == leaf.size


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The same stages on one device and on eight; of the latter, what was loaded, and what else then was on devices."""
    directory = tmp_path_factory.mktemp("mesh")
    model, _ = experiments.models(directory)
    pairs = preference_rows(directory / "pairs.jsonl")
    short = {"epochs": 1.0, "sample_prompts": 2, "loop": {"steps_per_call": 3, "checkpoint_every": 100}}
    stages = {"dpo": section(model, **short), "tuned": section("dpo", **short, tuning={"lora": LORA})}
    loaded, load = {}, Context.model

    def spied(self, source, *rest):
        before = jax.live_arrays()
        known = set(map(id, before))
        model = load(self, source, *rest)
        loaded[self.name] = model.params, [leaf for leaf in jax.live_arrays() if id(leaf) not in known]
        return model

    runs = {"one": experiments.run(directory / "one", pairs, stages)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Context, "model", spied)
        runs["mesh"] = experiments.run(directory / "mesh", pairs, stages, runtime=MESH)
    return runs, loaded


def test_what_is_loaded_lies_where_it_is_trained_and_nowhere_else(finished):
    _, loaded = finished
    assert list(loaded) == ["dpo", "tuned"]  # a checkpoint's, and a stage's
    placement = make_placement(configs.build(RuntimeConfig, MESH, "runtime"), 1)
    assert isinstance(placement, MeshPlacement)
    for params, present in loaded.values():
        layout = shardings(params, placement.mesh, leading_axes=0)
        assert all(jax.tree.leaves(jax.tree.map(lambda leaf, there: leaf.sharding == there, params, layout)))
        assert len(jax.tree.leaves(params)) <= len(present)
        assert [leaf.shape for leaf in present if leaf.ndim > 1 and whole_on_a_device(leaf)] == []


@pytest.mark.parametrize("stage", ["dpo", "tuned"])
def test_it_trains_and_evaluates_as_on_one_device(stage, finished):
    runs, _ = finished
    one, mesh = (experiments.rows(run.find(stage) / "metrics.jsonl") for run in runs.values())
    assert len(one) == len(mesh) == 3 and "eval/loss" in one[-1]
    for a, b in zip(one, mesh, strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
            np.testing.assert_allclose(a[name], b[name], rtol=2e-3, atol=1e-4, err_msg=name)
    np.testing.assert_allclose(one[-1]["eval/loss"], mesh[-1]["eval/loss"], rtol=2e-3)
    one, mesh = (experiments.rows(run.find(stage) / "samples.jsonl") for run in runs.values())
    assert len(one) == 2 and [row["completion"] for row in one] == [row["completion"] for row in mesh]
