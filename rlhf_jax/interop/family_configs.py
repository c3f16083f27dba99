"""Conversion of transformers configs to fields of ModelConfig, one function per family, and back for some of them.

As in transformers, a family reads only its own fields: `sliding_window` of a Llama or `layer_types` of a Mistral is
ignored. All functions raise RlhfError, naming field and value, for computations that we do not support.
"""

import math
from typing import Any

from rlhf_jax.models.model_config import ModelConfig
from rlhf_jax.models.rotary import rope_of
from rlhf_jax.types import RlhfError

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "relu2": "relu2",
    "gelu": "gelu_exact",
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
    "gelu_pytorch_tanh": "gelu",
}


def _activation(name: str) -> str:
    if name not in _ACTIVATIONS:
        raise RlhfError(f"the activation {name!r} is not supported: it should be one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _by_layer_type(config: Any) -> tuple[int | None, ...]:
    """Windows of a family whose config lists each layer's type of attention."""
    kinds = config.layer_types
    return tuple(config.sliding_window if kind == "sliding_attention" else None for kind in kinds)


def _everywhere(config: Any) -> tuple[int | None, ...]:
    """Windows of a family with the same window in every layer."""
    return (config.sliding_window,) * config.num_hidden_layers


def _decoder(
    config: Any,
    *,
    activation: str,
    attention_bias: bool = False,
    windows: tuple[int | None, ...] = (),
    partial: bool = False,  # the family supports partial rotary positions
) -> dict[str, Any]:
    """Fields shared by all families but GPT-2 and GPT-NeoX.

    Raises RlhfError for an unsupported activation or type of rope scaling, and for partial rotary positions in a family
    without them.
    """
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    parameters, context = config.rope_parameters, config.max_position_embeddings
    nested = "full_attention" in parameters
    # If they are nested, transformers reads YaRN's `truncate` from the outer dict.
    truncate = {"truncate": parameters.get("truncate", True)} if nested else {}
    each = [parameters["full_attention"], parameters["sliding_attention"]] if nested else [parameters]
    ropes = [rope_of(one | truncate, width, context) for one in each]
    for rope in ropes:
        if not partial and rope.channels(width) != width:
            raise RlhfError(
                f"partial_rotary_factor = {rope.fraction} is not supported for model_type = {config.model_type!r}: "
                f"transformers rotates all {width} channels of its heads and cannot rotate only {rope.channels(width)}"
            )
    return {
        "d_model": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": heads,
        "n_kv_heads": config.num_key_value_heads,
        "head_dim": width,
        "d_ff": config.intermediate_size,
        "activation": _activation(activation),
        "gated": True,
        "norm_epsilon": config.rms_norm_eps,
        "qkv_bias": attention_bias,
        "out_bias": attention_bias,
        "context": context,
        "rope": ropes[0],
        "local_rope": ropes[1] if nested else None,
        "windows": windows if any(windows) else None,
        "tied": bool(config.tie_word_embeddings),
    }


def llama(config: Any) -> dict[str, Any]:
    """Llama and SmolLM2."""
    common = _decoder(config, activation=config.hidden_act, attention_bias=config.attention_bias)
    return common | {"mlp_bias": config.mlp_bias}


def arcee(config: Any) -> dict[str, Any]:
    """Arcee: Llama with a plain MLP."""
    return llama(config) | {"gated": False}


def mistral(config: Any) -> dict[str, Any]:
    """Mistral: the same window in all layers."""
    return _decoder(config, activation=config.hidden_act, windows=_everywhere(config))


def phi3(config: Any) -> dict[str, Any]:
    """Phi-3: partial rotary positions."""
    return _decoder(config, activation=config.hidden_act, windows=_everywhere(config), partial=True)


def qwen2(config: Any) -> dict[str, Any]:
    """Qwen2: biases for queries, keys and values, and windows by layer."""
    return _decoder(config, activation=config.hidden_act, windows=_by_layer_type(config)) | {"qkv_bias": True}


def qwen3(config: Any) -> dict[str, Any]:
    """Qwen3: queries and keys normalised per head."""
    windows = _by_layer_type(config)
    common = _decoder(config, activation=config.hidden_act, attention_bias=config.attention_bias, windows=windows)
    return common | {"qk_norm": "head"}


def olmo2(config: Any) -> dict[str, Any]:
    """OLMo 2: norms after attention and MLP, queries and keys normalised over all heads."""
    common = _decoder(config, activation=config.hidden_act, attention_bias=config.attention_bias)
    return common | {"qk_norm": "all", "norm_placement": "after"}


def gemma(config: Any) -> dict[str, Any]:
    """Gemma: offset norms and scaled embeddings."""
    common = _decoder(config, activation=config.hidden_act, attention_bias=config.attention_bias)
    return common | _gemma_kin(config)


def gemma2(config: Any) -> dict[str, Any]:
    """Gemma 2: norms around, soft caps, windows by layer."""
    bias, windows = config.attention_bias, _by_layer_type(config)
    common = _decoder(config, activation=config.hidden_activation, attention_bias=bias, windows=windows)
    return common | {
        **_gemma_kin(config),
        "norm_placement": "around",
        "query_scale": config.query_pre_attn_scalar**-0.5,
        "attention_softcap": config.attn_logit_softcapping,
        "logit_softcap": config.final_logit_softcapping,
    }


def gemma3(config: Any) -> dict[str, Any]:
    """Gemma 3: rotary positions by layer type; queries and keys normalised per head."""
    if config.attn_logit_softcapping is not None:
        raise RlhfError(
            f"attn_logit_softcapping = {config.attn_logit_softcapping} is not supported for model_type = "
            f"{config.model_type!r}: transformers ignores it there. Set it to null, as in Gemma 3's releases"
        )
    return gemma2(config) | {"qk_norm": "head"}


def _gemma_kin(config: Any) -> dict[str, Any]:
    if config.use_bidirectional_attention:
        raise RlhfError("use_bidirectional_attention = True is not supported: it turns Gemma into an encoder")
    return {"norm_offset": 1.0, "embedding_scale": math.sqrt(config.hidden_size)}


def gpt2(config: Any) -> dict[str, Any]:
    """GPT-2: learned positions."""
    if config.scale_attn_by_inverse_layer_idx:
        raise RlhfError("scale_attn_by_inverse_layer_idx = True is not supported: it should be False")
    return {
        "d_model": config.n_embd,
        "n_layers": config.n_layer,
        "n_heads": config.n_head,
        "d_ff": config.n_inner or 4 * config.n_embd,
        "activation": _activation(config.activation_function),
        "norm": "layer",
        "norm_epsilon": config.layer_norm_epsilon,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "query_scale": None if config.scale_attn_weights else 1.0,
        "positions": "learned",
        "context": config.n_positions,
        "tied": bool(config.tie_word_embeddings),
    }


def gpt_neox(config: Any) -> dict[str, Any]:
    """GPT-NeoX and Pythia: parallel attention and MLP, partial rotary positions."""
    width = config.hidden_size // config.num_attention_heads
    return {
        "d_model": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "d_ff": config.intermediate_size,
        "activation": _activation(config.hidden_act),
        "parallel": bool(config.use_parallel_residual),
        "norm": "layer",
        "norm_epsilon": config.layer_norm_eps,
        "qkv_bias": bool(config.attention_bias),
        "out_bias": bool(config.attention_bias),
        "mlp_bias": True,
        "context": config.max_position_embeddings,
        "rope": rope_of(config.rope_parameters, width, config.max_position_embeddings),
        "tied": bool(config.tie_word_embeddings),
    }


# ---- from ModelConfig to config.json, for models trained from scratch ------------------------------------------------

_NAMES_OF_ACTIVATIONS = {
    "relu": "relu",
    "relu2": "relu2",
    "gelu": "gelu_pytorch_tanh",
    "gelu_exact": "gelu",
    "silu": "silu",
}


def to_llama(config: ModelConfig) -> dict[str, Any]:
    """Describe a model with the fields of Llama, without biases of the MLP."""
    context = {} if config.context is None else {"max_position_embeddings": config.context}
    return context | {
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_act": _NAMES_OF_ACTIVATIONS[config.activation],
        "rms_norm_eps": config.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope.theta},
        "attention_bias": config.qkv_bias,
        "tie_word_embeddings": config.tied,
    }


def to_llama_with_biases(config: ModelConfig) -> dict[str, Any]:
    """Describe a model with the fields of Llama."""
    return to_llama(config) | {"mlp_bias": config.mlp_bias}


def to_gpt2(config: ModelConfig) -> dict[str, Any]:
    """Describe a model with the fields of GPT-2."""
    context = {} if config.context is None else {"n_positions": config.context}
    return context | {
        "n_embd": config.d_model,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.d_ff,
        "activation_function": _NAMES_OF_ACTIVATIONS[config.activation],
        "layer_norm_epsilon": config.norm_epsilon,
        "tie_word_embeddings": config.tied,
    }


def to_gpt_neox(config: ModelConfig) -> dict[str, Any]:
    """Describe a model with the fields of GPT-NeoX."""
    context = {} if config.context is None else {"max_position_embeddings": config.context}
    rope = {"rope_type": "default", "rope_theta": config.rope.theta, "partial_rotary_factor": config.rope.fraction}
    return context | {
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "hidden_act": _NAMES_OF_ACTIVATIONS[config.activation],
        "layer_norm_eps": config.norm_epsilon,
        "rope_parameters": rope,
        "use_parallel_residual": config.parallel,
        "attention_bias": config.qkv_bias,
        "tie_word_embeddings": config.tied,
    }
