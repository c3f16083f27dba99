"""The loop writes what happened, stops at what is not finite, and goes on where files and checkpoint agree."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from rlhf_jax.runtime.checkpoints import TrainState
from rlhf_jax.runtime.files import RowWriter, read_rows, write_json, write_rows
from rlhf_jax.runtime.loop import Evaluation, LoopConfig, Task, train
from rlhf_jax.runtime.programs import make_placement
from rlhf_jax.runtime.progress import Display
from rlhf_jax.types import RlhfError
from tests.support import tiny


def step(state, frozen, batch, run_key):
    """Adds up the batches; the loss is what is left to 10, and its root has no value past 10."""
    total = state.params["sum"]["x"] + jnp.sum(batch["x"]) * frozen
    loss = jnp.sqrt(10 - total)
    updates = state.opt_state["count"] + 1
    state = TrainState(state.step + 1, {"sum": {"x": total}}, {"count": updates})
    metrics = {"loss": loss, "total": total, "updates": updates, "num_tokens": jnp.int32(2)}
    return state, metrics, {"row": batch["x"]}


def task(steps: int, **changes) -> Task:
    return dataclasses.replace(
        Task(
            step=step,
            start=lambda: TrainState(jnp.int32(0), {"sum": {"x": jnp.float32(0)}}, {"count": jnp.int32(0)}),
            frozen=jnp.float32(1),
            batch_at=lambda index: {"x": jnp.ones(2) * (index == 0) + 0.25},
            run_key=jax.random.key(0),
            total_steps=steps,
            key_figures=("loss",),
            evaluation=Evaluation(4, lambda params: ({"eval/total": float(params["sum"]["x"])}, [{"text": "a"}])),
            describe=lambda number, samples: [{"seen": float(samples["row"][0])}] if number == 1 else [],
        ),
        **changes,
    )


def run(a_task: Task, directory, *, steps_per_call: int = 2, checkpoint_every: int = 4, keep: int = 2) -> None:
    seeds = a_task.run_key.size
    settings = LoopConfig(steps_per_call, checkpoint_every, keep)
    with contextlib.closing(open(directory / "log", "w")) as log, Display(Console(file=log)).bar("x") as bar:
        train(a_task, settings, make_placement(tiny.ONE_DEVICE, seeds), 7, directory, bar)


def test_numbers_that_are_not_finite_are_null_in_metrics(tmp_path):
    def overflowing(state, frozen, batch, run_key):
        state, metrics, samples = step(state, frozen, batch, run_key)
        return state, metrics | {"ratio": metrics["total"] * jnp.inf, "apart": metrics["total"] * jnp.nan}, samples

    evaluation = Evaluation(4, lambda params: ({"eval/total": float("nan")}, []))
    run(task(4, step=overflowing, evaluation=evaluation), tmp_path)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["ratio"] for row in rows] == [row["apart"] for row in rows] == [None] * 4
    assert rows[-1]["eval/total"] is None


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_no_file_gets_a_number_that_is_not_finite(value, tmp_path):
    nested = {"step": 1, "kl": [0.5, {"k1": value}], "text": "NaN", "se": None}
    message = rf"kl\.1\.k1 = {value} is not finite"
    for write in (lambda path: write_rows(path, [nested]), lambda path: write_json(path, nested)):
        with pytest.raises(RlhfError, match=f"rows.jsonl: {message}"):
            write(tmp_path / "rows.jsonl")
    assert not list(tmp_path.iterdir())
    with contextlib.closing(RowWriter(tmp_path / "rows.jsonl", 0)) as writer:
        with pytest.raises(RlhfError, match=f"rows.jsonl: {message}"):
            writer.write([nested])
        writer.write([{"step": 1, "text": "NaN"}])
    assert read_rows(tmp_path / "rows.jsonl") == [{"step": 1, "text": "NaN"}]


def test_rows_evaluations_and_samples_are_written(tmp_path):
    run(task(6), tmp_path)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["total"] for row in rows] == [2.5, 3.0, 3.5, 4.0, 4.5, 5.0]
    assert {row["seed"] for row in rows} == {7}
    assert {row["step"]: row["eval/total"] for row in rows if "eval/total" in row} == {4: 4.0, 6: 5.0}
    assert read_rows(tmp_path / "samples.jsonl") == [
        {"step": 1, "seed": 7, "seen": 1.25},
        {"step": 4, "text": "a", "seed": 7},
        {"step": 6, "text": "a", "seed": 7},
    ]


def test_every_seed_is_evaluated_and_as_many_checkpoints_stay_as_are_asked_for(tmp_path):
    start = TrainState(jnp.int32([0, 0]), {"sum": {"x": jnp.float32([0, 1])}}, {"count": jnp.int32([0, 0])})
    batches = {"x": jnp.full((2, 2), 0.25)}
    keys = jax.random.split(jax.random.key(0))
    run(
        task(8, start=lambda: start, batch_at=lambda index: batches, run_key=keys), tmp_path, checkpoint_every=2, keep=3
    )
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["seed"], row["eval/total"]) for row in rows if "eval/total" in row] == [
        (4, 7, 2.0),
        (4, 8, 3.0),
        (8, 7, 4.0),
        (8, 8, 5.0),
    ]
    samples = read_rows(tmp_path / "samples.jsonl")
    assert [(row["step"], row["seed"]) for row in samples if "text" in row] == [(4, 7), (4, 8), (8, 7), (8, 8)]
    kept = {int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()}
    assert kept == {4, 6, 8}


def test_a_longer_run_goes_on_from_the_checkpoint(tmp_path):
    """With the batch after the last one, and the state of the optimiser."""
    batches = {"batch_at": lambda index: {"x": jnp.full(2, index / 16)}}
    run(task(4, **batches), tmp_path)
    write_rows(tmp_path / "metrics.jsonl", [*read_rows(tmp_path / "metrics.jsonl"), {"step": 5, "total": -1.0}])
    run(task(8, **batches), tmp_path)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [8 * row["total"] for row in rows] == [0, 1, 3, 6, 10, 15, 21, 28]
    assert [row["updates"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    wild = {"batch_at": lambda index: {"x": jnp.ones(2) * (100.0 if index == 5 else 0.25)}}
    with pytest.raises(RlhfError, match=r"not finite at step 6 \(batch 5\)"):
        run(task(8, **wild), tmp_path)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    run(task(8), tmp_path)
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 8


def test_steps_that_are_no_whole_calls_are_refused(tmp_path):
    with pytest.raises(RlhfError, match="7 steps are not a multiple of steps_per_call = 2"):
        run(task(7), tmp_path)


def test_a_row_file_is_cut_back_to_a_step_and_to_whole_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    writer = RowWriter(path, after_step=2)
    writer.write([{"step": 3, "new": True}])
    writer.close()
    assert read_rows(path) == [{"step": 1}, {"step": 2}, {"step": 3, "new": True}]
