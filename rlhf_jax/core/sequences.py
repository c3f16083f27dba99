"""Rows of prompt and response: their construction from rollouts, and the positions that predict the response.

Networks read padded or packed rows (`packing.py`); in packed ones, predictions are those of the G groups' M tokens.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from rlhf_jax.core import masking, packing
from rlhf_jax.types import Rollout, Sequences, TokenBatch


def joined(rollout: Rollout | Rollout[np.ndarray]) -> Sequences:
    """Concatenate prompts and responses with all their padding: S = P + T, and every response starts at P."""
    tokens = jnp.concatenate([rollout.prompt, rollout.response], axis=1)
    mask = jnp.concatenate([rollout.prompt_mask, rollout.response_mask], axis=1)
    start = jnp.full(len(tokens), rollout.prompt.shape[1], jnp.int32)
    return Sequences(tokens, mask, start, jnp.asarray(rollout.response), jnp.asarray(rollout.response_mask))


def compacted(rollout: Rollout | Rollout[np.ndarray], *, width: int, response_width: int) -> Sequences:
    """Concatenate prompts and responses without the padding before the prompts: S = width, T = response_width.

    Args: width is at least the number of tokens of each row, and response_width that of each response; tokens beyond
    them are dropped.
    """
    whole, prompt_tokens = joined(rollout), masking.lengths(jnp.asarray(rollout.prompt_mask))
    padding = rollout.prompt.shape[1] - jnp.maximum(prompt_tokens, 1)  # an empty prompt keeps one position
    places = padding[:, None] + jnp.arange(width)[None]
    tokens = jnp.take_along_axis(whole.tokens, places, axis=1, mode="fill", fill_value=0)
    mask = jnp.take_along_axis(whole.mask, places, axis=1, mode="fill", fill_value=False)
    responses = whole.response[:, :response_width], whole.response_mask[:, :response_width]
    return Sequences(tokens, mask, whole.start - padding, *responses)


def predictors(x: Float[Array, "B S *rest"], sequences: Sequences) -> Float[Array, "rows predictions *rest"]:
    """Select the positions that predict the response tokens: [B, T, ...], arbitrary at padding, or [G, M, ...].

    Args: x has the rows that networks read, padded or packed.
    """
    if sequences.packing is not None:
        return packing.predictors(x, sequences.start, sequences.response_mask, sequences.packing)
    places = sequences.start[:, None] + jnp.arange(sequences.response.shape[1], dtype=jnp.int32)[None] - 1
    return jnp.take_along_axis(x, places.reshape(*places.shape, *[1] * (x.ndim - 2)), axis=1, mode="clip")


def targets(sequences: Sequences) -> Int[Array, "rows predictions"]:
    """Select the response tokens, in the shape of their predictions: [B, T], or [G, M]."""
    if sequences.packing is not None:
        return packing.targets(sequences.response, sequences.packing)
    return sequences.response


def by_response(x: Shaped[Array, "rows predictions"], sequences: Sequences) -> Shaped[Array, "B T"]:
    """Arrange numbers of predictions by response; arbitrary at padding."""
    if sequences.packing is not None:
        return packing.by_token(x, sequences.response_mask, sequences.packing)
    return x


def mask_read(batch: TokenBatch | Sequences) -> Bool[Array, "..."]:
    """Mask of the tokens in the rows that networks read."""
    return batch.mask if batch.packing is None else batch.packing.sequence >= 0
