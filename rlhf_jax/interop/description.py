"""Describe a model trained from scratch as a transformers config.json of a family that supports its architecture."""

import dataclasses
from collections.abc import Callable
from typing import Any

from rlhf_jax.interop.hf import read_shape
from rlhf_jax.models.model_config import ModelConfig, Rope
from rlhf_jax.types import RlhfError

_ACTIVATIONS = {"relu": "relu", "relu2": "relu2", "gelu": "gelu_pytorch_tanh", "gelu_exact": "gelu", "silu": "silu"}


def describe(config: ModelConfig, vocab_size: int, **tokens: int) -> dict[str, Any]:
    """Make the config.json of the first family that expresses exactly this architecture, checked by reading it back.

    Args: tokens are the ids of special tokens, by their names in config.json.
    Raises RlhfError if no family does, naming the nearest one and the fields that differ.
    """
    differing = {}
    for family, (name, fields) in _FAMILIES.items():
        hf_config = {"model_type": family, "architectures": [name], "vocab_size": vocab_size} | tokens | fields(config)
        try:
            parsed, _ = read_shape(hf_config, param_dtype=config.param_dtype, compute_dtype=config.compute_dtype)
        except RlhfError:  # the family cannot express this architecture at all
            continue
        differing[family] = _differences(
            config, dataclasses.replace(parsed, remat=config.remat, attention=config.attention)
        )
        if not differing[family]:
            return hf_config
    nearest = min(differing, key=lambda family: len(differing[family]))
    raise RlhfError(
        "no transformers family supports the architecture of this model, which was trained from scratch; the nearest "
        f"is {nearest}, with {', '.join(differing[nearest])}. To export a model, train one with that architecture"
    )


def _differences(config: ModelConfig, parsed: ModelConfig) -> list[str]:
    own, other = _filled(config), _filled(parsed)
    if config.positions == "rotary" and config.context is None:  # unlimited; ignore the default of the family
        other["context"] = None
    return [f"{name} = {other[name]!r} instead of {own[name]!r}" for name in own if own[name] != other[name]]


def _filled(config: ModelConfig) -> dict[str, Any]:
    """Return the fields, with None replaced by explicit values."""
    filled = dataclasses.replace(config, n_kv_heads=config.kv_heads, head_dim=config.head_width)
    return vars(filled) | ({"rope": Rope()} if config.positions == "learned" else {})


def _llama(config: ModelConfig) -> dict[str, Any]:
    context = {} if config.context is None else {"max_position_embeddings": config.context}
    return context | {
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_act": _ACTIVATIONS[config.activation],
        "rms_norm_eps": config.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope.theta},
        "attention_bias": config.qkv_bias,
        "tie_word_embeddings": config.tied,
    }


def _llama_with_biases(config: ModelConfig) -> dict[str, Any]:
    return _llama(config) | {"mlp_bias": config.mlp_bias}


def _gpt2(config: ModelConfig) -> dict[str, Any]:
    context = {} if config.context is None else {"n_positions": config.context}
    return context | {
        "n_embd": config.d_model,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.d_ff,
        "activation_function": _ACTIVATIONS[config.activation],
        "layer_norm_epsilon": config.norm_epsilon,
        "tie_word_embeddings": config.tied,
    }


def _gpt_neox(config: ModelConfig) -> dict[str, Any]:
    context = {} if config.context is None else {"max_position_embeddings": config.context}
    rope = {"rope_type": "default", "rope_theta": config.rope.theta, "partial_rotary_factor": config.rope.fraction}
    return context | {
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "hidden_act": _ACTIVATIONS[config.activation],
        "layer_norm_eps": config.norm_epsilon,
        "rope_parameters": rope,
        "use_parallel_residual": config.parallel,
        "attention_bias": config.qkv_bias,
        "tie_word_embeddings": config.tied,
    }


_FAMILIES: dict[str, tuple[str, Callable[[ModelConfig], dict[str, Any]]]] = {
    "arcee": ("ArceeForCausalLM", _llama_with_biases),
    "llama": ("LlamaForCausalLM", _llama_with_biases),
    "qwen3": ("Qwen3ForCausalLM", _llama),
    "olmo2": ("Olmo2ForCausalLM", _llama),
    "gpt2": ("GPT2LMHeadModel", _gpt2),
    "gpt_neox": ("GPTNeoXForCausalLM", _gpt_neox),
}
