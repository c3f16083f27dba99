"""The loop writes what happened, stops at what is not finite, and goes on where files and checkpoint agree."""

import contextlib
import dataclasses
import os
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from rlhf_jax.runtime.checkpoints import HASHES, TrainState, load_params, steps_of
from rlhf_jax.runtime.files import RowWriter, read_rows, write_json, write_rows
from rlhf_jax.runtime.loop import Evaluation, LoopConfig, Task, train
from rlhf_jax.runtime.programs import make_placement
from rlhf_jax.runtime.progress import Display
from rlhf_jax.runtime.termination import Terminated
from rlhf_jax.types import RlhfError
from tests.support import tiny
from tests.support.event_files import scalars


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
            evaluation=Evaluation(4, lambda params, run: ({"eval/total": float(params["sum"]["x"])}, [{"text": "a"}])),
            describe=lambda number, samples: [{"seen": float(samples["row"][0])}] if number == 1 else [],
        ),
        **changes,
    )


def run(a_task: Task, directory, *, steps_per_call: int = 2, checkpoint_every: int = 4, keep: int = 2) -> None:
    seeds = a_task.run_key.size
    settings = LoopConfig(steps_per_call, checkpoint_every, keep)
    with contextlib.closing(open(directory / "log", "w")) as log, Display(Console(file=log)).bar("x") as bar:
        train(a_task, settings, make_placement(tiny.ONE_DEVICE, seeds), 7, [directory], bar)


def test_numbers_that_are_not_finite_are_null_in_metrics(tmp_path):
    def overflowing(state, frozen, batch, run_key):
        state, metrics, samples = step(state, frozen, batch, run_key)
        return state, metrics | {"ratio": metrics["total"] * jnp.inf, "apart": metrics["total"] * jnp.nan}, samples

    evaluation = Evaluation(4, lambda params, run: ({"eval/total": float("nan")}, []))
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
    assert "continuing from step 4 of 8" in " ".join((tmp_path / "log").read_text().split())
    rows = read_rows(tmp_path / "metrics.jsonl")
    copied = scalars(tmp_path / "tensorboard" / "seed_7")
    assert [copied[step, "total"] for step in range(1, 9)] == [[row["total"]] for row in rows]
    assert [8 * row["total"] for row in rows] == [0, 1, 3, 6, 10, 15, 21, 28]
    assert [row["updates"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_run_without_a_checkpoint_starts_again_and_a_complete_one_does_not_continue(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "seed": 7, "total": -1.0}\n')
    run(task(4), tmp_path)
    printed = " ".join((tmp_path / "log").read_text().split())
    assert "interrupted before its first checkpoint; starting again from step 0" in printed
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    run(task(4), tmp_path)
    assert "step" not in (tmp_path / "log").read_text()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    wild = {"batch_at": lambda index: {"x": jnp.ones(2) * (100.0 if index == 5 else 0.25)}}
    with pytest.raises(RlhfError, match=r"not finite at step 6 \(batch 5\)"):
        run(task(8, **wild), tmp_path)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    run(task(8), tmp_path)
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 8


def test_sigterm_ends_a_run_after_its_call_with_a_checkpoint(tmp_path):
    def batch_at(index):
        if index == 2:  # the first step of the second call, before the first checkpoint
            os.kill(os.getpid(), signal.SIGTERM)
        return {"x": jnp.ones(2) / 16}

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated) as ended:
        run(task(8, batch_at=batch_at), tmp_path, checkpoint_every=100)
    assert ended.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    assert steps_of(tmp_path / "checkpoints") == [4] and len(read_rows(tmp_path / "metrics.jsonl")) == 4
    run(task(8, batch_at=lambda index: {"x": jnp.ones(2) / 16}), tmp_path, checkpoint_every=100)
    assert steps_of(tmp_path / "checkpoints") == [8], "as if nothing had happened"
    assert [8 * row["total"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 7, 8]


def largest(checkpoint: Path) -> Path:
    return max(
        (path for path in checkpoint.rglob("*") if path.is_file() and path.name != HASHES),
        key=lambda path: path.stat().st_size,
    )


def flip_a_bit(checkpoint: Path) -> None:
    path = largest(checkpoint)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "bit": flip_a_bit,
    "short": lambda checkpoint: os.truncate(largest(checkpoint), 10),
    "missing": lambda checkpoint: largest(checkpoint).unlink(),
    "item": lambda checkpoint: shutil.rmtree(checkpoint / "rest"),
    "hashes": lambda checkpoint: (checkpoint / HASHES).write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_and_said(damage, tmp_path):
    whole, disturbed = tmp_path / "whole", tmp_path / "disturbed"
    for directory in (whole, disturbed):
        directory.mkdir()
        run(task(8), directory, checkpoint_every=2, keep=4)
    for step in (8, 6):
        DAMAGES[damage](disturbed / "checkpoints" / str(step))
    run(task(8), disturbed, checkpoint_every=2, keep=4)
    assert "removed damaged checkpoints (8/" in (said := (disturbed / "log").read_text())
    assert "continuing from step 4" in said
    rows, others = (
        [{name: value for name, value in row.items() if not name.startswith("time/")} for row in found]
        for found in (read_rows(directory / "metrics.jsonl") for directory in (whole, disturbed))
    )
    assert rows == others and steps_of(disturbed / "checkpoints") == [2, 4, 6, 8]


def test_a_run_starts_again_if_all_its_checkpoints_are_damaged(tmp_path):
    run(task(4), tmp_path)
    flip_a_bit(tmp_path / "checkpoints" / "4")
    run(task(4), tmp_path)
    assert "continuing from step 0" in (tmp_path / "log").read_text()
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 4


def test_weights_of_a_damaged_checkpoint_are_not_loaded(tmp_path):
    run(task(4), tmp_path)
    like = {"x": jax.ShapeDtypeStruct((), jnp.float32)}
    assert load_params(tmp_path / "checkpoints", "sum", like, step=None)["x"] == 4.0
    flip_a_bit(tmp_path / "checkpoints" / "4" / "sum")
    with pytest.raises(RlhfError, match="checkpoints/4 is damaged"):
        load_params(tmp_path / "checkpoints", "sum", like, step=None)


def test_a_checkpoint_without_hashes_is_one_of_an_older_release(tmp_path):
    run(task(4), tmp_path)
    (tmp_path / "checkpoints" / "4" / HASHES).unlink()
    run(task(8), tmp_path)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert "damaged" not in (tmp_path / "log").read_text()


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
