"""Import of llama.cpp's GGUF files: read and dequantise the weights, and write a Hugging Face checkpoint.

`rlhf_jax.text.gguf_tokenizer` converts the tokenizer; `rlhf_jax.interop.hub.convert_gguf` calls both.
"""

import collections
import json
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gguf
import ml_dtypes
import numpy as np

from rlhf_jax.interop.gguf_families import ARCHITECTURES, Architecture, Header, Sizes
from rlhf_jax.interop.tensor_files import ORIGIN, write_tensors
from rlhf_jax.types import RlhfError

Dtype = Literal["float32", "bfloat16", "float16"]

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}

_FLOATS = {gguf.GGMLQuantizationType[name] for name in ("F64", "F32", "F16", "BF16")}
CHUNK = 1 << 22
"""Number of weights dequantised at a time: 16 MB of float32."""


class TensorPlan(NamedTuple):
    """Conversion of one tensor: its names in the GGUF file and on the Hub, and how its values change.

    `shape` is the shape in the GGUF file. At most one change applies: row i is taken from `rows[i]`, `offset` is added,
    or the matrix is transposed.
    """

    source: str
    target: str
    shape: tuple[int, ...]
    rows: np.ndarray | None = None
    offset: float = 0.0
    transposed: bool = False


class GgufFile(NamedTuple):
    """Validated GGUF file; its tensors are read from disk on demand."""

    path: Path
    metadata: dict[str, Any]  # converted to Python values
    stored: dict[str, gguf.ReaderTensor]
    config: dict[str, Any]  # config.json
    generation_config: dict[str, Any]
    plan: list[TensorPlan]


def read_gguf(path: Path) -> GgufFile:
    """Open a GGUF file and check that it can be converted.

    Raises: RlhfError if the file is missing, truncated, one of several parts, or big-endian; or naming an unknown
        architecture or tensor, a missing key or tensor, a shape that does not match the metadata, or an unsupported
        quantisation.
    """
    try:
        reader = gguf.GGUFReader(path)
        metadata = {key: _value(field) for key, field in reader.fields.items()}
    except OSError as error:
        raise RlhfError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise RlhfError(f"{path} is not a GGUF file, or is truncated ({error}): download it again") from error
    if metadata.get("split.count", 1) > 1:
        raise RlhfError(f"{path} is one of {metadata['split.count']} parts: join them with llama-gguf-split --merge")
    if reader.byte_order != "I":
        raise RlhfError(f"{path} has a different byte order from this machine: download a file with the right one")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    shapes = {name: tuple(reversed(tensor.shape.tolist())) for name, tensor in stored.items()}
    factors = stored.get("rope_freqs.weight")
    header = Header(path, metadata, shapes, None if factors is None else _dequantise(factors, factors.data))
    config, plan = _plan(header)
    for tensor in plan:
        _check_quantisation(path, stored[tensor.source])
    return GgufFile(path, metadata, stored, config, _generation_config(header), plan)


def write_checkpoint(file: GgufFile, directory: Path, *, dtype: Dtype) -> None:
    """Write `config.json`, `generation_config.json` and `model.safetensors` with transformers' names.

    Weights are dequantised in float32 and rounded to `dtype`, one tensor at a time. float32 represents the file's
    values exactly; bfloat16 is half as large and rounds to 8 bits. Neither restores the precision lost by quantisation:
    config.json lists the quantisation types under `ORIGIN`, and exports keep that entry.

    Raises: RlhfError naming a tensor with a weight that is not finite or too large for float16.
    """
    origin = {ORIGIN: quantisation} if (quantisation := _quantisation(file)) else {}
    _write_json(directory / "config.json", file.config | {"dtype": dtype} | origin)
    _write_json(directory / "generation_config.json", file.generation_config)
    plan = {tensor.target: tensor for tensor in file.plan}
    entries = [
        (name, tensor.shape[::-1] if tensor.transposed else tensor.shape, DTYPES[dtype])
        for name, tensor in plan.items()
    ]
    write_tensors(directory / "model.safetensors", entries, lambda name: _convert(file, plan[name], DTYPES[dtype]))


def _quantisation(file: GgufFile) -> str:
    """Quantisation types of a file's weights, most frequent first; empty if all weights are floating-point."""
    counts: collections.Counter[str] = collections.Counter()
    for tensor in file.plan:
        stored = file.stored[tensor.source]
        if stored.tensor_type not in _FLOATS:
            counts[stored.tensor_type.name] += math.prod(tensor.shape)
    return ", ".join(name for name, _ in counts.most_common())


def _plan(header: Header) -> tuple[dict[str, Any], list[TensorPlan]]:
    """Build config.json and the conversion plan, which uses each tensor exactly once.

    Raises: RlhfError naming an unknown architecture or tensor, a missing key or tensor, or a shape that does not match
        the metadata.
    """
    if header.architecture not in ARCHITECTURES:
        raise RlhfError(
            f"{header.path} has the unsupported architecture {header.architecture!r}: it must be one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    family = ARCHITECTURES[header.architecture]
    sizes = _sizes(header, family)
    tied = "output.weight" not in header.shapes
    tensors = _tensors(family, sizes, header.number("block_count"), tied)
    known = {tensor.source for tensor in tensors} | {"rope_freqs.weight"}
    if unknown := [name for name in header.shapes if name not in known]:
        raise RlhfError(f"{header.path} has a tensor {unknown[0]}, which {family.model_class} does not have")
    for tensor in tensors:
        if tensor.source not in header.shapes:
            raise RlhfError(f"{header.path} has no tensor {tensor.source}: download it again, or another conversion")
        if header.shapes[tensor.source] != tensor.shape:
            raise RlhfError(
                f"{header.path}: tensor {tensor.source} has the shape {header.shapes[tensor.source]}, but the file's "
                f"metadata requires {tensor.shape}"
            )
    config = {
        "architectures": [family.model_class],
        "model_type": family.model_type,
        "vocab_size": sizes["V"],
        "tie_word_embeddings": tied,
        **{f"{kind}_token_id": _token_id(header, kind) for kind in ("bos", "eos", "pad")},
    }
    return config | family.config(header, sizes), tensors


def _token_id(header: Header, kind: str) -> int | None:
    """Id of the special token `bos`, `eos`, `pad` or `eot`, or None."""
    return header.metadata.get(f"tokenizer.ggml.{'padding' if kind == 'pad' else kind}_token_id")


def _sizes(header: Header, family: Architecture) -> dict[str, int]:
    width, heads = header.number("embedding_length"), header.number("attention.head_count")
    kv_heads = header.number("attention.head_count_kv") if header.get("attention.head_count_kv") else heads
    rotated = None if family.partial else header.get("rope.dimension_count")
    head_width = header.get("attention.key_length") or rotated or width // heads
    inner = header.number("feed_forward_length")
    vocabulary = header.get("vocab_size") or len(header.metadata.get("tokenizer.ggml.tokens", []))
    sizes = {"V": vocabulary, "D": width, "F": inner, "K": head_width, "C": header.number("context_length")}
    sizes |= {"heads": heads, "kv_heads": kv_heads, "Q": heads * head_width, "J": kv_heads * head_width}
    return sizes | {"A": (heads + 2 * kv_heads) * head_width, "G": 2 * inner}


def _tensors(family: Architecture, sizes: Sizes, layers: int, tied: bool) -> list[TensorPlan]:
    names = [(source, *rest) for source, rest in family.outside.items()]
    if not tied:
        names.append(("output.weight", family.head, "V D"))
    for layer in range(layers):
        names += [
            (f"blk.{layer}.{source}", f"{family.layer}.{layer}.{target}", shape)
            for source, (target, shape) in family.inside.items()
        ]
    tensors = []
    for source, target, letters in names:
        shape = tuple(sizes[letter] for letter in letters.split())
        tensor = TensorPlan(source, target, shape)
        if family.interleaved and ".attn_q." in source:
            tensor = tensor._replace(rows=_half_rotation(sizes["heads"], sizes["K"]))
        elif family.interleaved and ".attn_k." in source:
            tensor = tensor._replace(rows=_half_rotation(sizes["kv_heads"], sizes["K"]))
        elif family.by_head and ".attn_qkv." in source:
            tensor = tensor._replace(rows=_heads_together(sizes["heads"], sizes["K"]))
        elif source.endswith("norm.weight"):
            tensor = tensor._replace(offset=-family.norm_offset)
        elif source.startswith("blk.") and len(shape) == 2:
            tensor = tensor._replace(transposed=family.transposed)
        tensors.append(tensor)
    return tensors


def _half_rotation(heads: int, head_width: int) -> np.ndarray:
    """Row permutation of q or k from rotary pairs (2i, 2i + 1) to pairs (i, i + K / 2)."""
    return np.arange(heads * head_width).reshape(heads, head_width // 2, 2).swapaxes(1, 2).reshape(-1)


def _heads_together(heads: int, head_width: int) -> np.ndarray:
    """Row permutation of a fused qkv matrix from all q, all k, all v to q, k, v of each head in turn."""
    return np.arange(3 * heads * head_width).reshape(3, heads, head_width).swapaxes(0, 1).reshape(-1)


def _value(field: gguf.ReaderField) -> Any:
    value = field.contents()
    if field.types == [gguf.GGUFValueType.FLOAT32]:
        return float(str(np.float32(value)))  # 1e-05 rather than 9.999999747378752e-06
    return value


def _check_quantisation(path: Path, tensor: gguf.ReaderTensor) -> None:
    try:
        _dequantise(tensor, tensor.data.reshape(-1, tensor.data.shape[-1])[:1])
    except NotImplementedError as error:
        raise RlhfError(
            f"{path}: {tensor.name} is stored as {tensor.tensor_type.name}, which the installed gguf package cannot "
            "dequantise: use a file with another quantisation or a newer gguf"
        ) from error


def _dequantise(tensor: gguf.ReaderTensor, data: np.ndarray) -> np.ndarray:
    return gguf.quants.dequantize(data, tensor.tensor_type)


def _generation_config(header: Header) -> dict[str, Any]:
    """Generation config whose stop tokens are EOS and, if it differs, the end-of-turn token."""
    ends = [end for end in (_token_id(header, "eos"), _token_id(header, "eot")) if end is not None]
    ends = list(dict.fromkeys(ends))
    return {
        "bos_token_id": _token_id(header, "bos"),
        "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
        "pad_token_id": _token_id(header, "pad"),
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _convert(file: GgufFile, plan: TensorPlan, dtype: np.dtype) -> np.ndarray:
    """Convert one tensor to its form on the Hub."""
    tensor = file.stored[plan.source]
    # Quantisation blocks lie within rows, so rows can be permuted before dequantising them in chunks.
    is_vector = tensor.data.ndim == 1
    stored = tensor.data[None] if is_vector else tensor.data
    width = plan.shape[-1]
    converted = np.empty((len(stored), width), dtype)
    step = max(1, CHUNK // width)
    for start in range(0, len(stored), step):
        rows = slice(start, start + step)
        weights = _dequantise(tensor, stored[rows if plan.rows is None or is_vector else plan.rows[rows]])
        if plan.rows is not None and is_vector:
            weights = weights[:, plan.rows]
        if plan.offset:  # adding 0 would turn -0.0 into 0.0
            weights = weights + np.float32(plan.offset)
        with np.errstate(over="ignore"):  # reported below
            converted[rows] = weights.astype(dtype)
    if not np.isfinite(converted).all():
        raise RlhfError(f"{file.path}: {plan.source} has weights that are not finite in {dtype.name}")
    return converted.T if plan.transposed else converted.reshape(plan.shape)
