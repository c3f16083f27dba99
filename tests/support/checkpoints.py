"""Tiny checkpoints as others bring them, made without torch: a llama at random, with a tokenizer and its template."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.interop import hf
from rlhf_jax.models.model_config import ModelConfig
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.scalars import ScalarNetwork
from tests.support import tokenizer_files

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 420,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
REWARD: dict[str, Any] = {
    "architectures": ["LlamaForSequenceClassification"],
    "id2label": {"0": "LABEL_0"},
    "label2id": {"LABEL_0": 0},
    "pad_token_id": 2,
}


def policy(
    directory: Path,
    tokenizer: Callable[[Path], Path] = tokenizer_files.chatml,
    *,
    seed: int = 0,
    context: int = 256,
    never: tuple[int, ...] = (),
) -> Path:
    """A language model that writes noise; the tokens `never` are never its most likely ones."""
    config = CONFIG | {"max_position_embeddings": context}
    network = PolicyNetwork(shape(config), config["vocab_size"], ())
    params = network.init(jax.random.key(seed))
    head = 40 * params["head"]  # far from uniform
    if never:
        head = head.at[jnp.array(never)].set(0)  # the most likely token has a logit above 0
    hf.save_pretrained(directory, "policy", {**params, "head": head}, config)
    tokenizer(directory)
    return directory


def reward_model(directory: Path, tokenizer: Callable[[Path], Path] = tokenizer_files.chatml) -> Path:
    """A classifier with one label."""
    config = CONFIG | REWARD
    network = ScalarNetwork(shape(config), config["vocab_size"], "last", bias=False)
    hf.save_pretrained(directory, "reward", network.init(jax.random.key(1)), config)
    tokenizer(directory)
    return directory


def shape(config: dict[str, Any]) -> ModelConfig:
    """The shape that a config.json describes."""
    return hf.read_shape(config, param_dtype="float32", compute_dtype="float32")[0]
