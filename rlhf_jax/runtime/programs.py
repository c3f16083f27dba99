"""Compilation of steps to programs, by `jit` on a mesh of devices or by `pmap`.

A step is a pure function `step(state, frozen, batch, run_key) -> (state, metrics, samples)`. It is written for the rows
of one device, and reduces over `placement.axes`. A program runs several steps in one call, with leading axes before the
rows:

    batches  [n, B, ...], or [n, seeds, B, ...]       metrics  [n], or [n, seeds]
    samples  [n, B, ...], or [n, seeds, B, ...]       state    like the step's, or stacked over [seeds]

Metrics are reduced by the step and equal on all devices. The first axis of every leaf of a step's samples is the rows.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from rlhf_jax import processes
from rlhf_jax.config import Count, check_ranges
from rlhf_jax.core.row_sharding import ROWS
from rlhf_jax.models.sharding import sharding_of, shardings
from rlhf_jax.runtime.checkpoints import abstract
from rlhf_jax.runtime.trackers import Service
from rlhf_jax.types import RlhfError

State = TypeVar("State")
Frozen = TypeVar("Frozen", contravariant=True)
Batch = TypeVar("Batch", contravariant=True)
Samples = TypeVar("Samples", covariant=True)


@runtime_checkable
class Step(Protocol[State, Frozen, Batch, Samples]):
    """One step of one run, on the rows of one device."""

    def __call__(
        self, state: State, frozen: Frozen, batch: Batch, run_key: jax.Array, /
    ) -> tuple[State, dict[str, jax.Array], Samples]:
        """Return the next state, metrics, and samples."""
        ...


@runtime_checkable
class Program(Protocol[State, Frozen, Batch, Samples]):
    """Several steps of all runs, on the rows of all devices: arrays have the leading axes named above."""

    def __call__(
        self, state: State, frozen: Frozen, batches: Batch, run_key: jax.Array, /
    ) -> tuple[State, dict[str, jax.Array | np.ndarray], Samples]:
        """Return the last state, and the metrics and samples of each step."""
        ...


SEED_AXIS = "seed"
PER_RUN = "per_run"
"""Entry of `frozen` with the numbers of a config that differ between runs that train at once: arrays float32[runs]."""
BATCH_AXIS = "batch"


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
    """Devices, other settings of speed, and where metrics go. They change results only by rounding."""

    # Parallelism: jit over a mesh of data x fsdp x tensor devices, or pmap over `data` devices with replicated weights.
    strategy: Literal["jit", "pmap"]
    data: Count  # number of devices over which batches are split
    fsdp: Count  # number of devices over which batches and weights are split (fully sharded data parallel)
    tensor: Count  # number of devices over which each layer is split (tensor parallel)
    inference_batch: Count  # rows per call when sampling and scoring outside of training
    deterministic: bool  # use XLA's deterministic operations on GPUs, so that resumed runs are bitwise identical
    compile_quickly: bool  # compile faster, to slower programs, for runs that take seconds
    trackers: tuple[Service, ...] = ()  # services that get the metrics besides TensorBoard: "wandb", "mlflow"

    @property
    def xla_flags(self) -> str:
        """Compiler flags, which must be set before the first computation."""
        flags = ["--xla_gpu_deterministic_ops=true"] if self.deterministic else []
        if self.compile_quickly:
            flags.append("--xla_backend_optimization_level=0")
            if jax.__version_info__ < (0, 11):  # later releases reject this flag
                flags.append("--xla_cpu_use_fusion_emitters=false")
        return " ".join(flags)

    @property
    def row_devices(self) -> int:
        """Number of devices that the rows of a batch are split over."""
        return self.data * self.fsdp

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.inference_batch % self.row_devices:
            raise ValueError(
                f"inference_batch = {self.inference_batch} rows do not divide over data x fsdp = {self.row_devices} "
                "devices: change inference_batch"
            )
        if self.strategy == "pmap" and self.fsdp * self.tensor > 1:
            raise ValueError("strategy = 'pmap' replicates the weights: set fsdp = tensor = 1, or use strategy = 'jit'")


@dataclasses.dataclass(frozen=True)
class MeshPlacement:
    """Programs compiled by `jit` over a mesh of one or more devices."""

    mesh: Mesh
    seeds: int
    axes: tuple[str, ...] = ()

    @property
    def platform(self) -> str:
        """Kind of the devices: cpu, gpu or tpu."""
        return self.mesh.devices.flat[0].platform

    def rows(self, before: int) -> NamedSharding:
        """Sharding of a batch whose rows have a number of axes before them."""
        return NamedSharding(self.mesh, P(*([None] * before), *ROWS))

    def put_state(self, state: PyTree) -> PyTree:
        """Shard a copy of a state by the models' partition patterns; programs donate only the copy."""
        return self.place_state(jax.tree.map(jnp.copy, state))

    def place_state(self, state: PyTree) -> PyTree:
        """Shard a state that nothing else refers to: arrays stay where they are if possible, and are then donated."""
        return jax.tree.map(processes.place, state, self._state_shardings(state))

    def put_frozen(self, frozen: PyTree) -> PyTree:
        """Shard frozen parameters by the same patterns. They have no seed axis."""
        return jax.tree.map(processes.place, frozen, shardings(frozen, self.mesh, leading_axes=0))

    def compile(self, step: Step, state: PyTree) -> Program:
        """Compile a program that keeps the shardings of `state` and donates the old state."""
        rows = self.rows(leading_axes(self.seeds))
        compiled = jax.jit(
            _on_mesh(step, self.seeds, self.mesh),
            donate_argnums=0,
            in_shardings=(_shardings_of(state), None, rows, None),
            out_shardings=(_shardings_of(state), NamedSharding(self.mesh, P()), rows),
        )

        def program(state: State, frozen: PyTree, batches: PyTree, run_key: jax.Array) -> tuple[State, dict, PyTree]:
            _check_rows(batches, self.seeds, self.mesh.shape["data"] * self.mesh.shape["fsdp"])
            if processes.count() > 1:
                batches = jax.tree.map(lambda leaf: processes.place(leaf, rows), batches)
            return compiled(state, frozen, batches, run_key)

        program.compiled = compiled  # type: ignore[attr-defined]
        return program

    def whole(self, state: PyTree) -> PyTree:
        """Convert a state to the form that checkpoints have: here the same."""
        return state

    def restored(self, state: PyTree) -> PyTree:
        """Shapes, dtypes and shardings with which to restore a state's checkpoint."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            state,
            self._state_shardings(state),
        )

    def for_evaluation(self, params: PyTree) -> PyTree:
        """Place parameters as `where` places loaded ones, so that the same evaluation programs serve both."""
        return params if self.mesh.size > 1 else jax.device_put(params, self.mesh.devices.flat[0])

    def where(self, path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
        """Sharding of a loaded parameter: split over the mesh by the models' partition patterns, or replicated."""
        if self.mesh.size > 1:
            return sharding_of(path, shape, self.mesh)
        return SingleDeviceSharding(self.mesh.devices.flat[0])

    def _state_shardings(self, state: PyTree) -> PyTree:
        return shardings(state, self.mesh, leading_axes=int(self.seeds > 1))


@dataclasses.dataclass(frozen=True)
class PmapPlacement:
    """Programs compiled by `pmap`: every device has a full copy of the state and its share of the rows."""

    devices: tuple[jax.Device, ...]
    seeds: int
    axes: tuple[str, ...] = (BATCH_AXIS,)

    @property
    def platform(self) -> str:
        """Kind of the devices: cpu, gpu or tpu."""
        return self.devices[0].platform

    def put_state(self, state: PyTree) -> PyTree:
        """Replicate a state; every leaf gets a leading device axis."""
        mesh = Mesh(np.array(self.devices), (BATCH_AXIS,))
        count = len(self.devices)

        def replicate(leaf: jax.Array) -> jax.Array:
            stacked = np.broadcast_to(np.asarray(leaf)[None], (count, *leaf.shape))
            return jax.device_put(stacked, NamedSharding(mesh, P(BATCH_AXIS)))

        return jax.tree.map(replicate, state)

    def place_state(self, state: PyTree) -> PyTree:
        """Replicate a state."""
        return self.put_state(state)

    def put_frozen(self, frozen: PyTree) -> PyTree:
        """Replicate frozen parameters."""
        return self.put_state(frozen)

    def compile(self, step: Step, state: PyTree) -> Program:
        """Compile a program that donates the old state."""
        del state  # always replicated
        rows = leading_axes(self.seeds)
        compiled = jax.pmap(
            _several(step, self.seeds),
            axis_name=BATCH_AXIS,
            devices=self.devices,
            in_axes=(0, 0, rows, None),
            out_axes=(0, 0, rows),
            donate_argnums=0,
        )

        def split(leaf: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
            return leaf.reshape(*leaf.shape[:rows], len(self.devices), -1, *leaf.shape[rows + 1 :])

        def merge(leaf: jax.Array) -> jax.Array:
            return leaf.reshape(*leaf.shape[:rows], -1, *leaf.shape[rows + 2 :])

        def program(state: State, frozen: PyTree, batches: PyTree, run_key: jax.Array) -> tuple[State, dict, PyTree]:
            _check_rows(batches, self.seeds, len(self.devices))
            state, metrics, samples = compiled(state, frozen, jax.tree.map(split, batches), run_key)
            return state, jax.tree.map(lambda leaf: leaf[0], metrics), jax.tree.map(merge, samples)

        program.compiled = compiled  # type: ignore[attr-defined]
        return program

    def whole(self, state: PyTree) -> PyTree:
        """Convert a state to the form that checkpoints have: the copy of one device."""
        return jax.tree.map(lambda leaf: leaf[0], state)

    def restored(self, state: PyTree) -> PyTree:
        """Shapes, dtypes and shardings with which to restore a state's checkpoint."""
        return abstract(state)

    def for_evaluation(self, params: PyTree) -> PyTree:
        """Place one copy of the parameters as `where` places loaded ones."""
        return jax.device_put(self.whole(params), self.where("", ()))

    def where(self, path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
        """Sharding of a loaded parameter: replicated over a mesh, for programs outside of training."""
        del path, shape
        if len(self.devices) == 1:
            return SingleDeviceSharding(self.devices[0])
        return NamedSharding(make_mesh(self.devices, (len(self.devices), 1, 1)), P())


Placement = MeshPlacement | PmapPlacement


def make_placement(config: RuntimeConfig, seeds: int, devices: Sequence[jax.Device] | None = None) -> Placement:
    """Select the number of devices that the config requires.

    Args: devices to choose from, None: those of this machine, or of all processes.
    Raises RlhfError if there are fewer, or, with several processes, if there are more, or the strategy is `pmap`.
    """
    needed, present = config.data * config.fsdp * config.tensor, devices or jax.devices()
    required = f"config.runtime requires {needed} devices (data={config.data}, fsdp={config.fsdp}, "
    required += f"tensor={config.tensor})"
    if needed > len(present):
        raise RlhfError(f"{required}, but only {len(present)} are available: lower them")
    if processes.count() > 1 and needed < len(present):
        raise RlhfError(f"{required}, but {processes.count()} processes have {len(present)}: raise them to use all")
    if processes.count() > 1 and config.strategy == "pmap":
        raise RlhfError("config.runtime.strategy = 'pmap' uses the devices of one process: set it to 'jit'")
    used = present[:needed]
    if config.strategy == "pmap":
        return PmapPlacement(tuple(used), seeds)
    return MeshPlacement(make_mesh(used, (config.data, config.fsdp, config.tensor)), seeds)


def make_mesh(devices: Sequence[jax.Device], sizes: tuple[int, int, int]) -> Mesh:
    """Arrange devices in a mesh with the axes data, fsdp and tensor, of these sizes."""
    return Mesh(np.array(devices).reshape(sizes), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


@functools.lru_cache
def _several(step: Step, seeds: int) -> Program:
    """Scan a step over batches, mapped over seeds if there are several.

    The result is cached, so that JAX compiles a step only once.
    """
    if seeds > 1:
        step = _of_runs(step)

    @functools.wraps(step)
    def several(state: State, frozen: PyTree, batches: PyTree, run_key: jax.Array) -> tuple[State, dict, PyTree]:
        def body(state: State, batch: PyTree) -> tuple[State, tuple]:
            state, metrics, samples = step(state, frozen, batch, run_key)
            return state, (metrics, samples)

        state, (metrics, samples) = jax.lax.scan(body, state, batches)
        return state, metrics, samples

    return several


def _of_runs(step: Step) -> Step:
    @functools.wraps(step)
    def of_runs(state: State, frozen: PyTree, batch: PyTree, run_key: jax.Array) -> tuple[State, dict, PyTree]:
        mapped = isinstance(frozen, dict) and PER_RUN in frozen
        axes = {name: 0 if name == PER_RUN else None for name in frozen} if mapped else None
        return jax.vmap(step, in_axes=(0, axes, 0, 0), axis_name=SEED_AXIS)(state, frozen, batch, run_key)

    return of_runs


@functools.lru_cache
def _on_mesh(step: Step, seeds: int, mesh: Mesh) -> Program:
    """Make the mesh known to the constraints of `core.row_sharding` while several steps are traced."""
    several = _several(step, seeds)

    @functools.wraps(several)
    def on_mesh(state: State, frozen: PyTree, batches: PyTree, run_key: jax.Array) -> tuple[State, dict, PyTree]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return several(state, frozen, batches, run_key)

    return on_mesh


def leading_axes(seeds: int) -> int:
    """Return the number of axes before the rows: steps, and seeds if there are several."""
    return 2 if seeds > 1 else 1


def _shardings_of(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def _check_rows(batches: PyTree, seeds: int, parts: int) -> None:
    check_divides(jax.tree.leaves(batches)[0].shape[leading_axes(seeds)], parts)


def check_divides(rows: int, devices: int) -> None:
    """Raise RlhfError unless the rows of a batch divide over the devices."""
    if rows % devices:
        raise RlhfError(f"a batch of {rows} rows does not divide over {devices} devices: change the batch size")
