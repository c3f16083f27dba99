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
from rlhf_jax.config import Count, check_ranges
from rlhf_jax.runtime.best import Best, BestSoFar
from rlhf_jax.runtime.checkpoints import Checkpoints, TrainState
from rlhf_jax.runtime.files import RowWriter, read_rows
from rlhf_jax.runtime.programs import Placement, Step
from rlhf_jax.runtime.progress import Bar, rounded
from rlhf_jax.runtime.termination import Terminated, noted_sigterm
from rlhf_jax.runtime.trackers import Service, opened
from rlhf_jax.runtime.two_programs import TwoPrograms, TwoSteps
from rlhf_jax.types import RlhfError, Row

Rows = list[Row]


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """Numbers of steps per device call and between checkpoints."""

    steps_per_call: Count  # steps per device call; logging and checkpoints happen between calls
    checkpoint_every: Count  # steps between checkpoints
    keep: Count = 2  # number of newest checkpoints to keep
    best: Best | None = None  # keep the best checkpoint by a metric, for later stages; None: they read the newest

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Evaluation of each seed every `every` steps and after the last one."""

    every: int
    run: Callable[[PyTree], tuple[dict[str, float], Rows]]  # one seed's params -> metrics and sample rows

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
    directory: Path,
    bar: Bar,
    services: Sequence[Service] = (),
) -> int:
    """Run or resume a task, writing `metrics.jsonl`, `samples.jsonl`, `checkpoints/` and TensorBoard's files.

    Args: services also get the metrics.

    After SIGTERM, the current call is completed and its state saved.

    Returns: the number of steps, less than total_steps if `config.best` stopped early.

    Raises RlhfError unless total_steps is a multiple of steps_per_call, and if a loss is not finite. The steps since
    the last checkpoint are then lost. Raises Terminated after SIGTERM.
    """
    if task.total_steps % config.steps_per_call:
        raise RlhfError(
            f"{directory.name}: {task.total_steps} steps are not a multiple of steps_per_call = "
            f"{config.steps_per_call}: a shorter last call would compile a second program"
        )
    with contextlib.ExitStack() as stack:
        best = None if config.best is None else BestSoFar(config.best)
        kept = Checkpoints(directory / "checkpoints", config.keep, best)
        checkpoints = stack.enter_context(contextlib.closing(kept))
        done, damaged = checkpoints.newest_whole()
        if damaged:
            bar.warn(f"removed damaged checkpoints ({', '.join(damaged)}); continuing from step {done}")
        metric_rows, sample_rows = (
            stack.enter_context(contextlib.closing(RowWriter(directory / f"{name}.jsonl", done)))
            for name in ("metrics", "samples")
        )
        trackers = stack.enter_context(opened(services, directory)) if processes.is_first() else []
        if best and done:
            _replay(best, config, directory, done, task.total_steps)
        state = task.start()
        if done:
            like, state = placement.restored(state), None  # a second state need not fit in memory
            state = checkpoints.restore(done, like)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params)) / placement.seeds
        bar.describe(f"{rounded(parameters)} parameters")
        state = placement.place_state(state)
        frozen = placement.put_frozen(task.frozen)
        if isinstance(task.step, TwoSteps):
            program = TwoPrograms(placement, task.step)
        else:
            program = placement.compile(task.step, state)
        clock, rounding_loss = _Clock(directory / "metrics.jsonl"), _RoundingLoss()
        terminated, is_planned = stack.enter_context(noted_sigterm()), _planned(config, task.total_steps)
        while done < task.total_steps and not (best and best.out_of_patience(done)):
            steps = range(done, done + config.steps_per_call)
            batches = jax.tree.map(lambda *leaves: np.stack(leaves), *map(task.batch_at, steps))
            first = bar.first_call is None
            with bar.compiling() if first else contextlib.nullcontext():
                state, metrics, samples = program(state, frozen, batches, task.run_key)
                metrics, samples = processes.on_host((metrics, samples))
            _check_finite(metrics, steps, directory.name)
            previous, done = done, steps.stop
            if first:
                bar.describe(f"{np.mean(metrics['num_tokens']):,.0f} tokens per step")

            rows = _metric_rows(metrics, steps, first_seed, placement.seeds)
            sample_rows.write(_sample_rows(samples, steps, first_seed, placement.seeds, task.describe))
            if task.evaluation and _crossed(task.evaluation.every, previous, done, task.total_steps):
                bar.now("evaluating")
                params = placement.for_evaluation(state.params)
                for seed, row in enumerate(rows[-placement.seeds :]):
                    evaluation, described = task.evaluation.run(_of_seed(params, seed, placement.seeds))
                    row.update({name: _number(np.asarray(value)) for name, value in evaluation.items()})
                    sample_rows.write({"step": done, **found} | {"seed": first_seed + seed} for found in described)
            if lost := rounding_loss.after(rows, done / task.total_steps):
                bar.warn(lost)
            rows[-1].update(clock.read(config.steps_per_call, rows[-placement.seeds :]))
            metric_rows.write(rows)
            for tracker in trackers:
                tracker.write(rows)
            if best:
                best.log(rows)
            bar.update(
                done,
                task.total_steps,
                {name: rows[-1][name] for name in task.key_figures if rows[-1].get(name) is not None},
            )
            ends = processes.any_of(terminated())
            if ends or is_planned(done):
                metric_rows.flush()
                sample_rows.flush()
                if is_planned(done):  # the kept ones are then those of a run that nothing ended
                    if best:
                        best.at_checkpoint(done)
                    checkpoints.keep_only(is_planned)
                checkpoints.save(placement.whole(state))
            if ends:
                raise Terminated
        checkpoints.keep_only(is_planned)
        if best:
            best.write(directory)
            bar.say(f"{directory.name}: the best checkpoint is that of step {best.step}, of {done} steps")
        if isinstance(program, TwoPrograms) and (compiled := program.describe()):
            bar.say(f"{directory.name}: {compiled}")
    return done


def _replay(best: BestSoFar, config: LoopConfig, directory: Path, done: int, total: int) -> None:
    """Find the best of the checkpoints up to `done` from the logged rows."""
    rows = read_rows(directory / "metrics.jsonl")
    for step in range(config.steps_per_call, done + 1, config.steps_per_call):
        best.log(row for row in rows if step - config.steps_per_call < row["step"] <= step)
        if _crossed(config.checkpoint_every, step - config.steps_per_call, step, total):
            best.at_checkpoint(step)


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


def _metric_rows(metrics: dict[str, np.ndarray], steps: range, first_seed: int, seeds: int) -> Rows:
    return [
        {
            "step": step + 1,
            "seed": first_seed + seed,
            **{name: _number(_pick(values, index, seed, seeds)) for name, values in metrics.items()},
        }
        for index, step in enumerate(steps)
        for seed in range(seeds)
    ]


def _of_seed(params: PyTree, seed: int, seeds: int) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[seed], params) if seeds > 1 else params


def _sample_rows(
    samples: PyTree, steps: range, first_seed: int, seeds: int, describe: Callable[[int, PyTree], Rows]
) -> Rows:
    return [
        {"step": step + 1, "seed": first_seed + seed, **row}
        for index, step in enumerate(steps)
        for seed in range(seeds)
        for row in describe(step + 1, jax.tree.map(lambda leaf, i=index, k=seed: _pick(leaf, i, k, seeds), samples))
    ]


def _number(value: np.ndarray | np.generic) -> float | None:
    """Convert to a Python number, or None if it is not finite, which JSON cannot represent."""
    return value.item() if np.isfinite(value) else None


def _pick(leaf: np.ndarray, index: int, seed: int, seeds: int) -> np.ndarray | np.generic:
    return leaf[index, seed] if seeds > 1 else leaf[index]


def _check_finite(metrics: dict[str, np.ndarray], steps: range, stage: str) -> None:
    bad = ~np.isfinite(metrics["loss"])
    if bad.any():
        step = steps[int(np.argwhere(bad)[0][0])]
        raise RlhfError(
            f"{stage}: the loss is not finite at step {step + 1} (batch {step}): lower the learning rate or inspect "
            "that batch; the last checkpoint is kept"
        )


def _planned(config: LoopConfig, total: int) -> Callable[[int], bool]:
    """Return whether a checkpoint is due at a step. After SIGTERM there is one at another step too."""
    return lambda step: _crossed(config.checkpoint_every, step - config.steps_per_call, step, total)


def _crossed(every: int, previous: int, done: int, total: int) -> bool:
    return done // every > previous // every or done == total
