"""Tiny networks with parameters that are nothing special, and padded batches, for tests of models and of sampling."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models.model_config import ModelConfig
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.types import Rollout

CONFIG = ModelConfig(
    d_model=16, n_layers=2, n_heads=2, d_ff=24, activation="relu", param_dtype="float32", compute_dtype="float32"
)
VOCAB, SUPPRESSED, EOS = 50, (0, 1, 3), 2
POLICY = PolicyNetwork(CONFIG, VOCAB, SUPPRESSED)


def config(**changes) -> ModelConfig:
    """A tiny transformer; the shapes of other test networks differ from it in what their tests are about."""
    return dataclasses.replace(CONFIG, **changes)


@functools.cache
def random_params(network, seed: int = 0):
    """Parameters drawn anew: with those of `init`, logits are all but equal, norms scale by 1, and biases are 0."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1].key == "scale":
            return jnp.asarray(1 + 0.3 * rng.normal(size=leaf.shape), leaf.dtype)
        return jnp.asarray(0.4 * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(network.init, jax.random.key(0)))


def random_tokens(seed: int, *shape: int) -> np.ndarray:
    """Tokens that a policy may emit, EOS left out."""
    return np.random.default_rng(seed).integers(4, VOCAB, shape).astype(np.int32)


def padded(rows: list[np.ndarray], before: list[int], width: int, filling: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of tokens with so much padding before each and the rest behind, and the mask."""
    tokens, mask = np.full((len(rows), width), filling, np.int32), np.zeros((len(rows), width), bool)
    for i, (row, start) in enumerate(zip(rows, before, strict=True)):
        tokens[i, start : start + len(row)], mask[i, start : start + len(row)] = row, True
    return tokens, mask


def rollout(
    prompts: list[np.ndarray], responses: list[np.ndarray], widths=(4, 5), filling: int = 0
) -> Rollout[np.ndarray]:
    """Left-padded prompts and right-padded responses."""
    left = [widths[0] - len(row) for row in prompts]
    right = [0] * len(responses)
    return Rollout(*padded(prompts, left, widths[0], filling), *padded(responses, right, widths[1], filling))


def uneven_rollout(seed: int = 0, filling: int = 0) -> Rollout[np.ndarray]:
    """Four rows: prompts of 1 to 4 tokens, responses of 5 to 1."""
    tokens = random_tokens(seed, 4, 9)
    prompts = [tokens[i, : i + 1] for i in range(4)]
    responses = [tokens[i, 4 : 4 + length] for i, length in enumerate((5, 3, 4, 1))]
    return rollout(prompts, responses, filling=filling)
