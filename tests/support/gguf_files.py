"""Small GGUF files as llama.cpp's conversion writes them, from tensors named as on the hub.

The names are those of `gguf`'s map; what is done to the values is written once more here, from llama.cpp's conversion.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

F32 = gguf.GGMLQuantizationType.F32
HEADS, KV_HEADS, WIDTH, INNER, VOCABULARY, LAYERS, CONTEXT = 4, 2, 64, 96, 260, 2, 48
KEYS = {
    "block_count": LAYERS,
    "context_length": CONTEXT,
    "embedding_length": WIDTH,
    "feed_forward_length": INNER,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 20000.0,
}
GPT2_KEYS = {key: value for key, value in KEYS.items() if not key.endswith(("_kv", "_rms_epsilon", "freq_base"))}
WIDE = KEYS | {"attention.key_length": 32, "attention.value_length": 32}
FAMILY_KEYS: dict[str, dict[str, Any]] = {
    "llama": KEYS | {"rope.dimension_count": 16, "vocab_size": VOCABULARY},
    "qwen2": KEYS,
    "qwen3": WIDE,
    "gemma": {key: value for key, value in WIDE.items() if not key.startswith("rope")},
    "gemma2": WIDE | {"attention.sliding_window": 8, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3": WIDE | {"block_count": 7, "attention.sliding_window": 8},
    "gpt2": GPT2_KEYS | {"attention.layer_norm_epsilon": 1e-5},
    "gptneox": GPT2_KEYS
    | {"attention.layer_norm_epsilon": 1e-5, "rope.dimension_count": 4, "use_parallel_residual": True},
    "olmo2": KEYS,
    "phi3": KEYS | {"rope.dimension_count": 16, "attention.sliding_window": 8},
}


def alphabet() -> list[str]:
    """The letters that stand for bytes in a byte-level vocabulary."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


TEMPLATE = "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>\n{% endfor %}"
TOKENIZER: dict[str, Any] = {
    "model": "gpt2",
    "pre": "smollm",
    "tokens": [*alphabet(), "<s>", "</s>", "<pad>", "<unk>"],
    "token_type": [1] * 256 + [3] * 4,
    "merges": [],
    "bos_token_id": 256,
    "eos_token_id": 257,
    "padding_token_id": 258,
    "unknown_token_id": 259,
}


def write_gguf(
    path: Path,
    architecture: str,
    keys: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    quantisation: gguf.GGMLQuantizationType = F32,
    tokenizer: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Writes a GGUF file. `tensors` are called as on the hub; `extra` ones as in the file. Vectors stay in float32."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        _add(writer, f"{architecture}.{key}", value)
    for key, value in (TOKENIZER if tokenizer is None else tokenizer).items():
        _add(writer, f"tokenizer.ggml.{key}", value)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in stored(architecture, tensors, keys).items():
        kind = quantisation if tensor.ndim > 1 else F32
        writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    if isinstance(value, list):
        if value:
            writer.add_array(key, value)
    else:
        kinds[type(value)](key, value)


def stored(architecture: str, tensors: Mapping[str, np.ndarray], keys: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors as they lie in the file, in float32."""
    names = gguf.get_tensor_name_map(_architectures()[architecture], keys["block_count"])
    found = {}
    for hub, tensor in tensors.items():
        name = names.get_name(hub, try_suffixes=(".weight", ".bias"))
        assert name is not None, hub
        found[name] = np.ascontiguousarray(_change(architecture, hub, tensor))
    return found


def _architectures() -> dict[str, gguf.MODEL_ARCH]:
    return {name: architecture for architecture, name in gguf.MODEL_ARCH_NAMES.items()}


def _change(architecture: str, name: str, tensor: np.ndarray) -> np.ndarray:
    if architecture == "llama" and "q_proj" in name:
        return permute(tensor, HEADS)
    if architecture == "llama" and "k_proj" in name:
        return permute(tensor, KV_HEADS)
    if "query_key_value" in name:
        return tensor.reshape(HEADS, 3, -1).swapaxes(0, 1).reshape(tensor.shape)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return tensor + 1
    if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        return tensor.T
    return tensor


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """From rotary pairs (i, i + K / 2) to (2i, 2i + 1)."""
    return weights.reshape(heads, 2, len(weights) // heads // 2, -1).swapaxes(1, 2).reshape(weights.shape)


def hub_tensors(architecture: str, seed: int = 0, tied: bool = False) -> dict[str, np.ndarray]:
    """Random tensors of a small model. They are multiples of 1 / 256, so that adding 1 and taking it away is exact."""
    keys = FAMILY_KEYS[architecture]
    head = keys.get("attention.key_length", 16)
    q, kv, width, inner, words = HEADS * head, KV_HEADS * head, WIDTH, INNER, VOCABULARY
    if architecture == "gpt2":
        outside = {"wte.weight": (words, width), "wpe.weight": (CONTEXT, width)} | _norm("ln_f", width)
        inside = _norm("ln_1", width) | _norm("ln_2", width)
        for name, rows, columns in (
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", width, inner),
            ("mlp.c_proj", inner, width),
        ):
            inside |= {f"{name}.weight": (rows, columns), f"{name}.bias": (columns,)}
        outside, prefix = {f"transformer.{name}": shape for name, shape in outside.items()}, "transformer.h"
    elif architecture == "gptneox":
        outside, prefix = {"gpt_neox.embed_in.weight": (words, width)}, "gpt_neox.layers"
        outside |= _norm("gpt_neox.final_layer_norm", width)
        inside = _norm("input_layernorm", width) | _norm("post_attention_layernorm", width)
        for name, rows, columns in (
            ("attention.query_key_value", 3 * width, width),
            ("attention.dense", width, width),
            ("mlp.dense_h_to_4h", inner, width),
            ("mlp.dense_4h_to_h", width, inner),
        ):
            inside |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    else:
        outside, prefix = {"model.embed_tokens.weight": (words, width), "model.norm.weight": (width,)}, "model.layers"
        projections = {"self_attn.q_proj": (q, width), "self_attn.k_proj": (kv, width), "self_attn.v_proj": (kv, width)}
        projections |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width)}
        if architecture == "phi3":
            projections = {"self_attn.qkv_proj": (q + 2 * kv, width), "mlp.gate_up_proj": (2 * inner, width)}
        projections |= {"self_attn.o_proj": (width, q), "mlp.down_proj": (width, inner)}
        norms = ["input_layernorm", "post_attention_layernorm"]
        if architecture in ("gemma2", "gemma3"):
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        if architecture == "olmo2":
            norms = ["post_attention_layernorm", "post_feedforward_layernorm"]
        inside = {f"{name}.weight": shape for name, shape in projections.items()}
        inside |= {f"{name}.weight": (width,) for name in norms}
        if architecture in ("qwen3", "gemma3"):
            inside |= {f"self_attn.{name}_norm.weight": (head,) for name in "qk"}
        if architecture == "olmo2":
            inside |= {"self_attn.q_norm.weight": (q,), "self_attn.k_norm.weight": (kv,)}
        if architecture == "qwen2":
            inside |= {f"self_attn.{name}_proj.bias": (rows,) for name, rows in (("q", q), ("k", kv), ("v", kv))}
    shapes = outside | {
        f"{prefix}.{layer}.{name}": shape for layer in range(keys["block_count"]) for name, shape in inside.items()
    }
    if not tied and not architecture.startswith("gemma"):  # which has no other head
        shapes["embed_out.weight" if architecture == "gptneox" else "lm_head.weight"] = (words, width)
    rng = np.random.default_rng(seed)
    return {name: (rng.integers(-256, 256, shape) / 256).astype(np.float32) for name, shape in shapes.items()}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}
