"""Transformer body with a linear unit: the module of reward models and value functions."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.models.model_config import ModelConfig
from rlhf_jax.models.transformer import Transformer


class ScalarTransformer(nn.Module):
    """Transformer body with a linear unit on its hidden states."""

    config: ModelConfig
    vocab_size: int
    bias: bool

    def setup(self) -> None:
        """Declare the parameters; the head is initialised from N(0, 1/(d+1)), as in Stiennon et al. 2020."""
        self.body = Transformer(self.config, self.vocab_size)
        start = nn.initializers.normal((self.config.d_model + 1) ** -0.5)
        self.head = nn.Dense(1, use_bias=self.bias, kernel_init=start)

    def hidden(self, *rows: Array) -> Float[Array, "B S D"]:
        """Hidden states, in float32. Args: rows as in `Transformer.__call__`."""
        return self.body(*rows).astype(jnp.float32)

    def __call__(self, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows"]:
        """Apply the linear unit."""
        return self.head(hidden)[..., 0]

    def parameters(self, tokens: Array, mask: Array) -> Array:
        """Run body and head, so that initialisation creates every parameter."""
        return self(self.hidden(tokens, mask))
