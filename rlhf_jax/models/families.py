"""The families of models: how each one's config.json and tensors are said in the terms of our transformer.

A family is a function from its config (as transformers' AutoConfig completes it) to a ModelConfig, and a table of its
tensors: which of our parameters each one holds, and in which layout.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import numpy as np

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.rotary import rope_of
from rlhf_jax.types import RlhfError

Layout = Literal["flat", "out_in", "in_out", "heads_qkv"]
"""flat: embeddings, scales, biases; out_in: torch's Linear; in_out: GPT-2's Conv1D; heads_qkv: GPT-NeoX's fused qkv."""


class Tensor(NamedTuple):
    """One tensor of a checkpoint. `{i}` in its name and parts stands for the number of a layer."""

    name: str
    parts: tuple[str, ...]  # the parameters that it holds, one after the other along its output axis
    layout: Layout = "flat"


class Family(NamedTuple):
    """How a family says what our transformer says."""

    fields: Callable[[Any], dict[str, Any]]  # transformers' config -> fields of ModelConfig
    tensors: tuple[Tensor, ...]  # those whose parameters a model lacks (biases, norms) are not in its checkpoint
    prefix: str  # what the names of tensors begin with, save where a checkpoint was written without it


def family_of(hf_config: dict[str, Any], where: str) -> Family:
    """The family of a config.json. Raises RlhfError naming a model_type that is not covered."""
    name = hf_config.get("model_type")
    if name not in FAMILIES:
        raise RlhfError(f"{where}: model_type = {name!r} is not supported: it should be one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def tensors_of(family: Family, layers: int, paths: Iterable[str]) -> list[Tensor]:
    """Every tensor that a model with these parameters has. Parameters that no tensor holds are a fault of the table."""
    paths, found = set(paths), []
    for name, parts, layout in family.tensors:
        for i in range(layers if "{i}" in name else 1):
            filled = tuple(part.format(i=i) for part in parts)
            if paths.issuperset(filled):
                found.append(Tensor(name.format(i=i), filled, layout))
    left = paths.difference(part for tensor in found for part in tensor.parts)
    assert not left, left
    return found


def unpack(array: np.ndarray, tensor: Tensor, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    """The parameters that a tensor holds, as views of it where that is possible."""
    if tensor.layout == "heads_qkv":
        heads, width = shapes[0][-2:]
        pieces = array.reshape(heads, 3, width, *array.shape[1:])
        return [np.moveaxis(pieces[:, i], (0, 1), (-2, -1)).reshape(shapes[i]) for i in range(3)]
    whole = array.T if tensor.layout == "out_in" else array
    axis = 0 if tensor.layout == "flat" else 1
    sizes = [math.prod(shape) // (1 if axis == 0 else whole.shape[0]) for shape in shapes]
    if len(shapes) == 1:
        return [whole.reshape(shapes[0])]
    pieces = np.split(whole, np.cumsum(sizes)[:-1], axis=axis)
    return [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def pack(parameters: list[np.ndarray], tensor: Tensor) -> np.ndarray:
    """The tensor that holds these parameters: the inverse of `unpack`."""
    if tensor.layout == "heads_qkv":
        pieces = np.stack([np.moveaxis(array, (-2, -1), (0, 1)) for array in parameters], axis=1)
        return pieces.reshape(-1, *pieces.shape[3:])
    if tensor.layout == "flat":
        if len(parameters) > 1 or tensor.name.endswith("bias"):
            return np.concatenate([array.reshape(-1) for array in parameters])
        return parameters[0]
    matrices = [array.reshape(_inputs(part, array), -1) for part, array in zip(tensor.parts, parameters, strict=True)]
    whole = np.concatenate(matrices, axis=1) if len(matrices) > 1 else matrices[0]
    return whole.T if tensor.layout == "out_in" else whole


def tensor_shape(tensor: Tensor, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape that a tensor must have, given those of its parameters."""
    size = sum(map(math.prod, shapes))
    if tensor.layout == "flat":
        return (size,) if len(shapes) > 1 or tensor.name.endswith("bias") else shapes[0]
    if tensor.layout == "heads_qkv" and tensor.name.endswith("bias"):
        return (size,)
    inputs = _inputs(tensor.parts[0], np.empty(shapes[0], bool))
    return (inputs, size // inputs) if tensor.layout == "in_out" else (size // inputs, inputs)


def _inputs(part: str, array: np.ndarray) -> int:
    """The size of a kernel's input: of two axes for the attention's output, else of one."""
    return math.prod(array.shape[: 2 if part.endswith("attention/o/kernel") else 1])


# ---- configs -------------------------------------------------------------------------------------------------------

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
    """Windows of a family that names each layer's kind of attention."""
    kinds = config.layer_types
    return tuple(config.sliding_window if kind == "sliding_attention" else None for kind in kinds)


def _everywhere(config: Any) -> tuple[int | None, ...]:
    """Windows of a family that has the same in every layer."""
    return (config.sliding_window,) * config.num_hidden_layers


def _decoder(
    config: Any,
    *,
    activation: str,
    attention_bias: bool = False,
    windows: tuple[int | None, ...] = (),
    partial: bool = False,  # a part of each head may turn
) -> dict[str, Any]:
    """What all but GPT-2 and GPT-NeoX have in common."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    parameters, context = config.rope_parameters, config.max_position_embeddings
    nested = "full_attention" in parameters
    # Where they are nested, transformers looks for YaRN's `truncate` beside the layers' parameters, not in them.
    truncate = {"truncate": parameters.get("truncate", True)} if nested else {}
    each = [parameters["full_attention"], parameters["sliding_attention"]] if nested else [parameters]
    ropes = [rope_of(one | truncate, width, context) for one in each]
    for rope in ropes:
        if not partial and rope.channels(width) != width:
            raise RlhfError(
                f"partial_rotary_factor = {rope.fraction} is not supported for model_type = {config.model_type!r}: "
                f"transformers turns all {width} channels of its heads, and has no way to turn {rope.channels(width)}"
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


def _llama(config: Any) -> dict[str, Any]:
    common = _decoder(config, activation=config.hidden_act, attention_bias=config.attention_bias)
    return common | {"mlp_bias": config.mlp_bias}


def _mistral(config: Any) -> dict[str, Any]:
    return _decoder(config, activation=config.hidden_act, windows=_everywhere(config))


def _phi3(config: Any) -> dict[str, Any]:
    return _decoder(config, activation=config.hidden_act, windows=_everywhere(config), partial=True)


def _qwen2(config: Any) -> dict[str, Any]:
    return _decoder(config, activation=config.hidden_act, windows=_by_layer_type(config)) | {"qkv_bias": True}


def _qwen3(config: Any) -> dict[str, Any]:
    windows = _by_layer_type(config)
    common = _decoder(config, activation=config.hidden_act, attention_bias=config.attention_bias, windows=windows)
    return common | {"qk_norm": "head"}


def _olmo2(config: Any) -> dict[str, Any]:
    common = _decoder(config, activation=config.hidden_act, attention_bias=config.attention_bias)
    return common | {"qk_norm": "all", "norm_placement": "after"}


def _gemma(config: Any) -> dict[str, Any]:
    common = _decoder(config, activation=config.hidden_act, attention_bias=config.attention_bias)
    return common | _gemma_kin(config)


def _gemma2(config: Any) -> dict[str, Any]:
    bias, windows = config.attention_bias, _by_layer_type(config)
    common = _decoder(config, activation=config.hidden_activation, attention_bias=bias, windows=windows)
    return common | {
        **_gemma_kin(config),
        "norm_placement": "around",
        "query_scale": config.query_pre_attn_scalar**-0.5,
        "attention_softcap": config.attn_logit_softcapping,
        "logit_softcap": config.final_logit_softcapping,
    }


def _gemma3(config: Any) -> dict[str, Any]:
    if config.attn_logit_softcapping is not None:
        raise RlhfError(
            f"attn_logit_softcapping = {config.attn_logit_softcapping} is not supported for model_type = "
            f"{config.model_type!r}: transformers does not apply it there. Set it to null, as in Gemma 3's releases"
        )
    return _gemma2(config) | {"qk_norm": "head"}


def _gemma_kin(config: Any) -> dict[str, Any]:
    if config.use_bidirectional_attention:
        raise RlhfError("use_bidirectional_attention = True is not supported: it makes an encoder of a Gemma")
    return {"norm_offset": 1.0, "embedding_scale": math.sqrt(config.hidden_size)}


def _gpt2(config: Any) -> dict[str, Any]:
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


def _gpt_neox(config: Any) -> dict[str, Any]:
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


# ---- tensors -------------------------------------------------------------------------------------------------------


def _linear(name: str, *parts: str, layout: Layout = "out_in") -> tuple[Tensor, Tensor]:
    """The weight and the bias of a linear layer, which may be several of ours in one."""
    bias: Layout = "heads_qkv" if layout == "heads_qkv" else "flat"
    return (
        Tensor(f"{name}.weight", tuple(f"block_{{i}}/{part}/kernel" for part in parts), layout),
        Tensor(f"{name}.bias", tuple(f"block_{{i}}/{part}/bias" for part in parts), bias),
    )


def _norm(name: str, path: str) -> tuple[Tensor, Tensor]:
    return Tensor(f"{name}.weight", (f"{path}/scale",)), Tensor(f"{name}.bias", (f"{path}/bias",))


def _ends(embedding: str, norm: str, head: str = "lm_head.weight") -> tuple[Tensor, ...]:
    """What stands before the layers and after them. `score` is the head of a reward model."""
    return (
        Tensor(embedding, ("embedding",)),
        *_norm(norm, "final_norm"),
        Tensor(head, ("head",)),
        Tensor("score.weight", ("head/kernel",), "out_in"),
    )


_QKV = ("attention/q", "attention/k", "attention/v")
_LLAMA = "model.layers.{i}."


def _llama_tensors(**norms: str) -> tuple[Tensor, ...]:
    """Llama's names, and those of its norms: what we call them, by what the family calls them."""
    return (
        *_ends("model.embed_tokens.weight", "model.norm"),
        *(tensor for part in "qkvo" for tensor in _linear(f"{_LLAMA}self_attn.{part}_proj", f"attention/{part}")),
        *_norm(f"{_LLAMA}self_attn.q_norm", "block_{i}/attention/q_norm"),
        *_norm(f"{_LLAMA}self_attn.k_norm", "block_{i}/attention/k_norm"),
        *(tensor for part in ("gate", "up", "down") for tensor in _linear(f"{_LLAMA}mlp.{part}_proj", part)),
        *(tensor for name, path in norms.items() for tensor in _norm(_LLAMA + name, f"block_{{i}}/{path}")),
    )


_LLAMA_TENSORS = _llama_tensors(input_layernorm="attention_norm", post_attention_layernorm="mlp_norm")
_GEMMA2_TENSORS = _llama_tensors(
    input_layernorm="attention_norm",
    post_attention_layernorm="attention_out_norm",
    pre_feedforward_layernorm="mlp_norm",
    post_feedforward_layernorm="mlp_out_norm",
)
_OLMO2_TENSORS = _llama_tensors(
    post_attention_layernorm="attention_out_norm", post_feedforward_layernorm="mlp_out_norm"
)
_PHI3_TENSORS = (
    *_ends("model.embed_tokens.weight", "model.norm"),
    *_linear(f"{_LLAMA}self_attn.qkv_proj", *_QKV),
    *_linear(f"{_LLAMA}self_attn.o_proj", "attention/o"),
    *_linear(f"{_LLAMA}mlp.gate_up_proj", "gate", "up"),
    *_linear(f"{_LLAMA}mlp.down_proj", "down"),
    *_norm(f"{_LLAMA}input_layernorm", "block_{i}/attention_norm"),
    *_norm(f"{_LLAMA}post_attention_layernorm", "block_{i}/mlp_norm"),
)
_GPT2_TENSORS = (
    *_ends("transformer.wte.weight", "transformer.ln_f"),
    Tensor("transformer.wpe.weight", ("positions",)),
    *_linear("transformer.h.{i}.attn.c_attn", *_QKV, layout="in_out"),
    *_linear("transformer.h.{i}.attn.c_proj", "attention/o", layout="in_out"),
    *_linear("transformer.h.{i}.mlp.c_fc", "up", layout="in_out"),
    *_linear("transformer.h.{i}.mlp.c_proj", "down", layout="in_out"),
    *_norm("transformer.h.{i}.ln_1", "block_{i}/attention_norm"),
    *_norm("transformer.h.{i}.ln_2", "block_{i}/mlp_norm"),
)
_NEOX = "gpt_neox.layers.{i}."
_GPT_NEOX_TENSORS = (
    *_ends("gpt_neox.embed_in.weight", "gpt_neox.final_layer_norm", head="embed_out.weight"),
    *_linear(f"{_NEOX}attention.query_key_value", *_QKV, layout="heads_qkv"),
    *_linear(f"{_NEOX}attention.dense", "attention/o"),
    *_linear(f"{_NEOX}mlp.dense_h_to_4h", "up"),
    *_linear(f"{_NEOX}mlp.dense_4h_to_h", "down"),
    *_norm(f"{_NEOX}input_layernorm", "block_{i}/attention_norm"),
    *_norm(f"{_NEOX}post_attention_layernorm", "block_{i}/mlp_norm"),
)

FAMILIES: dict[str, Family] = {
    "arcee": Family(lambda config: _llama(config) | {"gated": False}, _LLAMA_TENSORS, "model."),
    "gpt2": Family(_gpt2, _GPT2_TENSORS, "transformer."),
    "gpt_neox": Family(_gpt_neox, _GPT_NEOX_TENSORS, "gpt_neox."),
    "llama": Family(_llama, _LLAMA_TENSORS, "model."),
    "mistral": Family(_mistral, _LLAMA_TENSORS, "model."),
    "qwen2": Family(_qwen2, _LLAMA_TENSORS, "model."),
    "qwen3": Family(_qwen3, _LLAMA_TENSORS, "model."),
    "gemma": Family(_gemma, _LLAMA_TENSORS, "model."),
    "gemma2": Family(_gemma2, _GEMMA2_TENSORS, "model."),
    "gemma3_text": Family(_gemma3, _GEMMA2_TENSORS, "model."),
    "olmo2": Family(_olmo2, _OLMO2_TENSORS, "model."),
    "phi3": Family(_phi3, _PHI3_TENSORS, "model."),
}


def model_config(hf_config: Any, **dtypes: Any) -> ModelConfig:
    """The shape that a config of transformers describes. Raises RlhfError where we do not have what it asks for."""
    return ModelConfig(**FAMILIES[hf_config.model_type].fields(hf_config), **dtypes)
