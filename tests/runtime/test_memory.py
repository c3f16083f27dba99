"""Memory of training: one state, one more while a checkpoint is written, and frozen networks once."""

import contextlib

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from rich.console import Console

from rlhf_jax.loading.trainable import init_trainable
from rlhf_jax.runtime.checkpoints import TrainState
from rlhf_jax.runtime.loop import Evaluation, LoopConfig, Task, train
from rlhf_jax.runtime.programs import make_placement
from rlhf_jax.runtime.progress import Display
from tests.support import tiny

TRAINED, FROZEN = 12_347, 12_391  # sizes that no other array has


def alive(size: int) -> int:
    """Number of buffers of this size that a live array refers to."""
    return len({array.unsafe_buffer_pointer() for array in jax.live_arrays() if array.shape == (size,)})


def step(state, frozen, batch, run_key):
    """Add a number to all parameters."""
    params = {"policy": {"x": state.params["policy"]["x"] + jnp.sum(batch["x"]) * frozen["x"][0]}}
    metrics = {"loss": jnp.float32(0), "num_tokens": jnp.int32(2)}
    return TrainState(state.step + 1, params, state.opt_state), metrics, ()


def test_one_state_is_alive_and_two_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    found: list[tuple[str, int, int]] = []

    def evaluate(params, run):
        found.append(("evaluation", alive(TRAINED), alive(FROZEN)))
        return {}, []

    save = ocp.CheckpointManager.save

    def recorded(*args, **kwargs):
        found.append(("save", alive(TRAINED), alive(FROZEN)))
        return save(*args, **kwargs)

    monkeypatch.setattr(ocp.CheckpointManager, "save", recorded)

    def run(steps: int, checkpoint_every: int) -> None:
        task = Task(
            step=step,
            start=lambda: TrainState(jnp.int32(0), {"policy": {"x": jnp.zeros(TRAINED)}}, jnp.int32(0)),
            frozen={"x": jnp.ones(FROZEN)},
            batch_at=lambda index: {"x": jnp.ones(2)},
            run_key=jax.random.key(0),
            total_steps=steps,
            key_figures=(),
            evaluation=Evaluation(1, evaluate),
            describe=lambda number, samples: [],
        )
        with contextlib.closing(open(tmp_path / "log", "w")) as log, Display(Console(file=log)).bar("x") as bar:
            config = LoopConfig(steps_per_call=1, checkpoint_every=checkpoint_every)
            train(task, config, make_placement(tiny.ONE_DEVICE, 1), 0, [tmp_path], bar)

    run(2, checkpoint_every=2)
    assert found == [("evaluation", 1, 1), ("evaluation", 1, 1), ("save", 2, 1)]
    found.clear()
    run(4, checkpoint_every=1)  # from the checkpoint; the copy of step 3 may still be written at the evaluation of 4
    assert [entry for entry in found if entry[0] == "save"] == [("save", 2, 1)] * 2
    assert found[0] == ("evaluation", 1, 1)
    assert alive(TRAINED) == 0


def test_trained_parameters_are_copies_which_may_be_donated():
    params = tiny.policy_params()
    trained = init_trainable(tiny.POLICY, params, jax.random.key(0)).trained
    jax.tree.map(lambda leaf: leaf.delete(), trained)
    assert all(not leaf.is_deleted() for leaf in jax.tree.leaves(params))
