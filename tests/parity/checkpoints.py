# torch and transformers are in .venv-parity only, where types are not checked.
# pyrefly: ignore-errors[missing-import, missing-attribute]
"""Checkpoints that transformers makes at random, of every family and in several shapes each."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from rlhf_jax.interop import hf
from rlhf_jax.models.transformer import Transformer

LENGTH = 20

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 32,
    "factor": 2.0,
    "short_factor": [1.0, 1.1, 1.3, 2.0],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
}


def gpt2(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": 64,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }


# name -> (family, its config)
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", gpt2()),
    "gpt2, inner width": (
        "gpt2",
        gpt2(n_inner=40, activation_function="gelu", layer_norm_epsilon=1e-3, scale_attn_weights=False),
    ),
    "gpt_neox": ("gpt_neox", SMALL),
    "gpt_neox, in sequence, tied, no bias": (
        "gpt_neox",
        {
            **SMALL,
            "use_parallel_residual": False,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
        },
    ),
    "llama, grouped": ("llama", GROUPED),
    "llama, tied, biases": (
        "llama",
        {**SMALL, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3},
    ),
    "llama 3, long": ("llama", {**GROUPED, "rope_parameters": LLAMA3, "head_dim": 16}),
    "llama, linear rope": (
        "llama",
        {**GROUPED, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "llama, dynamic rope": (
        "llama",
        {**GROUPED, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "qwen2, yarn": ("qwen2", {**GROUPED, "rope_parameters": YARN | {"beta_fast": 2.0, "beta_slow": 0.1}}),
    "qwen3, yarn, untruncated": (
        "qwen3",
        {
            **GROUPED,
            "head_dim": 16,
            "rope_parameters": YARN | {"truncate": False, "mscale": 1.5, "mscale_all_dim": 0.7, "beta_slow": 0.2},
        },
    ),
    "gpt_neox, yarn, amplified": (
        "gpt_neox",
        {**SMALL, "rope_parameters": YARN | {"attention_factor": 1.5, "partial_rotary_factor": 0.5}},
    ),
    "gpt_neox, odd rotary channels": (  # 3 of a head's 12: transformers turns 4, with exponents over 3
        "gpt_neox",
        {
            **SMALL,
            "hidden_size": 48,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.25},
        },
    ),
    "arcee": ("arcee", GROUPED),
    "arcee, tied, biases": (
        "arcee",
        {**SMALL, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "hidden_act": "relu"},
    ),
    "mistral, window": ("mistral", {**GROUPED, "sliding_window": 5}),
    "mistral, no window": ("mistral", {**GROUPED, "sliding_window": None}),
    "qwen2": ("qwen2", {**GROUPED, "tie_word_embeddings": True}),
    "qwen2, windows": (
        "qwen2",
        {**GROUPED, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {**GROUPED, "head_dim": 16}),
    "qwen3, biases, tied": ("qwen3", {**GROUPED, "head_dim": 6, "attention_bias": True, "tie_word_embeddings": True}),
    "gemma": ("gemma", {**GROUPED, "head_dim": 16}),
    "gemma, one kv head": ("gemma", {**SMALL, "num_key_value_heads": 1, "head_dim": 10}),
    "gemma2": (
        "gemma2",
        {
            **GROUPED,
            "head_dim": 16,
            "sliding_window": 5,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 1.0,
            "final_logit_softcapping": 2.0,
        },
    ),
    "gemma2, no caps": (
        "gemma2",
        {
            **GROUPED,
            "head_dim": 8,
            "sliding_window": 3,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            **GROUPED,
            "head_dim": 16,
            "sliding_window": 5,
            "query_pre_attn_scalar": 20,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
            },
        },
    ),
    "olmo2": ("olmo2", GROUPED),
    "olmo2, tied": ("olmo2", {**SMALL, "tie_word_embeddings": True, "attention_bias": True}),
    "phi3": ("phi3", {**GROUPED, "sliding_window": 6}),
    "phi3, longrope, short": ("phi3", {**GROUPED, "rope_parameters": LONGROPE}),
    "phi3, partial": (
        "phi3",
        {
            **GROUPED,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    ),
}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model of transformers and the directory that it was saved to."""

    model: Any
    directory: Path


def make(name: str, directory: Path, *, labels: int | None = None) -> Checkpoint:
    """A random checkpoint, its weights large enough that every part of the network matters."""
    family, fields = SHAPES[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **fields)
    if labels is None:
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    else:
        config.num_labels, config.pad_token_id = labels, 0
        model = transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.eval().save_pretrained(directory)
    return Checkpoint(model, directory)


def tokens(rows: int, length: int = LENGTH) -> np.ndarray:
    """Random tokens without special ones."""
    return np.random.default_rng(0).integers(3, 64, (rows, length)).astype(np.int32)


def logits_of(pretrained, params, tokens, mask):
    """Logits of every position, by the body and the head that a policy uses."""
    network = hf.network_of(pretrained)
    hidden = Transformer(pretrained.config, pretrained.vocab_size).apply({"params": params}, tokens, mask)
    return network.logits(params, hidden.reshape(-1, hidden.shape[-1])).reshape(*tokens.shape, -1)
