"""Outlines of stages: jitted programs, and the shapes and shardings of their arguments, without any values."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

from rlhf_jax.data.pipeline import DataConfig
from rlhf_jax.loading.trainable import init_trainable, stack
from rlhf_jax.models.model_config import DType
from rlhf_jax.planning import shapes
from rlhf_jax.planning.outlines import Outlines
from rlhf_jax.runtime.programs import MeshPlacement, Program, RuntimeConfig
from rlhf_jax.stages.kinds import StageConfig


class RunOutline(NamedTuple):
    """Settings that all stages share, and the outlines of the models."""

    outlines: Outlines
    stages: Mapping[str, StageConfig]
    data: DataConfig
    runtime: RuntimeConfig
    placement: MeshPlacement

    @property
    def seeds(self) -> int:
        """Number of runs that a stage trains at once."""
        return self.placement.seeds

    @property
    def width(self) -> int:
        """Length of a row."""
        return shapes.width_of(self.data)


class ProgramOutline(NamedTuple):
    """A jitted function and its arguments."""

    name: str  # update; iteration, or sample and learn; generate
    function: Any
    args: tuple[PyTree, ...]
    loops: int  # iterations of the decode loop


class StageOutline(NamedTuple):
    """Programs of a stage, and the arrays that live as long as the stage runs."""

    programs: tuple[ProgramOutline, ...]
    state: PyTree  # trained parameters, with the optimiser's state
    frozen: PyTree
    dtype: DType  # of the products
    rows: int  # of a call of the programs
    row: str  # description of a row: response of 256 tokens


def of_seeds(run: RunOutline, seeds: int) -> RunOutline:
    """Settings of a stage that trains another number of runs at once than `config.seeds`."""
    return run._replace(placement=MeshPlacement(run.placement.mesh, seeds))


def trained_params(network: Any, params: PyTree) -> PyTree:
    """Trained parameters of a network, all of them or an adapter's."""
    return init_trainable(network, params, jax.random.key(0)).trained


def placed_state(run: RunOutline, state: PyTree) -> PyTree:
    """State of all runs, with its shardings."""
    return shapes.placed(state, run.placement, leading_axes=int(run.seeds > 1))


def placed_frozen(run: RunOutline, frozen: PyTree) -> PyTree:
    """Frozen parameters, with their shardings."""
    return shapes.placed(frozen, run.placement, leading_axes=0)


def keys_of(run: RunOutline) -> PyTree:
    """Random keys of all runs."""
    return jax.eval_shape(lambda: stack([jax.random.key(0)] * run.seeds))


def jitted(program: Program) -> Any:
    """Return the jitted function of a program."""
    return program.compiled  # type: ignore[attr-defined]
