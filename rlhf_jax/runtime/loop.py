"""The training loop: call the program, write metrics and samples, save checkpoints, and resume interrupted runs."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree

from rlhf_jax import processes
from rlhf_jax.runtime.checkpoints import TrainState
from rlhf_jax.runtime.files import read_rows
from rlhf_jax.runtime.outputs import LoopConfig, Output, abstract_part, joined, resume, runs_of, split
from rlhf_jax.runtime.programs import Placement, Step
from rlhf_jax.runtime.progress import Bar, rounded
from rlhf_jax.runtime.termination import Terminated, noted_sigterm
from rlhf_jax.runtime.trackers import Service
from rlhf_jax.runtime.two_programs import TwoPrograms, TwoSteps
from rlhf_jax.types import RlhfError, Row

Rows = list[Row]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Evaluation of each run every `every` steps and after the last one."""

    every: int
    # Parameters of one run, and its number among those that train at once -> metrics and sample rows.
    run: Callable[[PyTree, int], tuple[dict[str, float], Rows]]

    def __post_init__(self) -> None:
        if self.every < 1:
            raise RlhfError(f"eval_every = {self.every} must be at least 1")


@dataclasses.dataclass(frozen=True)
class Task:
    """Training task of a stage."""

    step: Step | TwoSteps
    start: Callable[[], TrainState]  # make the state at step 0, stacked over several seeds; training donates its arrays
    frozen: PyTree
    batch_at: Callable[[int], PyTree]  # step, counted from 0 -> arrays [B, ...], or [seeds, B, ...]
    run_key: jax.Array  # one key, or one per seed
    total_steps: int
    key_figures: tuple[str, ...]  # metrics shown with the progress bar
    evaluation: Evaluation | None
    describe: Callable[[int, PyTree], Rows]  # step, one seed's samples -> sample rows


def train(
    task: Task,
    config: LoopConfig,
    placement: Placement,
    first_seed: int,
    directories: Sequence[Path],
    bar: Bar,
    services: Sequence[Service] = (),
) -> int:
    """Run or resume a task, writing `metrics.jsonl`, `samples.jsonl`, `checkpoints/` and TensorBoard's files.

    Args: directories of the stages that train at once, usually one; the runs are those of the first stage, one per
    seed, then those of the next. services also get the metrics.

    After SIGTERM, the current call is completed and its state saved.

    Returns: the number of steps, less than total_steps if `config.best` stopped early.

    Raises RlhfError unless total_steps is a multiple of steps_per_call, and if a loss is not finite. The steps since
    the last checkpoint are then lost. Raises Terminated after SIGTERM.
    """
    if task.total_steps % config.steps_per_call:
        raise RlhfError(
            f"{directories[0].name}: {task.total_steps} steps are not a multiple of steps_per_call = "
            f"{config.steps_per_call}: a shorter last call would compile a second program. Train for a multiple of it, "
            f"or set config.{directories[0].name}.loop.steps_per_call"
        )
    is_planned = _planned(config, task.total_steps)
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(contextlib.closing(Output(each, config, services))) for each in directories]
        done, damaged = resume(outputs)
        if damaged:
            bar.warn(f"removed damaged checkpoints ({', '.join(damaged)}); continuing from step {done}")
        elif 0 < done < task.total_steps:
            bar.say(f"{directories[0].name}: continuing from step {done} of {task.total_steps}")
        elif not done and any(output.has_metrics for output in outputs):
            bar.say(f"{directories[0].name}: interrupted before its first checkpoint; starting again from step 0")
        for output in outputs:
            output.open(done, config.steps_per_call, is_planned)
        state = task.start()
        if done:
            part = abstract_part(state, placement, len(outputs))
            state = None  # a second state need not fit in memory
            state = joined([output.checkpoints.restore(done, part) for output in outputs], placement.seeds)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params)) / placement.seeds
        bar.describe(f"{rounded(parameters)} parameters")
        state = placement.place_state(state)
        frozen = placement.put_frozen(task.frozen)
        if isinstance(task.step, TwoSteps):
            program = TwoPrograms(placement, task.step)
        else:
            program = placement.compile(task.step, state)
        clock, rounding_loss = _Clock(directories[0] / "metrics.jsonl"), _RoundingLoss()
        terminated = stack.enter_context(noted_sigterm())
        while done < task.total_steps and not any(output.out_of_patience(done) for output in outputs):
            steps = range(done, done + config.steps_per_call)
            batches = jax.tree.map(lambda *leaves: np.stack(leaves), *map(task.batch_at, steps))
            first = bar.first_call is None
            with bar.compiling() if first else contextlib.nullcontext():
                state, metrics, samples = program(state, frozen, batches, task.run_key)
                metrics, samples = processes.on_host((metrics, samples))
            _check_finite(metrics, steps, [each.parent.name for each in directories], directories[0].name)
            previous, done = done, steps.stop
            if first:
                bar.describe(f"{np.mean(metrics['num_tokens']):,.0f} tokens per step")
            evaluations: list[tuple[dict[str, float], Rows]] = [({}, [])] * placement.seeds
            if task.evaluation and _crossed(task.evaluation.every, previous, done, task.total_steps):
                bar.now("evaluating")
                params, evaluate = placement.for_evaluation(state.params), task.evaluation.run
                evaluations = [evaluate(_of_run(params, run, placement.seeds), run) for run in range(placement.seeds)]
            written: list[Rows] = []
            for output, runs in zip(outputs, runs_of(placement.seeds, len(outputs)), strict=True):
                rows = _metric_rows(metrics, steps, first_seed, runs, placement.seeds)
                output.samples.write(_sample_rows(samples, steps, first_seed, runs, placement.seeds, task.describe))
                for seed, (found, described) in enumerate(evaluations[runs.start : runs.stop]):
                    rows[seed - len(runs)].update({name: _number(np.asarray(x)) for name, x in found.items()})
                    output.samples.write({"step": done, **each} | {"seed": first_seed + seed} for each in described)
                written.append(rows)
            if lost := rounding_loss.after([row for rows in written for row in rows], done / task.total_steps):
                bar.warn(lost)
            times = clock.read(config.steps_per_call, [row for rows in written for row in rows if row["step"] == done])
            for output, rows in zip(outputs, written, strict=True):
                rows[-1].update(times)
                output.log(rows)
            last = written[-1][-1]
            bar.update(
                done,
                task.total_steps,
                {name: last[name] for name in task.key_figures if last.get(name) is not None},
            )
            ends = processes.any_of(terminated())
            if ends or is_planned(done):
                parts = split(placement.whole(state), placement.seeds, len(outputs))
                for output, part in zip(outputs, parts, strict=True):
                    output.save(part, done, is_planned)
            if ends:
                raise Terminated
        for output in outputs:
            output.checkpoints.keep_only(is_planned)
            if output.best:
                output.best.write(output.directory)
                bar.say(
                    f"{output.directory.name}: the best checkpoint is that of step {output.best.step}, of {done} steps"
                )
        if isinstance(program, TwoPrograms) and (compiled := program.describe()):
            bar.say(f"{directories[0].name}: {compiled}")
    return done


class _Clock:
    """Measure the wall time of the stage, including runs before an interruption, for the `time/` metrics."""

    def __init__(self, metrics: Path) -> None:
        rows = read_rows(metrics)
        self._before = rows[-1].get("time/elapsed", 0.0) if rows else 0.0
        self._start = self._last = time.perf_counter()

    def read(self, steps: int, last_rows: Rows) -> dict[str, float]:
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        tokens = sum(row["num_tokens"] for row in last_rows)
        return {
            "time/elapsed": self._before + now - self._start,
            "time/seconds_per_step": elapsed / steps,
            "time/tokens_per_second": tokens * steps / elapsed,
        }


class _RoundingLoss:
    """Share of the updates so far that survived rounding, each update weighted by its learning rate."""

    def __init__(self) -> None:
        self._kept, self._total, self._updates, self._warned = 0.0, 0.0, 0, False

    def after(self, rows: Rows, progress: float) -> str | None:
        """Return a warning, once, if less than half of the updates survived.

        The warning waits for a tenth of the run and 20 updates, or for the end of the run. Earlier shares are
        unreliable: learning rates are small during warm-up, and stochastic rounding of few weights is noisy.
        """
        for row in rows:
            share, rate = row.get("update_survived"), row.get("learning_rate")
            if share is not None and rate:
                self._kept, self._total = self._kept + rate * share, self._total + rate
                self._updates += 1
        early = progress < 1 and (progress < 0.1 or self._updates < 20)
        if self._warned or early or not self._total or self._kept >= 0.5 * self._total:
            return None
        self._warned = True
        return (
            f"{self._kept / self._total:.0%} of the updates survived rounding (update_survived): this learning rate is "
            "too small for the weights' dtype. Omit param_dtype to train in float32, or set "
            "optimizer.low_precision to 'masters' or 'stochastic'"
        )


def _metric_rows(metrics: dict[str, np.ndarray], steps: range, first_seed: int, runs: range, of: int) -> Rows:
    return [
        {
            "step": step + 1,
            "seed": first_seed + seed,
            **{name: _number(_pick(values, index, run, of)) for name, values in metrics.items()},
        }
        for index, step in enumerate(steps)
        for seed, run in enumerate(runs)
    ]


def _of_run(params: PyTree, run: int, of: int) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[run], params) if of > 1 else params


def _sample_rows(
    samples: PyTree, steps: range, first_seed: int, runs: range, of: int, describe: Callable[[int, PyTree], Rows]
) -> Rows:
    return [
        {"step": step + 1, "seed": first_seed + seed, **row}
        for index, step in enumerate(steps)
        for seed, run in enumerate(runs)
        for row in describe(step + 1, jax.tree.map(lambda leaf, i=index, k=run: _pick(leaf, i, k, of), samples))
    ]


def _number(value: np.ndarray | np.generic) -> float | None:
    """Convert to a Python number, or None if it is not finite, which JSON cannot represent."""
    return value.item() if np.isfinite(value) else None


def _pick(leaf: np.ndarray, index: int, run: int, of: int) -> np.ndarray | np.generic:
    return leaf[index, run] if of > 1 else leaf[index]


def _check_finite(metrics: dict[str, np.ndarray], steps: range, points: Sequence[str], stage: str) -> None:
    bad = ~np.isfinite(metrics["loss"])
    if bad.any():
        where = np.argwhere(bad)[0]
        step = steps[int(where[0])]
        of = f" of {points[int(where[1]) * len(points) // bad.shape[1]]}" if len(points) > 1 else ""
        raise RlhfError(
            f"{stage}: the loss{of} is not finite at step {step + 1} (batch {step}): lower the learning rate or "
            "inspect that batch; the last checkpoint is kept"
        )


def _planned(config: LoopConfig, total: int) -> Callable[[int], bool]:
    """Return whether a checkpoint is due at a step. After SIGTERM there is one at another step too."""
    return lambda step: _crossed(config.checkpoint_every, step - config.steps_per_call, step, total)


def _crossed(every: int, previous: int, done: int, total: int) -> bool:
    return done // every > previous // every or done == total
