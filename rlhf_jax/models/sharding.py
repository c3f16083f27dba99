"""Which axis of which weight is split over which axis of the mesh, by patterns on the parameter's path."""

import re
from collections.abc import Callable

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

# The first pattern found in a path decides. Optimiser states contain the parameters' paths, and follow them.
PARTITIONS: tuple[tuple[str, P], ...] = (
    (r"(embedding|(^|/)head)$", P("tensor", "fsdp")),
    (r"attention/[qkv]/kernel$", P("fsdp", "tensor", None)),
    (r"attention/o/kernel$", P("tensor", None, "fsdp")),
    (r"(up|gate)/kernel$", P("fsdp", "tensor")),
    (r"down/kernel$", P("tensor", "fsdp")),
    # Adapters: the long axis of A and of B as in the kernel, the rank whole.
    (r"(attention/([qkv]|qkv)|up|gate)/A$", P("fsdp", None)),
    (r"attention/o/A$", P("tensor", None, None)),
    (r"down/A$", P("tensor", None)),
    (r"attention/([qkv]/B|qkv/B/[qkv])$", P(None, "tensor", None)),
    (r"((up|gate)/B|gate_up/B/(up|gate))$", P(None, "tensor")),
    (r"(attention/o|down)/B$", P(None, "fsdp")),
)

ROWS = P(("data", "fsdp"))
"""Rows of a batch are split over both the data and the fsdp axis."""


Where = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
"""On which devices a parameter belongs: its path and its shape -> its sharding."""


def sharding_of(path: str, shape: tuple[int, ...], mesh: Mesh, *, leading_axes: int = 0) -> NamedSharding:
    """The sharding of one parameter; see `shardings`."""
    spec = next((spec for pattern, spec in PARTITIONS if re.search(pattern, path)), P())
    before = max(leading_axes, len(shape) - len(spec)) if spec else leading_axes
    sizes = shape[before:]
    kept = [
        axis if axis is not None and size % mesh.shape[axis] == 0 else None
        for size, axis in zip(sizes, tuple(spec) + (None,) * len(sizes), strict=False)
    ]
    return NamedSharding(mesh, P(*([None] * before + kept)))


def shardings(tree: PyTree, mesh: Mesh, *, leading_axes: int) -> PyTree:
    """A NamedSharding for every leaf of a tree of parameters or of a state that contains some.

    Args: leading_axes counts axes before the parameters' own (1 where they are stacked over seeds), never split. A
    weight whose dimension does not divide over its mesh axis is kept whole along it. More axes than its pattern has are
    those of an ensemble's members, and are not split either.
    """
    return on_devices(tree, lambda path, shape: sharding_of(path, shape, mesh, leading_axes=leading_axes))


def on_devices(tree: PyTree, where: Where) -> PyTree:
    """The sharding of every leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: where(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape), tree
    )
