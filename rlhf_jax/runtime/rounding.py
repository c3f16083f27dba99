"""Updates of bfloat16 weights: float32 master weights, stochastic rounding, or rounding to nearest.

bfloat16 has 8 bits of significand: near 0.02 its values are 1.2e-4 apart, so that an update of 1e-6, rounded to
nearest, does not change a weight. Bytes per parameter while training with Adam, with float32 moments and gradients:

    float32 weights        4 weight           + 8 moments + 4 gradient = 16   (the default)
    bfloat16, masters      2 weight + 4 master + 8 moments + 4 gradient = 18   exact; sampling reads half the bytes
    bfloat16, stochastic   2 weight           + 8 moments + 4 gradient = 14   exact in expectation, with noise
    bfloat16, nearest      2 weight           + 8 moments + 4 gradient = 14   loses small updates

Every update logs `update_survived`, the share of it that the weights kept. Moments in bfloat16, rounded stochastically,
need 4 bytes less: their averages over many updates are exact in expectation, where rounding to nearest would stall.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from rlhf_jax.core.keys import derive

LowPrecision = Literal["masters", "stochastic", "nearest"]


class State(NamedTuple):
    """State of an optimiser: the state of its transformation, and float32 masters."""

    inner: optax.OptState
    masters: PyTree  # MaskedNode in place of float32 parameters; () if there are no masters


def float32(params: PyTree) -> PyTree:
    """Cast parameters to float32, without copying those that are already float32."""
    return jax.tree.map(lambda leaf: leaf if leaf.dtype == jnp.float32 else leaf.astype(jnp.float32), params)


def init_masters(low_precision: LowPrecision, params: PyTree) -> PyTree:
    """Make float32 copies of the low-precision parameters if `low_precision` is 'masters'."""
    if low_precision != "masters" or all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params)):
        return ()
    return jax.tree.map(lambda p: optax.MaskedNode() if p.dtype == jnp.float32 else p.astype(jnp.float32), params)


def trained_values(params: PyTree, masters: PyTree) -> PyTree:
    """Return the trained values in float32: the masters if there are any, otherwise the parameters."""
    if masters == ():
        return float32(params)
    return jax.tree.map(
        lambda master, leaf: leaf if isinstance(master, optax.MaskedNode) else master,
        masters,
        params,
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )


def update_key(run_key: PRNGKeyArray, number: int | Array) -> PRNGKeyArray:
    """Derive the random key of an update's stochastic rounding from the run's key and the number of the update."""
    return jax.random.fold_in(derive(run_key, "rounding"), number)


def apply(
    low_precision: LowPrecision, params: PyTree, masters: PyTree, updates: PyTree, key: PRNGKeyArray
) -> tuple[PyTree, PyTree, Float[Array, ""]]:
    """Add float32 updates to parameters of any dtype.

    Returns: the parameters, the masters, and the share of the update that survived rounding (see `survived`), which is
    1 for float32 weights and with masters.
    """
    before = trained_values(params, masters)
    wanted = jax.tree.map(jnp.add, before, updates)
    if low_precision == "stochastic":
        leaves, structure = jax.tree.flatten(wanted)
        rounded = [
            value if leaf.dtype == jnp.float32 else stochastic_bfloat16(value, jax.random.fold_in(key, number))
            for number, (value, leaf) in enumerate(zip(leaves, jax.tree.leaves(params), strict=True))
        ]
        after = jax.tree.unflatten(structure, rounded)
    else:
        after = jax.tree.map(lambda value, leaf: value.astype(leaf.dtype), wanted, params)
    if masters != ():
        masters = jax.tree.map(
            lambda master, value: master if isinstance(master, optax.MaskedNode) else value,
            masters,
            wanted,
            is_leaf=lambda node: isinstance(node, optax.MaskedNode),
        )
    if masters != () or all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params)):
        # Nothing is rounded below float32. A measurement would copy every weight before it is overwritten.
        return after, masters, jnp.ones((), jnp.float32)
    return after, masters, survived(before, float32(after), updates)


def stochastic_bfloat16(values: Float[Array, "*shape"], key: PRNGKeyArray) -> Float[Array, "*shape"]:
    r"""Round float32 to one of the two nearest bfloat16 values at random, such that the expectation is the value.

    $P(\lceil x \rceil) = (x - \lfloor x \rfloor) / (\lceil x \rceil - \lfloor x \rfloor)$, as in Gupta et al. 2015
    (arXiv:1502.02551), section 3, eq. 1: 16 random bits are added below bfloat16's last bit, and the lower 16 bits are
    dropped. Non-finite values are kept.
    """
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    noise = jax.random.bits(key, values.shape, jnp.uint16).astype(jnp.uint32)
    cut = ((bits + noise) >> 16).astype(jnp.uint16)
    rounded = jax.lax.bitcast_convert_type(cut, jnp.bfloat16)
    return jnp.where(jnp.isfinite(values), rounded, values.astype(jnp.bfloat16))


def bfloat16_moments(state: optax.OptState) -> optax.OptState:
    """Cast an optimiser's new moments, which are 0, to bfloat16."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) if leaf.dtype == jnp.float32 else leaf, state)


def float32_moments(state: optax.OptState) -> optax.OptState:
    """Cast stored moments to float32."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf, state)


def stored_moments(moments: optax.OptState, like: optax.OptState, key: PRNGKeyArray) -> optax.OptState:
    """Round moments stochastically to bfloat16 where the stored state `like` has bfloat16."""
    leaves, structure = jax.tree.flatten(moments)
    key = derive(key, "moments")
    rounded = [
        stochastic_bfloat16(value, jax.random.fold_in(key, number)) if stored.dtype == jnp.bfloat16 else value
        for number, (value, stored) in enumerate(zip(leaves, jax.tree.leaves(like), strict=True))
    ]
    return jax.tree.unflatten(structure, rounded)


def survived(before: dict[str, PyTree], after: dict[str, PyTree], updates: dict[str, PyTree]) -> Float[Array, ""]:
    r"""Share of an update u that the weights kept: $\langle w' - w, u \rangle / \langle u, u \rangle$.

    It is 0 if no weight changed, and 1 in expectation under stochastic rounding. It is a projection
    rather than a ratio of norms, which would exceed 1 if rounding made a few weights jump much too far. With several
    networks, it is their minimum; it is NaN if all updates are zero.
    """

    def dot(one: PyTree, other: PyTree) -> Float[Array, ""]:
        return jax.tree.reduce(jnp.add, jax.tree.map(lambda a, b: jnp.sum(a * b), one, other))

    shares = [
        dot(jax.tree.map(jnp.subtract, after[name], before[name]), updates[name]) / dot(updates[name], updates[name])
        for name in updates
    ]
    return jnp.nanmin(jnp.stack(shares))
