"""Value head on a policy's hidden states: a linear unit on a body shared with the policy."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree


def init_zero(width: int) -> PyTree:
    """Initialise a zero head (Ziegler et al. 2019, arXiv:1909.08593)."""
    return {"head": {"kernel": jnp.zeros((width, 1), jnp.float32), "bias": jnp.zeros((1,), jnp.float32)}}


def init_normal(width: int, key: PRNGKeyArray) -> PyTree:
    """Initialise a head from N(0, 1/(d+1)), as Stiennon et al. 2020 (arXiv:2009.01325) do for reward models."""
    kernel = jax.random.normal(key, (width, 1), jnp.float32) * (width + 1) ** -0.5
    return {"head": {"kernel": kernel, "bias": jnp.zeros((1,), jnp.float32)}}


def values(params: PyTree, hidden: Float[Array, "B T D"]) -> Float[Array, "B T"]:
    """Value of the state before each response token, in float32."""
    head = params["head"]
    return (hidden.astype(jnp.float32) @ head["kernel"] + head["bias"][None, None])[..., 0]
