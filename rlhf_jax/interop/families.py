"""Model families: mapping of each family's config.json and tensors to our transformer.

A family consists of a function from its config (completed by transformers' AutoConfig) to fields of ModelConfig, and a
table of its tensors with the parameters that each contains and their layout.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import numpy as np

from rlhf_jax import user_code
from rlhf_jax.interop import family_configs
from rlhf_jax.models.model_config import ModelConfig
from rlhf_jax.types import RlhfError

Layout = Literal["flat", "out_in", "in_out", "heads_qkv"]
"""flat: embeddings, scales, biases; out_in: torch's Linear; in_out: GPT-2's Conv1D; heads_qkv: GPT-NeoX's fused qkv."""


class Tensor(NamedTuple):
    """Tensor of a checkpoint. `{i}` in its name and parts stands for the layer number."""

    name: str
    parts: tuple[str, ...]  # parameters that it contains, concatenated along its output axis
    layout: Layout = "flat"


class Family(NamedTuple):
    """Mapping of one family to our transformer, and back for models trained from scratch."""

    name: str  # model_type in its config.json
    fields: Callable[[Any], dict[str, Any]]  # transformers' config -> fields of ModelConfig
    tensors: tuple[Tensor, ...]  # all tensors, including those (biases, norms) that not every model has
    prefix: str  # of tensor names; some checkpoints omit it
    # For families that export models trained from scratch: transformers' class, and ModelConfig -> config.json.
    architecture: str | None = None
    to_config: Callable[[ModelConfig], dict[str, Any]] | None = None


USER_FAMILY = "rlhf_jax_family"
"""Key under which a loaded model's config names a user-defined family. It is never stored in checkpoints."""


def family_of(hf_config: dict[str, Any], where: str) -> Family:
    """Find the family of a config.json. Raises RlhfError for an unsupported model_type."""
    if source := hf_config.get(USER_FAMILY):
        return _load_family(source, hf_config, where)
    name = hf_config.get("model_type")
    if name is None:
        raise RlhfError(
            f"{where} has no model_type: give a Hugging Face checkpoint. If this is the directory of a stage, export "
            "its model first: rlhf-jax export --workdir=DIR --stage=NAME --out=MODEL"
        )
    if name not in FAMILIES:
        raise RlhfError(
            f"{where}: model_type = {name!r} is not supported: it should be one of {', '.join(FAMILIES)}. For another "
            "one, write a Family as in examples/family.py, and set family = 'mine.py:FAMILY' beside init, or --family"
        )
    return FAMILIES[name]


def _load_family(source: str, hf_config: dict[str, Any], where: str) -> Family:
    family = user_code.load_object(source, "model family")
    if not isinstance(family, Family):
        raise RlhfError(f"model family {source} is a {type(family).__name__}: it must be an interop.families.Family")
    if family.name != hf_config.get("model_type"):
        raise RlhfError(f"{where}: model_type = {hf_config.get('model_type')!r}, but {source} is for {family.name!r}")
    return family


def tensors_of(family: Family, layers: int, paths: Iterable[str]) -> list[Tensor]:
    """List the tensors of a model with these parameter paths. Raises RlhfError for a parameter that none contains."""
    paths, tensors = set(paths), []
    for name, parts, layout in family.tensors:
        for i in range(layers if "{i}" in name else 1):
            filled = tuple(part.format(i=i) for part in parts)
            if paths.issuperset(filled):
                tensors.append(Tensor(name.format(i=i), filled, layout))
    if missing := sorted(paths.difference(part for tensor in tensors for part in tensor.parts)):
        raise RlhfError(
            f"model family {family.name!r} has no tensor for {', '.join(missing[:3])}: add it to the tensors of its "
            "Family, or change the fields of its config function so that the model lacks this parameter"
        )
    return tensors


def unpack(array: np.ndarray, tensor: Tensor, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    """Split a tensor into its parameters, as views if possible."""
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
    """Build a tensor from its parameters: the inverse of `unpack`."""
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
    """Shape of a tensor, from the shapes of its parameters."""
    size = sum(map(math.prod, shapes))
    if tensor.layout == "flat":
        return (size,) if len(shapes) > 1 or tensor.name.endswith("bias") else shapes[0]
    if tensor.layout == "heads_qkv" and tensor.name.endswith("bias"):
        return (size,)
    inputs = _inputs(tensor.parts[0], np.empty(shapes[0], bool))
    return (inputs, size // inputs) if tensor.layout == "in_out" else (size // inputs, inputs)


def _inputs(part: str, array: np.ndarray) -> int:
    """Compute the input size of a kernel: the attention's output projection has two input axes, others have one."""
    return math.prod(array.shape[: 2 if part.endswith("attention/o/kernel") else 1])


# ---- tensors -------------------------------------------------------------------------------------------------------


def linear(name: str, *parts: str, layout: Layout = "out_in") -> tuple[Tensor, Tensor]:
    """Weight and bias of a linear layer, which may combine several of our layers."""
    bias: Layout = "heads_qkv" if layout == "heads_qkv" else "flat"
    return (
        Tensor(f"{name}.weight", tuple(f"block_{{i}}/{part}/kernel" for part in parts), layout),
        Tensor(f"{name}.bias", tuple(f"block_{{i}}/{part}/bias" for part in parts), bias),
    )


def norm(name: str, path: str) -> tuple[Tensor, Tensor]:
    """Name the scale and bias of a norm."""
    return Tensor(f"{name}.weight", (f"{path}/scale",)), Tensor(f"{name}.bias", (f"{path}/bias",))


def ends(embedding: str, final_norm: str, head: str = "lm_head.weight") -> tuple[Tensor, ...]:
    """Tensors before and after the layers; `score` is the head of a reward model."""
    return (
        Tensor(embedding, ("embedding",)),
        *norm(final_norm, "final_norm"),
        Tensor(head, ("head",)),
        Tensor("score.weight", ("head/kernel",), "out_in"),
        Tensor("score.bias", ("head/bias",)),
    )


_QKV = ("attention/q", "attention/k", "attention/v")
_LLAMA = "model.layers.{i}."


def llama_tensors(**norms: str) -> tuple[Tensor, ...]:
    """Tensors with Llama's names. Args: norms maps the family's names of its norms to ours."""
    return (
        *ends("model.embed_tokens.weight", "model.norm"),
        *(tensor for part in "qkvo" for tensor in linear(f"{_LLAMA}self_attn.{part}_proj", f"attention/{part}")),
        *norm(f"{_LLAMA}self_attn.q_norm", "block_{i}/attention/q_norm"),
        *norm(f"{_LLAMA}self_attn.k_norm", "block_{i}/attention/k_norm"),
        *(tensor for part in ("gate", "up", "down") for tensor in linear(f"{_LLAMA}mlp.{part}_proj", part)),
        *(tensor for name, path in norms.items() for tensor in norm(_LLAMA + name, f"block_{{i}}/{path}")),
    )


_LLAMA_TENSORS = llama_tensors(input_layernorm="attention_norm", post_attention_layernorm="mlp_norm")
_GEMMA2_TENSORS = llama_tensors(
    input_layernorm="attention_norm",
    post_attention_layernorm="attention_out_norm",
    pre_feedforward_layernorm="mlp_norm",
    post_feedforward_layernorm="mlp_out_norm",
)
_OLMO2_TENSORS = llama_tensors(post_attention_layernorm="attention_out_norm", post_feedforward_layernorm="mlp_out_norm")
_PHI3_TENSORS = (
    *ends("model.embed_tokens.weight", "model.norm"),
    *linear(f"{_LLAMA}self_attn.qkv_proj", *_QKV),
    *linear(f"{_LLAMA}self_attn.o_proj", "attention/o"),
    *linear(f"{_LLAMA}mlp.gate_up_proj", "gate", "up"),
    *linear(f"{_LLAMA}mlp.down_proj", "down"),
    *norm(f"{_LLAMA}input_layernorm", "block_{i}/attention_norm"),
    *norm(f"{_LLAMA}post_attention_layernorm", "block_{i}/mlp_norm"),
)
_GPT2_TENSORS = (
    *ends("transformer.wte.weight", "transformer.ln_f"),
    Tensor("transformer.wpe.weight", ("positions",)),
    *linear("transformer.h.{i}.attn.c_attn", *_QKV, layout="in_out"),
    *linear("transformer.h.{i}.attn.c_proj", "attention/o", layout="in_out"),
    *linear("transformer.h.{i}.mlp.c_fc", "up", layout="in_out"),
    *linear("transformer.h.{i}.mlp.c_proj", "down", layout="in_out"),
    *norm("transformer.h.{i}.ln_1", "block_{i}/attention_norm"),
    *norm("transformer.h.{i}.ln_2", "block_{i}/mlp_norm"),
)
_NEOX = "gpt_neox.layers.{i}."
_GPT_NEOX_TENSORS = (
    *ends("gpt_neox.embed_in.weight", "gpt_neox.final_layer_norm", head="embed_out.weight"),
    *linear(f"{_NEOX}attention.query_key_value", *_QKV, layout="heads_qkv"),
    *linear(f"{_NEOX}attention.dense", "attention/o"),
    *linear(f"{_NEOX}mlp.dense_h_to_4h", "up"),
    *linear(f"{_NEOX}mlp.dense_4h_to_h", "down"),
    *norm(f"{_NEOX}input_layernorm", "block_{i}/attention_norm"),
    *norm(f"{_NEOX}post_attention_layernorm", "block_{i}/mlp_norm"),
)

_ALL = (
    Family(
        "arcee", family_configs.arcee, _LLAMA_TENSORS, "model.", "ArceeForCausalLM", family_configs.to_llama_with_biases
    ),
    Family("gpt2", family_configs.gpt2, _GPT2_TENSORS, "transformer.", "GPT2LMHeadModel", family_configs.to_gpt2),
    Family(
        "gpt_neox",
        family_configs.gpt_neox,
        _GPT_NEOX_TENSORS,
        "gpt_neox.",
        "GPTNeoXForCausalLM",
        family_configs.to_gpt_neox,
    ),
    Family(
        "llama", family_configs.llama, _LLAMA_TENSORS, "model.", "LlamaForCausalLM", family_configs.to_llama_with_biases
    ),
    Family("mistral", family_configs.mistral, _LLAMA_TENSORS, "model."),
    Family("qwen2", family_configs.qwen2, _LLAMA_TENSORS, "model."),
    Family("qwen3", family_configs.qwen3, _LLAMA_TENSORS, "model.", "Qwen3ForCausalLM", family_configs.to_llama),
    Family("gemma", family_configs.gemma, _LLAMA_TENSORS, "model."),
    Family("gemma2", family_configs.gemma2, _GEMMA2_TENSORS, "model."),
    Family("gemma3_text", family_configs.gemma3, _GEMMA2_TENSORS, "model."),
    Family("olmo2", family_configs.olmo2, _OLMO2_TENSORS, "model.", "Olmo2ForCausalLM", family_configs.to_llama),
    Family("phi3", family_configs.phi3, _PHI3_TENSORS, "model."),
)
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}


def model_config(hf_config: Any, **dtypes: Any) -> ModelConfig:
    """Convert a transformers config to a ModelConfig. Raises RlhfError for unsupported features."""
    return ModelConfig(**FAMILIES[hf_config.model_type].fields(hf_config), **dtypes)
