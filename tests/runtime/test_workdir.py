"""Status of a stage in a work directory, by its files."""

import pytest

from rlhf_jax.runtime.workdir import Identity, Workdir
from rlhf_jax.types import RlhfError


def identity(**section) -> Identity:
    return Identity({"kind": "dpo", **section}, {}, {})


@pytest.fixture
def place(tmp_path):
    """Work directory with a stage that has written metrics, and no checkpoint."""
    place = Workdir(tmp_path)
    stage = place.begin("dpo", identity(checkpoint_every=100))
    (stage / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir(parents=True)
    (stage / "metrics.jsonl").write_text('{"step": 1}\n')
    return place


def test_before_its_first_checkpoint_a_stage_may_get_another_config(place):
    assert place.status("dpo", identity(checkpoint_every=100)) == "half-done"
    assert place.status("dpo", identity(checkpoint_every=10)) == "again"
    stage = place.begin("dpo", identity(checkpoint_every=10))
    assert [path.name for path in stage.iterdir()] == ["config.json"], "nothing of the other config is left"


@pytest.mark.parametrize("name", ["checkpoints/100", "reference.npz"])
def test_with_results_it_may_not(place, name):
    path = place.root / "dpo" / name
    path.mkdir() if "/" in name else path.write_text("log-probabilities")
    with pytest.raises(RlhfError, match="checkpoint_every: 100 there, 10 now"):
        place.status("dpo", identity(checkpoint_every=10))


def test_rows_of_a_stage_without_checkpoints_are_results(tmp_path):
    place = Workdir(tmp_path)
    (place.begin("best_of_n", identity(n=4)) / "samples.jsonl").write_text("{}\n")
    with pytest.raises(RlhfError, match="n: 4 there, 8 now"):
        place.status("best_of_n", identity(n=8))
