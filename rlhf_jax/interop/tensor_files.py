"""Tensors in safetensors files, read and written one at a time.

The safetensors package maps a file into memory, and its pages then count as the process's own: a model would be held
twice while it is loaded. Its format is a few lines: the length of a header in 8 bytes, the header in JSON, the tensors.
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

WHOLE = ("model.safetensors", "model.safetensors.index.json")
"""What a directory with the tensors of a whole model has: one of these."""

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
ALIGNMENT = 64
"""Bytes: where JAX's own arrays begin on CPUs, which takes what begins there uncopied."""


class StoredTensor(NamedTuple):
    """Where a tensor lies."""

    file: Path
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    size: int  # bytes


def find_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint: of `model.safetensors`, or of the shards that its index names.

    Raises RlhfError naming the file where there is none, or where one is missing, cut short or no safetensors file.
    """
    single, index = (directory / name for name in WHOLE)
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
    """One tensor, in memory of its own, that begins at a multiple of ALIGNMENT.

    Raises RlhfError where the file ends before it.
    """
    array = empty(tensor.shape, DTYPES[tensor.dtype])
    with open(tensor.file, "rb") as content:
        content.seek(tensor.start)
        if content.readinto(array.reshape(-1).view(np.uint8).data) < array.nbytes:
            raise RlhfError(f"{tensor.file} is cut short: download it again")
    return array


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array to be filled, at an address that is a multiple of ALIGNMENT."""
    buffer = np.empty(math.prod(shape) * dtype.itemsize + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + buffer.size - ALIGNMENT].view(dtype).reshape(shape)


def write_tensors(
    path: Path, tensors: Iterable[tuple[str, tuple[int, ...], np.dtype]], fetch: Callable[[str], np.ndarray]
) -> None:
    """Writes a safetensors file.

    Args: tensors are names, shapes and dtypes; `fetch` gives one of them when its turn comes.
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
    """Where to write what shall be found in a directory once all of it is written.

    Raises RlhfError where the directory exists and is not empty.
    """
    if directory.exists() and any(directory.iterdir()):
        raise RlhfError(f"{directory} exists and is not empty: name a new directory")
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    if directory.exists():
        directory.rmdir()
    partial.replace(directory)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file. Raises RlhfError where it is missing, cut short or of another format."""
    if not file.exists():
        raise RlhfError(
            f"{file} is missing: give a directory with a whole checkpoint in safetensors (one in PyTorch's own format "
            "can be converted with transformers' save_pretrained)"
        )
    size = file.stat().st_size
    with open(file, "rb") as content:
        length = int.from_bytes(content.read(8), "little")
        if length > size:
            raise RlhfError(f"{file} is cut short, or no safetensors file: download it again")
        try:
            header = json.loads(content.read(length))
        except ValueError as error:
            raise RlhfError(f"{file} is cut short, or no safetensors file: download it again") from error
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        if end > size:
            raise RlhfError(f"{file} is cut short: tensor {name} ends after it. Download it again")
        found[name] = StoredTensor(file, entry["dtype"], tuple(entry["shape"]), start, end - start)
    return found
