"""Iterations of two programs: one samples, and one learns at widths that the host reads from the samples.

XLA compiles a program for fixed shapes, so that within one program every row is as wide as the longest possible one.
Between two programs, the host reads the lengths of the batch, and may score the samples. Each program is compiled for
every width that occurs; widths are rounded up to few buckets.
"""

from collections.abc import Callable, Iterable
from typing import Generic, NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import PyTree

from rlhf_jax import processes
from rlhf_jax.runtime.programs import Placement, Program, State, Step, leading_axes

W = TypeVar("W", int, "Widths")


class Widths(NamedTuple):
    """Numbers of tokens that a learning program is compiled for."""

    row: int  # of a prompt with its response
    response: int
    packed: tuple[int, ...] = ()  # sizes of packed rows; empty: every response has a row of its own


class Plan(NamedTuple):
    """Decisions of the host about the second step of an iteration."""

    widths: Widths
    given: PyTree  # arrays for the step, with all leading axes of the batch; None: none


class Rounds(NamedTuple):
    """Rounds of sampling before an iteration learns, until every seed has enough rows."""

    split: Callable[[PyTree], Iterable[PyTree]]  # batch, with all its leading axes -> the batch of each round
    # Pure function for one seed: (rows kept so far or None, (rollout, scores)) -> (rows kept, whether they are enough)
    collect: Callable[[PyTree, PyTree], tuple[PyTree, jax.Array]]


class Scored(NamedTuple):
    """Scores of sampled rows, computed on the host."""

    scores: np.ndarray  # float32[rows]
    logged: dict[str, np.ndarray]  # float[rows] each; mean and standard deviation are logged, ignoring NaN


class HostScoring(NamedTuple):
    """Scoring on the host, between the programs: the second then gets (samples, scores), or what `rounds` kept."""

    score: Callable[[PyTree], Scored]  # samples of any number of rows, in NumPy -> scores
    rounds: Rounds | None


class TwoSteps(NamedTuple):
    """An iteration of two steps: the second learns from the samples of the first."""

    sample: Callable[[int], Step]  # width of the prompts -> step
    learn: Callable[[Widths], Step]  # its batch is what the first step found, and what the plan gives
    prompt_width: Callable[[PyTree], int]  # batch with all its leading axes, in NumPy -> width of the prompts
    # What the first step found, with all leading axes; number of the iteration; run key -> plan.
    plan: Callable[[PyTree, int, jax.Array], Plan]
    host: HostScoring | None = None


class _PerWidth(Generic[W]):
    """A program per width, compiled when the width first occurs."""

    def __init__(self, placement: Placement, step_at: Callable[[W], Step]) -> None:
        self._placement, self._step_at = placement, step_at
        self.programs: dict[W, Program] = {}

    def __call__(self, width: W, state: State, *rest: PyTree) -> tuple[State, dict, PyTree]:
        if width not in self.programs:
            self.programs[width] = self._placement.compile(self._step_at(width), state)
        return self.programs[width](state, *rest)


Gather = Callable[[PyTree, PyTree, PyTree, jax.Array], tuple[PyTree, PyTree, dict[str, np.ndarray]]]
"""Function that samples, and returns the next state, the batch of the second step, and metrics."""


class TwoPrograms:
    """Program of several iterations of all seeds. In each iteration, all rows of all seeds have the same widths."""

    def __init__(self, placement: Placement, steps: TwoSteps) -> None:
        """Create a program; its parts are compiled when a batch needs them."""
        self._steps, self._placement = steps, placement
        self._sample, self._learn = _PerWidth(placement, steps.sample), _PerWidth(placement, steps.learn)
        self._gather = (
            _scored_on_host(placement, steps, steps.host, self._sample) if steps.host else _sampled(steps, self._sample)
        )

    def __call__(
        self, state: State, frozen: PyTree, batches: PyTree, run_key: jax.Array, /
    ) -> tuple[State, dict, PyTree]:
        """Run the iterations one after the other, as `runtime.programs.Program`."""
        results = []
        for i in range(len(jax.tree.leaves(batches)[0])):
            batch = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], batches)
            state, found, logged = self._gather(state, frozen, batch, run_key)
            step = int(np.max(processes.on_host(self._placement.whole(state).step)))  # equal for all seeds
            plan = self._steps.plan(found, step, run_key)
            state, metrics, samples = self._learn(plan.widths, state, frozen, (found, plan.given), run_key)
            metrics, samples = processes.on_host((metrics, samples))
            results.append((metrics | logged, samples))
        metrics, samples = jax.tree.map(lambda *leaves: np.concatenate(leaves), *results)
        return state, metrics, samples

    def describe(self) -> str:
        """Say how many programs were compiled, and for which widths in tokens; empty before the first iteration."""
        prompts, learning = sorted(self._sample.programs), self._learn.programs
        if not learning:
            return ""
        widths = ", ".join(f"{row} ({response})" for row, response in sorted({width[:2] for width in learning}))
        return (
            f"{len(prompts) + len(learning)} programs compiled: sampling for prompts of {', '.join(map(str, prompts))} "
            f"tokens, learning for rows (responses) of {widths} tokens"
        )


def _sampled(steps: TwoSteps, sample: _PerWidth[int]) -> Gather:
    def gather(state: PyTree, frozen: PyTree, batch: PyTree, run_key: jax.Array) -> tuple[PyTree, PyTree, dict]:
        state, _, found = sample(steps.prompt_width(batch), state, frozen, batch, run_key)
        return state, found, {}

    return gather


def _scored_on_host(placement: Placement, steps: TwoSteps, host: HostScoring, sample: _PerWidth[int]) -> Gather:
    leading = leading_axes(placement.seeds) + 1
    split, collect = host.rounds or (lambda batch: [batch], None)
    if collect is not None:
        for _ in range(leading - 1):
            collect = jax.vmap(collect)
        collect = jax.jit(collect)

    def scored(state: PyTree, frozen: PyTree, batch: PyTree, run_key: jax.Array) -> tuple[PyTree, PyTree, dict]:
        state, _, samples = sample(steps.prompt_width(batch), state, frozen, batch, run_key)
        samples = processes.on_host(samples)
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[leading:]), samples)
        shape, found = jax.tree.leaves(samples)[0].shape[:leading], host.score(flat)
        logged = {name: np.asarray(values, np.float64).reshape(shape) for name, values in found.logged.items()}
        return state, (samples, np.asarray(found.scores, np.float32).reshape(shape)), logged

    def gather(state: PyTree, frozen: PyTree, batch: PyTree, run_key: jax.Array) -> tuple[PyTree, PyTree, dict]:
        kept, enough, logged = None, np.bool(False), []
        for part in split(batch):
            state, found, metrics = scored(state, frozen, part, run_key)
            lacking = ~np.asarray(enough)[..., None]  # omit rounds that a seed would not need alone
            logged.append({name: np.where(lacking, values, np.nan) for name, values in metrics.items()})
            kept, enough = (found, True) if collect is None else collect(kept, found)
            if np.all(enough):
                break
        return state, kept, _logged(logged)

    return gather


def _logged(rounds: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Compute mean and sample standard deviation of the non-NaN values of all rounds, as TRL logs `rewards/NAME`.

    They are NaN if there are too few values.
    """
    metrics = {}
    for name in rounds[0]:
        values = np.concatenate([found[name] for found in rounds], axis=-1)
        there = ~np.isnan(values)
        count = there.sum(axis=-1)
        mean = np.where(there, values, 0).sum(axis=-1) / np.maximum(count, 1)
        squares = np.where(there, np.square(values - mean[..., None]), 0).sum(axis=-1)
        metrics[f"{name}/mean"] = np.where(count > 0, mean, np.nan)
        metrics[f"{name}/std"] = np.where(count > 1, np.sqrt(squares / np.maximum(count - 1, 1)), np.nan)
    return metrics
