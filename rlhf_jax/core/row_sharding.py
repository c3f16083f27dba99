"""Placement of rows within a program that `jit` compiles for a mesh of devices.

The compiler chooses where intermediate arrays lie. Without constraints it may replicate the rows of a gathered batch,
or gather rows and split channels instead. Under `pmap` and `shard_map`, where a program is that of one device, and
without a mesh, these functions change nothing.
"""

import math

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree, Shaped

ROW_AXES = ("data", "fsdp")
ROWS = P(ROW_AXES)
"""Rows of a batch are split over the data and fsdp axes."""


def row_devices() -> int:
    """Number of devices that rows are split over in the program that is being traced."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in ROW_AXES) if set(ROW_AXES) <= set(mesh.auto_axes) else 1


def split_rows(tree: PyTree) -> PyTree:
    """Split the first axis of every array over the devices, and replicate the other axes.

    Arrays whose rows do not divide over the devices are left to the compiler.
    """
    devices = row_devices()
    if devices == 1:
        return tree
    return jax.tree.map(
        lambda leaf: leaf if len(leaf) % devices else jax.lax.with_sharding_constraint(leaf, ROWS), tree
    )


def gather_channels(weights: Shaped[Array, "*rows D"]) -> Shaped[Array, "*rows D"]:
    """Gather the last axis of a weight on every device; the other axes stay split as they are."""
    if row_devices() == 1:
        return weights
    spec = P(*[P.UNCONSTRAINED] * (weights.ndim - 1), None)
    return jax.lax.with_sharding_constraint(weights, spec)
