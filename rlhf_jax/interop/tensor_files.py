"""Read and write safetensors files, one tensor at a time.

The safetensors package maps files into memory, so that a model would occupy memory twice while it is loaded. The format
is simple: 8 bytes with the length of the header, the header in JSON, and the tensors.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from rlhf_jax.types import RlhfError

MODEL_FILES = ("model.safetensors", "model.safetensors.index.json")
"""Files of which a directory with a full model has at least one."""

ORIGIN = "dequantised_from"
"""Key in config.json for the quantisation types of the original weights, most frequent first."""

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
ALIGNMENT = 64
"""Alignment in bytes at which JAX uses host arrays without a copy on CPUs."""


class StoredTensor(NamedTuple):
    """Location of a tensor in a file."""

    file: Path
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    start: int  # offset in the file in bytes
    size: int  # bytes


def find_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Locate every tensor of a checkpoint, in `model.safetensors` or the shards of its index.

    Raises RlhfError naming a file that is missing, truncated or not a safetensors file.
    """
    single, index = (directory / name for name in MODEL_FILES)
    if index.exists():
        try:
            shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RlhfError(f"{index} is damaged: download it again") from error
        files = [directory / shard for shard in shards]
    else:
        files = [single]
    return {name: tensor for file in files for name, tensor in read_header(file).items()}


def read_tensor(tensor: StoredTensor) -> np.ndarray:
    """Read one tensor into newly allocated, aligned memory. Raises RlhfError if the file is truncated."""
    array = empty(tensor.shape, DTYPES[tensor.dtype])
    with open(tensor.file, "rb") as content:
        content.seek(tensor.start)
        if content.readinto(array.reshape(-1).view(np.uint8).data) < array.nbytes:
            raise RlhfError(f"{tensor.file} is truncated: download it again")
    return array


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Allocate an uninitialised array at an address that is a multiple of ALIGNMENT."""
    buffer = np.empty(math.prod(shape) * dtype.itemsize + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + buffer.size - ALIGNMENT].view(dtype).reshape(shape)


def write_tensors(
    path: Path, tensors: Iterable[tuple[str, tuple[int, ...], np.dtype]], fetch: Callable[[str], np.ndarray]
) -> None:
    """Write a safetensors file.

    Args: tensors are names, shapes and dtypes; fetch returns a tensor by name, just before it is written.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape, dtype in tensors:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[np.dtype(dtype)], "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, entry in header.items():
            if name != "__metadata__":
                array = fetch(name)
                assert list(array.shape) == entry["shape"] and names[array.dtype] == entry["dtype"], name
                file.write(np.ascontiguousarray(array).tobytes())


@contextlib.contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """Yield a temporary directory that is renamed to `directory` on success.

    Raises RlhfError if the directory exists and is not empty.
    """
    if directory.exists() and any(directory.iterdir()):
        raise RlhfError(f"{directory} exists and is not empty: choose a new directory")
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    if directory.exists():
        directory.rmdir()
    partial.replace(directory)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Locate the tensors of one safetensors file. Raises RlhfError if it is missing, truncated or malformed."""
    if not file.exists():
        raise RlhfError(
            f"{file} is missing: give a directory with a complete checkpoint in safetensors format (convert PyTorch's "
            "own format with transformers' save_pretrained)"
        )
    size = file.stat().st_size
    with open(file, "rb") as content:
        length = int.from_bytes(content.read(8), "little")
        if length > size:
            raise RlhfError(f"{file} is truncated or not a safetensors file: download it again")
        try:
            header = json.loads(content.read(length))
            entries = {name: _entry(entry) for name, entry in header.items() if name != "__metadata__"}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise RlhfError(f"{file} is truncated or not a safetensors file: download it again") from error
    tensors = {}
    for name, (dtype, shape, start, end) in entries.items():
        if 8 + length + end > size:
            raise RlhfError(f"{file} is truncated: tensor {name} extends beyond its end. Download it again")
        if dtype in DTYPES and end - start != math.prod(shape) * DTYPES[dtype].itemsize:
            raise RlhfError(f"{file} is damaged: tensor {name} has not the size of its shape. Download it again")
        tensors[name] = StoredTensor(file, dtype, shape, 8 + length + start, end - start)
    return tensors


def _entry(entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Return dtype, shape, start and end of a header's entry. Raises ValueError, TypeError or KeyError for others."""
    dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if not isinstance(dtype, str) or not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
        raise ValueError("not an entry of a safetensors file")
    return dtype, shape, start, end
