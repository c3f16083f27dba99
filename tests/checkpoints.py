"""Tiny random checkpoints of Hugging Face's, made without torch: weights, config, tokenizer, chat template."""

from pathlib import Path

import jax
import jax.numpy as jnp

from rlhf_jax.models import hf
from rlhf_jax.models.config import ModelConfig, Rope
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.scalars import ScalarNetwork
from tests.text import checkpoints as tokenizers

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 370,  # more rows than the tokenizer has tokens
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
CONFIG = ModelConfig(
    d_model=16,
    n_layers=2,
    n_heads=2,
    n_kv_heads=1,
    head_dim=8,
    d_ff=24,
    gated=True,
    activation="silu",
    norm_epsilon=1e-5,
    rope=Rope(),
    param_dtype="float32",
    compute_dtype="float32",
)


def judge(directory: Path, *, tokenizer: str = "gpt2") -> Path:
    """A reward model with a tokenizer of its own: a classifier with one label."""
    config = {**LLAMA, "architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    network = ScalarNetwork(CONFIG, LLAMA["vocab_size"], "last", bias=False)
    params = jax.tree.map(lambda leaf: jnp.asarray(3 * leaf), network.init(jax.random.key(7)))
    hf.save_pretrained(directory, "reward", params, config)
    return tokenizers.CHECKPOINTS[tokenizer](directory)


def llama(directory: Path, *, seed: int = 0, tokenizer: str = "chatml") -> Path:
    """A language model with a tokenizer of tests/text/checkpoints.py."""
    network = PolicyNetwork(CONFIG, LLAMA["vocab_size"], ())
    params = network.init(jax.random.key(seed))
    hf.save_pretrained(directory, "policy", jax.tree.map(lambda leaf: jnp.asarray(3 * leaf), params), LLAMA)
    return tokenizers.CHECKPOINTS[tokenizer](directory)
