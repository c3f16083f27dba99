"""Hugging Face names of the metadata and tensors of GGUF files, one table per architecture.

GGUF names are those of llama.cpp (gguf-py/gguf/constants.py). The import undoes the changes that llama.cpp's conversion
(conversion/*.py) makes to values.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.types import RlhfError

Sizes = Mapping[str, int]


class Header(NamedTuple):
    """Metadata of a GGUF file, and the shapes of its tensors (rows first)."""

    path: Path
    metadata: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    rope_factors: np.ndarray | None  # rope_freqs.weight: divisors of Llama 3's rotary frequencies

    @property
    def architecture(self) -> str:
        """Name of the architecture in llama.cpp. Raises RlhfError if the file has none."""
        if "general.architecture" not in self.metadata:
            raise RlhfError(f"{self.path} has no architecture (general.architecture is missing)")
        return self.metadata["general.architecture"]

    def get(self, key: str, default: Any = None) -> Any:
        """Value of a key of the architecture, such as `block_count` for `llama.block_count`."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def number(self, key: str) -> Any:
        """Value of a required numeric key of the architecture. Raises RlhfError if it is missing or not a number."""
        value = self.get(key)
        if not isinstance(value, int | float):
            raise RlhfError(f"{self.path} has no number under {self.architecture}.{key}, which its model requires")
        return value


class Architecture(NamedTuple):
    """Conversion tables of one architecture.

    The tables map names in the GGUF file to names on the Hub and a shape, given as letters: V vocabulary, D model
    width, F feed-forward width, Q all query heads, J all key heads, K one head, C context, A and G the fused
    sizes Q + 2 J and 2 F.
    """

    model_type: str
    model_class: str
    outside: Mapping[str, tuple[str, str]]  # tensors outside the layers
    layer: str  # prefix on the Hub of the tensors called blk.N. in the file
    inside: Mapping[str, tuple[str, str]]  # tensors of each layer
    config: Callable[[Header, Sizes], dict[str, Any]]
    head: str = "lm_head.weight"
    interleaved: bool = False  # q and k are stored for rotary pairs (2i, 2i + 1) instead of (i, i + K / 2)
    by_head: bool = False  # on the Hub, fused q, k, v are grouped by head; in the file, by q, k and v
    partial: bool = False  # partial rotary positions are allowed (rope.dimension_count)
    norm_offset: float = 0.0  # offset that llama.cpp adds to the weights of norms
    transposed: bool = False  # on the Hub, the layers' matrices have the input axis first


def _decoder(header: Header, sizes: Sizes) -> dict[str, Any]:
    """Config fields shared by all architectures but GPT-2 and GPT-NeoX."""
    if header.get("rope.dimension_count", sizes["K"]) != sizes["K"]:
        raise RlhfError(f"{header.path} has partial rotary positions ({header.architecture}.rope.dimension_count)")
    if header.get("attention.causal") is False:
        raise RlhfError(f"{header.path} is not a language model: its attention is not causal")
    return {
        "hidden_size": sizes["D"],
        "intermediate_size": sizes["F"],
        "num_hidden_layers": header.number("block_count"),
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["kv_heads"],
        "head_dim": sizes["K"],
        "max_position_embeddings": sizes["C"],
        "rms_norm_eps": header.number("attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "attention_bias": False,
        "rope_parameters": _rope(header, sizes),
    }


def _rope(header: Header, sizes: Sizes) -> dict[str, Any]:
    base = {"rope_theta": float(header.get("rope.freq_base", 10000.0))}
    factor = header.get("rope.scaling.factor", 0.0)
    kind = header.get("rope.scaling.type", "linear" if factor else "none")
    if header.rope_factors is not None:
        return base | _llama3(header, base["rope_theta"], sizes["K"])
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return base | {"rope_type": "default"}
    if kind == "linear":
        return base | {"rope_type": "linear", "factor": factor}
    corrections = ("rope.scaling.yarn_attn_factor", "rope.scaling.yarn_ext_factor", "rope.scaling.attn_factor")
    if kind == "yarn" and not any(header.get(key) for key in corrections):
        length = header.number("rope.scaling.original_context_length")
        betas = {f"beta_{end}": header.get(f"rope.scaling.yarn_beta_{end}") for end in ("fast", "slow")}
        yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length}
        return base | yarn | {name: beta for name, beta in betas.items() if beta is not None}
    raise RlhfError(f"{header.path} has rope scaling of type {kind!r}, which cannot be converted")


def _llama3(header: Header, theta: float, head_width: int) -> dict[str, Any]:
    """Recover Llama 3's rope scaling from the factors in the file, assuming that only `factor` differs between models.

    Raises: RlhfError if Llama 3's formula does not reproduce the factors.
    """
    assert header.rope_factors is not None
    factor, low, high, length = float(header.rope_factors.max()), 1.0, 4.0, 8192
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_width, 2) / head_width)
    smooth = np.clip((length / wavelengths - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if header.rope_factors.shape != expected.shape or not np.allclose(header.rope_factors, expected, rtol=1e-3):
        raise RlhfError(f"{header.path}: rope_freqs.weight is not Llama 3's scaling, and no other is supported")
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    return scaling | {"original_max_position_embeddings": length}


def _llama(header: Header, sizes: Sizes) -> dict[str, Any]:
    window = header.get("attention.sliding_window")
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    return _decoder(header, sizes) | {"mlp_bias": False} | (mistral if window else {})


def _qwen(header: Header, sizes: Sizes) -> dict[str, Any]:
    if header.get("attention.sliding_window"):
        raise RlhfError(f"{header.path} has a sliding window, but does not say in which layers")
    return _decoder(header, sizes) | {"use_sliding_window": False}


def _gemma(header: Header, sizes: Sizes) -> dict[str, Any]:
    return _decoder(header, sizes) | {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}


def _gemma2(header: Header, sizes: Sizes) -> dict[str, Any]:
    # The attention scale is not in the file; like llama.cpp, recognise the 27B model by its number of layers.
    largest = header.number("block_count") == 46
    return _gemma(header, sizes) | {
        "query_pre_attn_scalar": sizes["D"] // sizes["heads"] if largest else sizes["K"],
        "sliding_window": header.number("attention.sliding_window"),
        "layer_types": _layer_types(header, period=2),
        "attn_logit_softcapping": header.get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": header.get("final_logit_softcapping", 30.0),
    }


def _gemma3(header: Header, sizes: Sizes) -> dict[str, Any]:
    largest = header.number("block_count") == 62
    local = {"rope_type": "default", "rope_theta": float(header.get("rope.freq_base_swa", 10000.0))}
    return _gemma(header, sizes) | {
        "query_pre_attn_scalar": sizes["D"] // sizes["heads"] if largest else sizes["K"],
        "sliding_window": header.number("attention.sliding_window"),
        "layer_types": _layer_types(header, period=6),
        "final_logit_softcapping": header.get("final_logit_softcapping"),
        "attn_logit_softcapping": None,
        "rope_parameters": {"full_attention": _rope(header, sizes), "sliding_attention": local},
    }


def _layer_types(header: Header, period: int) -> list[str]:
    last = period - 1
    layers = range(header.number("block_count"))
    return ["full_attention" if layer % period == last else "sliding_attention" for layer in layers]


def _phi3(header: Header, sizes: Sizes) -> dict[str, Any]:
    length = header.get("rope.scaling.original_context_length", sizes["C"])
    return _decoder(header, sizes) | {
        "sliding_window": header.get("attention.sliding_window") or None,
        "original_max_position_embeddings": length,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
    }


def _gpt2(header: Header, sizes: Sizes) -> dict[str, Any]:
    return {
        "n_embd": sizes["D"],
        "n_layer": header.number("block_count"),
        "n_head": sizes["heads"],
        "n_inner": None if sizes["F"] == 4 * sizes["D"] else sizes["F"],
        "n_positions": sizes["C"],
        "layer_norm_epsilon": header.number("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
    }


def _gpt_neox(header: Header, sizes: Sizes) -> dict[str, Any]:
    rotated = header.get("rope.dimension_count", sizes["K"])
    return {
        "hidden_size": sizes["D"],
        "intermediate_size": sizes["F"],
        "num_hidden_layers": header.number("block_count"),
        "num_attention_heads": sizes["heads"],
        "max_position_embeddings": sizes["C"],
        "layer_norm_eps": header.number("attention.layer_norm_epsilon"),
        "hidden_act": "gelu",
        "attention_bias": True,
        "use_parallel_residual": header.get("use_parallel_residual", True),
        "rope_parameters": _rope(header, sizes) | {"partial_rotary_factor": _share(rotated, sizes["K"])},
    }


def _share(channels: int, width: int) -> float:
    """Compute the fraction for which int(width * fraction) == channels; int(26 * (15 / 26)) would be 14."""
    share = channels / width
    return share if int(width * share) == channels else math.nextafter(share, 2)


def _olmo2(header: Header, sizes: Sizes) -> dict[str, Any]:
    if header.get("attention.sliding_window"):
        raise RlhfError(f"{header.path} has a sliding window: it is OLMo 3, but only OLMo 2 is supported")
    return _decoder(header, sizes)


_OUTSIDE = {"token_embd.weight": ("model.embed_tokens.weight", "V D"), "output_norm.weight": ("model.norm.weight", "D")}
_ATTENTION = {
    "attn_norm.weight": ("input_layernorm.weight", "D"),
    "attn_q.weight": ("self_attn.q_proj.weight", "Q D"),
    "attn_k.weight": ("self_attn.k_proj.weight", "J D"),
    "attn_v.weight": ("self_attn.v_proj.weight", "J D"),
    "attn_output.weight": ("self_attn.o_proj.weight", "D Q"),
}
_QKV_BIAS = {
    "attn_q.bias": ("self_attn.q_proj.bias", "Q"),
    "attn_k.bias": ("self_attn.k_proj.bias", "J"),
    "attn_v.bias": ("self_attn.v_proj.bias", "J"),
}
_QK_NORM = {
    "attn_q_norm.weight": ("self_attn.q_norm.weight", "K"),
    "attn_k_norm.weight": ("self_attn.k_norm.weight", "K"),
}
_FEED_FORWARD = {
    "ffn_gate.weight": ("mlp.gate_proj.weight", "F D"),
    "ffn_up.weight": ("mlp.up_proj.weight", "F D"),
    "ffn_down.weight": ("mlp.down_proj.weight", "D F"),
}
_NORM = {"ffn_norm.weight": ("post_attention_layernorm.weight", "D")}
_NORMS_AROUND = {
    "post_attention_norm.weight": ("post_attention_layernorm.weight", "D"),
    "ffn_norm.weight": ("pre_feedforward_layernorm.weight", "D"),
    "post_ffw_norm.weight": ("post_feedforward_layernorm.weight", "D"),
}
_LLAMA_LAYER = _ATTENTION | _NORM | _FEED_FORWARD
_GEMMA2_LAYER = _ATTENTION | _NORMS_AROUND | _FEED_FORWARD
_PHI3_LAYER = {
    "attn_norm.weight": ("input_layernorm.weight", "D"),
    "attn_qkv.weight": ("self_attn.qkv_proj.weight", "A D"),
    "attn_output.weight": ("self_attn.o_proj.weight", "D Q"),
    "ffn_up.weight": ("mlp.gate_up_proj.weight", "G D"),
    "ffn_down.weight": ("mlp.down_proj.weight", "D F"),
} | _NORM
_OLMO2_LAYER = {
    **{name: entry for name, entry in _ATTENTION.items() if name != "attn_norm.weight"},
    "attn_q_norm.weight": ("self_attn.q_norm.weight", "Q"),
    "attn_k_norm.weight": ("self_attn.k_norm.weight", "J"),
    "post_attention_norm.weight": ("post_attention_layernorm.weight", "D"),
    "post_ffw_norm.weight": ("post_feedforward_layernorm.weight", "D"),
} | _FEED_FORWARD


def _with_biases(**names: str) -> dict[str, tuple[str, str]]:
    """Entries for weights and biases. Args: names maps names in the file to names on the Hub."""
    shapes = {"output_norm": "D", "attn_norm": "D", "ffn_norm": "D"}
    shapes |= {"attn_qkv": "A D", "attn_output": "D Q", "ffn_up": "F D", "ffn_down": "D F"}
    return {
        f"{source}.{part}": (f"{target}.{part}", shapes[source] if part == "weight" else shapes[source].split()[0])
        for source, target in names.items()
        for part in ("weight", "bias")
    }


_GPT2_OUTSIDE = {
    "token_embd.weight": ("transformer.wte.weight", "V D"),
    "position_embd.weight": ("transformer.wpe.weight", "C D"),
} | _with_biases(output_norm="transformer.ln_f")
_GPT2_LAYER = _with_biases(
    attn_norm="ln_1",
    attn_qkv="attn.c_attn",
    attn_output="attn.c_proj",
    ffn_norm="ln_2",
    ffn_up="mlp.c_fc",
    ffn_down="mlp.c_proj",
)
_GPT_NEOX_OUTSIDE = {"token_embd.weight": ("gpt_neox.embed_in.weight", "V D")} | _with_biases(
    output_norm="gpt_neox.final_layer_norm"
)
_GPT_NEOX_LAYER = _with_biases(
    attn_norm="input_layernorm",
    attn_qkv="attention.query_key_value",
    attn_output="attention.dense",
    ffn_norm="post_attention_layernorm",
    ffn_up="mlp.dense_h_to_4h",
    ffn_down="mlp.dense_4h_to_h",
)

_LLAMA = Architecture("llama", "LlamaForCausalLM", _OUTSIDE, "model.layers", _LLAMA_LAYER, _llama, interleaved=True)
_QWEN2 = Architecture("qwen2", "Qwen2ForCausalLM", _OUTSIDE, "model.layers", _LLAMA_LAYER | _QKV_BIAS, _qwen)
_QWEN3 = Architecture("qwen3", "Qwen3ForCausalLM", _OUTSIDE, "model.layers", _LLAMA_LAYER | _QK_NORM, _qwen)
_GEMMA = Architecture("gemma", "GemmaForCausalLM", _OUTSIDE, "model.layers", _LLAMA_LAYER, _gemma, norm_offset=1.0)
_GEMMA2 = Architecture("gemma2", "Gemma2ForCausalLM", _OUTSIDE, "model.layers", _GEMMA2_LAYER, _gemma2, norm_offset=1.0)
_GEMMA3 = _GEMMA2._replace(
    model_type="gemma3_text", model_class="Gemma3ForCausalLM", inside=_GEMMA2_LAYER | _QK_NORM, config=_gemma3
)
_GPT2 = Architecture("gpt2", "GPT2LMHeadModel", _GPT2_OUTSIDE, "transformer.h", _GPT2_LAYER, _gpt2, transposed=True)
_GPT_NEOX = Architecture(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    _GPT_NEOX_OUTSIDE,
    "gpt_neox.layers",
    _GPT_NEOX_LAYER,
    _gpt_neox,
    head="embed_out.weight",
    by_head=True,
    partial=True,
)
_OLMO2 = Architecture("olmo2", "Olmo2ForCausalLM", _OUTSIDE, "model.layers", _OLMO2_LAYER, _olmo2)
_PHI3 = Architecture("phi3", "Phi3ForCausalLM", _OUTSIDE, "model.layers", _PHI3_LAYER, _phi3)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "qwen2": _QWEN2,
    "qwen3": _QWEN3,
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3": _GEMMA3,
    "gpt2": _GPT2,
    "gptneox": _GPT_NEOX,
    "olmo2": _OLMO2,
    "phi3": _PHI3,
}
"""Families by llama.cpp's name of the architecture (`llama` includes Mistral and SmolLM2)."""
