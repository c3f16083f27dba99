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
from rlhf_jax.data.batching import BatchOrder, Buckets
from rlhf_jax.data.ragged import RowWidths, Table, widest
from rlhf_jax.loading.context import Context, steps_for
from rlhf_jax.loading.trainable import N, dropout_keys, stack
from rlhf_jax.runtime.checkpoints import TrainState
from rlhf_jax.runtime.loop import Evaluation, LoopConfig, Rows, Task, train
from rlhf_jax.runtime.optimizers import OptimizerConfig, gradients, learning_rate, make_optimizer, update
from rlhf_jax.runtime.programs import Step
from rlhf_jax.runtime.rounding import update_key
from rlhf_jax.types import Json

Batch = TypeVar("Batch", bound=tuple)
Loss = tuple[Array, dict[str, Metric]]


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
    epochs: Positive  # passes over the training rows
    eval_every: Count  # steps between evaluations
    loop: LoopConfig
    # Device calls whose rows are sorted by length together, so that batches have less padding; 1: random batches.
    # Sorted batches are not neutral: a mean over tokens weighs a token of short rows more.
    length_window: Count = 1
    widths: Count = 6  # most lengths that batches are padded to, each compiled once; 1: the length of the longest row

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True)
class OfflineMethod(Generic[N]):
    """Functions and frozen parameters of a method, for `train_offline`."""

    step: Callable[[Updates[N]], Step]
    start: Callable[[Updates[N], int], TrainState]  # run number -> state before the first step
    frozen: dict[str, PyTree]
    evaluate: Callable[[PyTree], tuple[dict[str, float], Rows]]  # one run's parameters -> metrics and sample rows
    key_figures: tuple[str, ...]  # metrics shown beside the bar


def train_offline(
    config: OfflineConfig, context: Context, network: N, data: Table[Batch], method: OfflineMethod[N], *, runs: int
) -> dict[str, Json]:
    """Train on a table and return the summary's fields about steps and widths.

    Args: data holds all training rows; runs is the number of runs, trained at once in one program. The row order of run
    k comes from seed + k, and each run has its own random keys.
    """
    steps = steps_for(config.epochs, len(data.lengths), config.batch_size, config.loop.steps_per_call)
    placement = context.placement(runs)
    updates = Updates(network, config.optimizer, steps, placement.axes)
    batches = Batches(config, data, tuple(context.seed + k for k in range(runs)), steps)
    task = Task(
        step=method.step(updates),
        start=lambda: stack([method.start(updates, k) for k in range(runs)]),
        frozen=method.frozen,
        batch_at=batches.at,
        run_key=stack([context.key("run", k) for k in range(runs)]),
        total_steps=steps,
        key_figures=method.key_figures,
        evaluation=Evaluation(config.eval_every, method.evaluate),
        describe=lambda step, samples: [],
    )
    train(task, config.loop, placement, context.seed, context.directory, context.bar)
    used = batches.used
    widths = sorted({each.sequence for each in used})
    context.bar.say(
        f"{context.name}: batches of {', '.join(map(str, widths))} tokens per row; programs compiled: {len(used)}"
    )
    return {"steps": steps, "widths": widths}


class Batches(Generic[Batch]):
    """Batches of all runs, padded to one width in each call of the program."""

    def __init__(self, config: OfflineConfig, data: Table[Batch], seeds: tuple[int, ...], steps: int) -> None:
        """Order the rows for each seed, and choose the widths.

        The widths are chosen for the batches of an epoch in an order of their own, so that runs with different seeds
        share compiled programs.
        """
        self._data, self._steps, self._per_call = data, steps, config.loop.steps_per_call
        self._orders = [self._order(config, seed) for seed in seeds]
        planned = self._order(config, 0)
        calls = range(-(-(len(data.lengths) // config.batch_size) // self._per_call))
        needs = [self._needed([planned], call).sequence for call in calls]
        self._buckets = Buckets.best(np.array([*needs, data.longest]), config.widths)
        self._widths = functools.lru_cache(lambda call: self._buckets.fit(self._needed(self._orders, call)))

    def _order(self, config: OfflineConfig, seed: int) -> BatchOrder:
        return BatchOrder(self._data.lengths, config.batch_size, seed, config.length_window, self._per_call)

    def _needed(self, orders: list[BatchOrder], call: int) -> RowWidths:
        steps = range(call * self._per_call, (call + 1) * self._per_call)
        return widest(self._data.needed(order[step]) for order in orders for step in steps)

    def at(self, step: int) -> PyTree:
        """Batch of a step, counted from 0: arrays [B, ...], or [seeds, B, ...]."""
        widths = self._widths(step // self._per_call)
        batches = [self._data.padded(order[step], widths) for order in self._orders]
        return batches[0] if len(batches) == 1 else jax.tree.map(lambda *leaves: np.stack(leaves), *batches)

    @property
    def used(self) -> set[RowWidths]:
        """Widths of all calls of the run, each compiled once."""
        return {self._widths(call) for call in range(self._steps // self._per_call)}
