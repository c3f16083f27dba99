"""Sharding of weights over the mesh, by patterns on parameter paths."""

import re
from collections.abc import Callable

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

# The first matching pattern applies. Paths in optimiser states contain those of the parameters, so they match too.
PARTITIONS: tuple[tuple[str, P], ...] = (
    (r"(embedding|(^|/)head)$", P("tensor", "fsdp")),
    (r"attention/[qkv]/kernel(/qvalue|/scale)?$", P("fsdp", "tensor", None)),
    (r"attention/o/kernel(/qvalue|/scale)?$", P("tensor", None, "fsdp")),
    (r"(up|gate)/kernel(/qvalue|/scale)?$", P("fsdp", "tensor")),
    (r"down/kernel(/qvalue|/scale)?$", P("tensor", "fsdp")),
    # Adapters: the long axis of A and B is split as in the kernel, the rank axis is not split.
    (r"(attention/([qkv]|qkv)|up|gate)/A$", P("fsdp", None)),
    (r"attention/o/A$", P("tensor", None, None)),
    (r"down/A$", P("tensor", None)),
    (r"attention/([qkv]/B|qkv/B/[qkv])$", P(None, "tensor", None)),
    (r"((up|gate)/B|gate_up/B/(up|gate))$", P(None, "tensor")),
    (r"(attention/o|down)/B$", P(None, "fsdp")),
)

Where = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
"""Function from a parameter's path and shape to its sharding."""


def sharding_of(path: str, shape: tuple[int, ...], mesh: Mesh, *, leading_axes: int = 0) -> NamedSharding:
    """Sharding of one parameter; see `shardings`."""
    spec = next((spec for pattern, spec in PARTITIONS if re.search(pattern, path)), P())
    before = max(leading_axes, len(shape) - len(spec)) if spec else leading_axes
    sizes = shape[before:]
    kept = [
        axis if axis is not None and size % mesh.shape[axis] == 0 else None
        for size, axis in zip(sizes, tuple(spec) + (None,) * len(sizes), strict=False)
    ]
    return NamedSharding(mesh, P(*([None] * before + kept)))


def shardings(tree: PyTree, mesh: Mesh, *, leading_axes: int) -> PyTree:
    """NamedSharding for every leaf of a tree of parameters, or of a state that contains parameters.

    Args: leading_axes is the number of axes before those of the parameters (1 if they are stacked over seeds), which
    are not split. A dimension that does not divide over its mesh axis is not split, nor are leading axes beyond those
    of the pattern, which belong to ensemble members.
    """
    return on_devices(tree, lambda path, shape: sharding_of(path, shape, mesh, leading_axes=leading_axes))


def on_devices(tree: PyTree, where: Where) -> PyTree:
    """Sharding of every leaf, from its path and shape."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: where(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape), tree
    )
