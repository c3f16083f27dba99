"""Programs that read many rows outside of training, on all devices that hold a model's parameters."""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from rlhf_jax.core.row_sharding import ROW_AXES

Result = TypeVar("Result")


def mesh_of(tree: PyTree) -> Mesh | None:
    """Mesh of several devices that parameters are placed on; None if they are on one device."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and set(ROW_AXES) <= set(sharding.mesh.axis_names):
            return sharding.mesh if isinstance(sharding.mesh, Mesh) and sharding.mesh.size > 1 else None
    return None


def row_devices_of(params: PyTree) -> int:
    """Number of devices over which `compiled` programs split rows."""
    mesh = mesh_of(params)
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def compiled(*static: int) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Compile a function of networks, parameters and rows for the devices of the parameters.

    On a mesh, networks split their rows over the devices (`core.row_sharding`). Arrays of the host are inputs on every
    device, and results are outputs on every device, so that all processes of a run can read them.

    Args: static are the indices of the static arguments.
    """

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        def on_mesh(mesh: Mesh | None, *args: PyTree) -> Result:
            if mesh is None:
                return function(*args)
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return jax.lax.with_sharding_constraint(function(*args), P())

        on_mesh.__name__ = function.__name__
        program = jax.jit(on_mesh, static_argnums=(0, *(1 + index for index in static)))

        @functools.wraps(function)
        def call(*args: PyTree) -> Result:
            return program(mesh_of(args), *args)

        call.program = program  # type: ignore[attr-defined]
        return call

    return decorate
