"""The best checkpoint: which one it is, what is kept and read, and exact resumption of a run that stops early."""

import contextlib
import json
import shutil

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from rlhf_jax.runtime.best import Best, BestSoFar, Preservation, best_step
from rlhf_jax.runtime.checkpoints import TrainState, load_params, steps_of
from rlhf_jax.runtime.files import read_rows
from rlhf_jax.runtime.loop import LoopConfig, Task, train
from rlhf_jax.runtime.programs import make_placement
from rlhf_jax.runtime.progress import Display
from rlhf_jax.types import RlhfError
from tests.support import tiny


def follow(config: Best, values: list[float | None]) -> BestSoFar:
    """A run with a value and a checkpoint at each step."""
    best = BestSoFar(config)
    for step, value in enumerate(values, start=1):
        best.log([{"step": step, "seed": 0, "eval/loss": value}])
        best.at_checkpoint(step)
    return best


def test_the_first_of_the_best_wins():
    assert follow(Best("eval/loss", "min"), [3.0, 1.0, 2.0, 1.0]).step == 2
    assert follow(Best("eval/loss", "max"), [3.0, 1.0, 3.0]).step == 1
    assert follow(Best("eval/loss", "min"), [None, 5.0, None]).step == 2, "a loss that is not finite is the worst"


def test_a_checkpoint_is_judged_by_the_mean_over_seeds_of_the_last_values():
    best = BestSoFar(Best("eval/loss", "min"))
    best.log([{"step": 1, "seed": seed, "eval/loss": float(seed)} for seed in range(3)])
    best.at_checkpoint(1)
    best.log([{"step": 2, "seed": seed, "loss": 0.0} for seed in range(3)])  # no evaluation
    best.at_checkpoint(2)
    assert (best.step, best.value) == (1, 1.0)


def test_patience_counts_steps_after_the_best_checkpoint():
    config = Best("eval/loss", "min", patience=2)
    assert not follow(config, [1.0, 2.0]).out_of_patience(2)
    worse = follow(config, [1.0, 2.0, 3.0])
    assert worse.out_of_patience(3) and not worse.out_of_patience(4), "only at a checkpoint"
    assert not follow(Best("eval/loss", "min"), [1.0] * 9).out_of_patience(9)


def test_a_metric_that_was_not_logged_is_named_with_those_that_were():
    best = BestSoFar(Best("eval/los", "min"))
    best.log([{"step": 1, "seed": 0, "loss": 1.0, "grad_norm": 2.0}])
    with pytest.raises(RlhfError, match=r"'eval/los' was not logged .* one of grad_norm, loss"):
        best.at_checkpoint(1)


def test_the_newest_and_the_best_are_preserved():
    class Info:
        def __init__(self, step: int) -> None:
            self.step = step

    best = follow(Best("eval/loss", "min"), [3.0, 1.0, 2.0, 2.0, 2.0])
    kept = Preservation(2, best).should_preserve([Info(step) for step in range(1, 6)], context=None)
    assert kept == [False, True, False, True, True]


def test_no_record_means_the_newest(tmp_path):
    assert best_step(tmp_path) is None
    follow(Best("eval/loss", "min"), [2.0, 1.0, 3.0]).write(tmp_path)
    assert best_step(tmp_path) == 2
    assert json.loads((tmp_path / "best.json").read_text()) == {"step": 2, "metric": "eval/loss", "value": 1.0}


def step(state, frozen, batch, run_key):
    """Count the steps; the loss is lowest after five of them."""
    x = state.params["sum"]["x"] + 1
    metrics = {"loss": jnp.square(x - 5), "num_tokens": jnp.int32(2)}
    return TrainState(state.step + 1, {"sum": {"x": x}}, {"count": state.opt_state["count"]}), metrics, ()


def run(directory, best: Best | None) -> int:
    a_task = Task(
        step=step,
        start=lambda: TrainState(jnp.int32(0), {"sum": {"x": jnp.float32(0)}}, {"count": jnp.int32(0)}),
        frozen=jnp.float32(1),
        batch_at=lambda index: {"x": jnp.ones(2)},
        run_key=jax.random.key(0),
        total_steps=20,
        key_figures=("loss",),
        evaluation=None,
        describe=lambda number, samples: [],
    )
    settings = LoopConfig(steps_per_call=1, checkpoint_every=2, keep=2, best=best)
    with contextlib.closing(open(directory / "log", "w")) as log, Display(Console(file=log)).bar("x") as bar:
        return train(a_task, settings, make_placement(tiny.ONE_DEVICE, 1), 0, [directory], bar)


def read(directory, step: int | None) -> float:
    like = {"x": jax.ShapeDtypeStruct((), jnp.float32)}
    return float(load_params(directory / "checkpoints", "sum", like, step=step)["x"])


def test_a_run_keeps_its_best_checkpoint_and_stops(tmp_path):
    assert run(tmp_path, Best("loss", "min", patience=4)) == 8
    assert steps_of(tmp_path / "checkpoints") == [4, 6, 8], (
        "the best one, the first of two that are equal, and two more"
    )
    assert read(tmp_path, None) == 4 and read(tmp_path, 8) == 8


def test_a_run_that_was_stopped_anywhere_finds_the_same_best_checkpoint(tmp_path):
    best = Best("loss", "min", patience=4)
    run(tmp_path, best)
    whole = (tmp_path / "best.json").read_text()
    metrics = [row["loss"] for row in read_rows(tmp_path / "metrics.jsonl")]
    shutil.rmtree(tmp_path / "checkpoints" / "8")
    (tmp_path / "best.json").unlink()
    assert run(tmp_path, best) == 8
    assert (tmp_path / "best.json").read_text() == whole
    assert [row["loss"] for row in read_rows(tmp_path / "metrics.jsonl")] == metrics
    (tmp_path / "best.json").unlink()
    assert run(tmp_path, best) == 8, "it had stopped already"
    assert (tmp_path / "best.json").read_text() == whole


def test_without_it_the_newest_is_read(tmp_path):
    assert run(tmp_path, None) == 20
    assert steps_of(tmp_path / "checkpoints") == [18, 20] and read(tmp_path, None) == 20
