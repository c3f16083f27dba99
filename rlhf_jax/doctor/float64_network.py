"""Forward pass of a small Llama in NumPy and float64, independent of the package's networks."""

import numpy as np
from jaxtyping import PyTree

from rlhf_jax.models.model_config import DType, ModelConfig


def config(compute_dtype: DType) -> ModelConfig:
    """Shape of the network: all parts of Llama, in few layers."""
    return ModelConfig(
        d_model=128,
        n_layers=3,
        n_heads=4,
        n_kv_heads=2,
        d_ff=256,
        activation="silu",
        gated=True,
        param_dtype="float32",
        compute_dtype=compute_dtype,
    )


def logprobs(config: ModelConfig, params: PyTree, tokens: np.ndarray) -> np.ndarray:
    """Log-probabilities of tokens 1 .. S-1 given those before, float64[B, S-1]."""
    table = np.asarray(params["embedding"], np.float64)
    x = table[tokens]
    for layer in range(config.n_layers):
        block = params[f"block_{layer}"]
        x = x + _attention(config, block["attention"], _norm(config, x, block["attention_norm"]))
        h = _norm(config, x, block["mlp_norm"])
        gate, up = (h @ _kernel(block[name]) for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ _kernel(block["down"])
    logits = (_norm(config, x, params["final_norm"]) @ table.T)[:, :-1]
    logits = logits - logits.max(axis=-1, keepdims=True)
    logits = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return np.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]


def _attention(config: ModelConfig, params: PyTree, x: np.ndarray) -> np.ndarray:
    rows, length, _ = x.shape
    q, k, v = (np.einsum("bsd,dhk->bshk", x, _kernel(params[name])) for name in ("q", "k", "v"))
    q, k = _rotated(config, q), _rotated(config, k)
    k, v = (np.repeat(each, config.n_heads // config.kv_heads, axis=2) for each in (k, v))
    logits = np.einsum("bshk,bchk->bhsc", q, k) / np.sqrt(config.head_width)
    logits = np.where(np.tril(np.ones((length, length), bool)), logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    mixed = np.einsum("bhsc,bchk->bshk", weights, v)
    return mixed.reshape(rows, length, -1) @ _kernel(params["o"]).reshape(-1, config.d_model)


def _rotated(config: ModelConfig, x: np.ndarray) -> np.ndarray:
    half = config.head_width // 2
    angles = np.arange(x.shape[1])[:, None] * config.rope.theta ** (-np.arange(half) / half)
    sin, cos = np.sin(angles)[:, None], np.cos(angles)[:, None]
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _norm(config: ModelConfig, x: np.ndarray, params: PyTree) -> np.ndarray:
    scale = np.asarray(params["scale"], np.float64)
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.norm_epsilon) * scale


def _kernel(params: PyTree) -> np.ndarray:
    return np.asarray(params["kernel"], np.float64)
