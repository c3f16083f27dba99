"""Training on a fixed table: the update and the training run shared by sft, reward_model, dpo and kto."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PRNGKeyArray, PyTree

from rlhf_jax.config import Count, Positive, check_ranges
from rlhf_jax.core.metrics import Metric, values
from rlhf_jax.core.slices import in_slices
from rlhf_jax.data.batching import MULTIPLE, BatchOrder, Buckets
from rlhf_jax.data.layouts import (
    LEAST_GAIN,
    Groups,
    Layout,
    PackedSize,
    PackedSizes,
    layouts,
    needed_by,
    packed,
    packed_width,
)
from rlhf_jax.data.ragged import RowWidths, Table, widest
from rlhf_jax.loading.context import Context, steps_for
from rlhf_jax.loading.trainable import N, depth_advice, dropout_keys, stack
from rlhf_jax.runtime.checkpoints import TrainState
from rlhf_jax.runtime.loop import Evaluation, LoopConfig, Rows, Task, train
from rlhf_jax.runtime.optimizers import (
    OptimizerConfig,
    gradients,
    learning_rate,
    make_optimizer,
    micro_batches,
    update,
    warmup_warning,
)
from rlhf_jax.runtime.programs import PER_RUN, Step, check_divides
from rlhf_jax.runtime.rounding import update_key
from rlhf_jax.types import Json

Batch = TypeVar("Batch", bound=tuple)
Loss = tuple[Array, dict[str, Metric]]

STEPS_PER_PROGRAM = 250
"""Steps per planned size of packed rows: in fewer, another size saves less time than its program takes to compile."""

MOST_PLANNED = 256
"""Most steps that are laid out to plan the sizes of packed rows."""


@dataclasses.dataclass(frozen=True)
class Updates(Generic[N]):
    """The updates of a run. `network` is the trained network; its adapter, if any, sets the dropout."""

    network: N
    optimizer: OptimizerConfig
    steps: int
    axes: tuple[str, ...]

    def init(self, params: dict[str, PyTree], **untrained: PyTree) -> TrainState:
        """Make the state before the first step.

        Args: params are donated to the first step, so that nothing else may use them; untrained parameters are saved in
        checkpoints too.
        """
        return TrainState(jnp.int32(0), params | untrained, make_optimizer(self.optimizer, self.steps).init(params))

    def by_slices(self, function: Callable[[Batch], PyTree], batch: Batch) -> PyTree:
        """Apply a forward pass to micro-batches of a batch, one after the other; results have the batch's order."""
        devices = jax.lax.axis_size(self.axes) if self.axes else 1
        rows = len(jax.tree.leaves(batch)[0]) * devices
        return in_slices(function, batch, micro_batches(rows, self.optimizer.micro_batch, devices))

    def update(
        self,
        state: TrainState,
        batch: Batch,
        run_key: PRNGKeyArray,
        loss_fn: Callable[[PyTree, Batch, Key[Array, "B"] | None], Loss],
        *,
        weight: Callable[[Batch], Array],
        trained: Sequence[str] | None = None,
    ) -> tuple[TrainState, dict[str, Array]]:
        """Take one step of the optimiser; return the new state and the numbers to log.

        Args: loss_fn takes parameters, rows, and the rows' keys for adapter dropout; weight counts the items that the
        loss averages over, as in `gradients`; trained are the names of the parameters to update (None: all).
        """
        rows = len(jax.tree.leaves(batch)[0])
        keys = dropout_keys(self.network, run_key, state.step, rows, self.axes)
        params = {name: state.params[name] for name in trained or state.params}
        loss, metrics, grads = gradients(
            self.optimizer,
            lambda params, given: loss_fn(params, *given),
            params,
            (batch, keys),
            lambda given: weight(given[0]),
            self.axes,
        )
        optimizer, key = make_optimizer(self.optimizer, self.steps), update_key(run_key, state.step)
        params, opt_state, norms = update(optimizer, grads, params, state.opt_state, self.axes, key=key)
        rate = jnp.asarray(learning_rate(self.optimizer, self.steps)(state.step))
        logged = values(metrics) | {"loss": loss, **norms, "learning_rate": rate}
        return TrainState(state.step + 1, state.params | params, opt_state), logged


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfflineConfig:
    """Fields of every stage that trains on a table."""

    optimizer: OptimizerConfig
    batch_size: Count  # rows in an update: demonstrations, pairs, responses, or prompts with their ranked responses
    epochs: Positive  # passes over the training rows, rounded to whole calls of loop.steps_per_call, at least one
    eval_every: Count  # steps between evaluations
    loop: LoopConfig
    eval_rows: Count | None = 1024  # held-out rows of an evaluation, the same ones every time; None: all
    # Pack several sequences into a row if their lengths differ, so that little is computed on padding; changes results
    # by rounding only.
    pack: bool = True
    # Most lengths that unpacked batches are padded to, each compiled once; 1: the length of the longest row.
    widths: Count = 6

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True)
class OfflineMethod(Generic[N]):
    """Functions and frozen parameters of a method, for `train_offline`."""

    step: Callable[[Updates[N]], Step]
    start: Callable[[Updates[N], int], TrainState]  # run number -> state before the first step
    frozen: dict[str, PyTree]
    # Parameters of one run, and its number among those that train at once -> metrics and sample rows.
    evaluate: Callable[[PyTree, int], tuple[dict[str, float], Rows]]
    key_figures: tuple[str, ...]  # metrics shown beside the bar


def train_offline(
    config: OfflineConfig,
    context: Context,
    network: N,
    data: Table[Batch],
    method: OfflineMethod[N],
    *,
    runs: Sequence[int],
) -> dict[str, Json]:
    """Train on a table and return the summary's fields about steps and widths.

    Args: data holds all training rows; runs are the numbers k of the runs, trained at once in one program. The row
    order of run k comes from seed + k, as do its random keys.
    """
    steps = steps_for(config.epochs, len(data.lengths), config.batch_size, config.loop.steps_per_call)
    placement = context.placement(len(runs))
    updates = Updates(network, config.optimizer, steps, placement.axes)
    batches = make_batches(config, context, data, steps, runs)
    task = Task(
        step=method.step(updates),
        start=lambda: stack([method.start(updates, k) for k in runs]),
        frozen=method.frozen | ({PER_RUN: context.per_run} if context.per_run else {}),
        batch_at=batches.at,
        run_key=stack([context.key("run", k) for k in runs]),
        total_steps=steps,
        key_figures=method.key_figures,
        evaluation=Evaluation(config.eval_every, method.evaluate),
        describe=lambda step, samples: [],
    )
    if warning := warmup_warning(config.optimizer, steps):
        context.bar.warn(warning)
    context.bar.advise(depth_advice(network))
    services = context.runtime.trackers
    done = train(task, config.loop, placement, context.seed, context.directories, context.bar, services)
    context.bar.say(f"{context.name}: {batches.described()}")
    return {"steps": done, "widths": batches.widths}


def make_batches(
    config: OfflineConfig, context: Context, data: Table[Batch], steps: int, runs: Sequence[int]
) -> "PackedBatches[Batch] | PaddedBatches[Batch]":
    """Make the batches of all runs, packed if the config asks for it and the lengths of the sequences differ."""
    orders = [BatchOrder(len(data.lengths), config.batch_size, context.seed + k) for k in runs]
    if config.pack and data.lengths.mean() <= LEAST_GAIN * _longest(data):
        devices = context.runtime.row_devices
        check_divides(config.batch_size, devices)
        groups = Groups(devices, micro_batches(config.batch_size, config.optimizer.micro_batch, devices))
        return PackedBatches(data, orders, groups, steps, config.loop.steps_per_call)
    return PaddedBatches(config, data, orders, steps)


class PackedBatches(Generic[Batch]):
    """Batches of all runs with a packing, of one size in each call of the program."""

    def __init__(self, data: Table[Batch], orders: list[BatchOrder], groups: Groups, steps: int, per_call: int) -> None:
        """Plan the sizes of packed rows from batches of an epoch in orders of its own.

        Runs with different seeds then share compiled programs.
        """
        self._data, self._orders, self._groups, self._per_call = data, orders, groups, per_call
        longest = _longest(data)
        self._padded = RowWidths(longest, data.needed(np.arange(len(data.lengths))).response)
        self._width = packed_width(longest, groups.rows_of(len(orders[0][0])))
        self._used: set[PackedSize] = set()
        self._call = functools.lru_cache(maxsize=2)(self._fitted)
        orders = [dataclasses.replace(order, seed=k) for k, order in enumerate(orders)]
        planned = min(MOST_PLANNED, len(data.lengths) // len(orders[0][0]))
        needed = [self._laid_out(orders, call)[1] for call in range(max(1, planned // per_call))]
        self._sizes = PackedSizes.plan(needed, self._width, most=max(1, steps // STEPS_PER_PROGRAM))

    def _laid_out(
        self, orders: list[BatchOrder], call: int
    ) -> tuple[list[list[tuple[Batch, list[Layout]]]], PackedSize]:
        """Batches of a call with their layouts, for each step and run, and the smallest size that holds all of them."""
        steps = range(call * self._per_call, (call + 1) * self._per_call)
        batches = [[self._data.padded(order[step], self._padded) for order in orders] for step in steps]
        found = [[(batch, layouts(batch, self._groups, self._width)) for batch in each] for each in batches]
        return found, needed_by([layout for each in found for _, given in each for layout in given])

    def _fitted(self, call: int) -> tuple[list[list[tuple[Batch, list[Layout]]]], PackedSize]:
        """Batches of a call with their layouts, and the size of their program."""
        found, needed = self._laid_out(self._orders, call)
        size = self._sizes.fit(needed)
        self._used.add(size)
        return found, size

    def at(self, step: int) -> PyTree:
        """Batch of a step, counted from 0: arrays [B, ...], or [seeds, B, ...]."""
        found, size = self._call(step // self._per_call)
        of_step = found[step % self._per_call]
        return _stacked([packed(batch, given, size, self._width) for batch, given in of_step])

    @property
    def widths(self) -> list[int]:
        """Length of the packed rows."""
        return [self._width]

    def described(self) -> str:
        """Sentence about the programs that this process compiled."""
        return f"sequences packed into rows of {self._width} tokens; programs compiled: {len(self._used)}"


class PaddedBatches(Generic[Batch]):
    """Batches of all runs, padded to one width in each call of the program."""

    def __init__(self, config: OfflineConfig, data: Table[Batch], orders: list[BatchOrder], steps: int) -> None:
        """Choose the widths for the batches of an epoch in an order of its own.

        Runs with different seeds then share compiled programs.
        """
        self._data, self._steps, self._per_call = data, steps, config.loop.steps_per_call
        self._orders = orders
        planned = BatchOrder(len(data.lengths), config.batch_size, 0)
        calls = range(-(-(len(data.lengths) // config.batch_size) // self._per_call))
        needs = [self._needed([planned], call).sequence for call in calls]
        self._buckets = Buckets.best(np.array([*needs, data.longest]), config.widths)
        self._widths = functools.lru_cache(lambda call: self._buckets.fit(self._needed(self._orders, call)))

    def _needed(self, orders: list[BatchOrder], call: int) -> RowWidths:
        steps = range(call * self._per_call, (call + 1) * self._per_call)
        return widest(self._data.needed(order[step]) for order in orders for step in steps)

    def at(self, step: int) -> PyTree:
        """Batch of a step, counted from 0: arrays [B, ...], or [seeds, B, ...]."""
        widths = self._widths(step // self._per_call)
        return _stacked([self._data.padded(order[step], widths) for order in self._orders])

    @property
    def widths(self) -> list[int]:
        """Widths of all batches of the run."""
        return sorted({each.sequence for each in self._used})

    def described(self) -> str:
        """Sentence about the widths and the programs of the run."""
        widths = ", ".join(map(str, self.widths))
        return f"batches of {widths} tokens per row; programs compiled: {len(self._used)}"

    @property
    def _used(self) -> set[RowWidths]:
        return {self._widths(call) for call in range(self._steps // self._per_call)}


def _longest(data: Table) -> int:
    return -(-data.longest // MULTIPLE) * MULTIPLE


def _stacked(batches: list[Batch]) -> PyTree:
    return batches[0] if len(batches) == 1 else jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
