"""The movie reviews built from a few raw lines, and reading what TFDS prepared."""

import html
import json
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.data import builders, fetch
from rlhf_jax.types import RlhfError

SNIPPETS = 60
SPLITS = ("train", "validation", "test")


class OtherReviews(tfds.core.GeneratorBasedBuilder):
    """Any data set of the user's own."""

    VERSION = tfds.core.Version("2.1.0")
    code_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "text": tfds.features.Text(),
            "stars": np.int32,
            "replies": tfds.features.Sequence({"who": tfds.features.Text(), "score": np.float32}),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict]]:
        yield 0, {"text": "très bien", "stars": 5, "replies": [{"who": "Zoë", "score": 0.5}]}


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two raw files, in the form of the true ones."""
    return write_raw(tmp_path_factory.mktemp("raw"), list(range(1, SNIPPETS + 1)))


@pytest.fixture(scope="session")
def prepared(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return builders.prepare_movie_reviews(raw, tmp_path_factory.mktemp("prepared")).parent.parent


@pytest.fixture
def here(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RLHF_JAX_DATA", str(prepared))
    return prepared


def ratings_of(snippet: int) -> list[int]:
    return [snippet % 9 - 4, 2, -1][: 1 + snippet % 3]


def write_raw(directory: Path, rated: list[int]) -> Path:
    means = [float(np.mean(ratings_of(snippet))) for snippet in range(1, SNIPPETS + 1)]
    texts = [f"{number}\t{mean:.10f}\tA ''café''    number {number}" for number, mean in enumerate(means, start=1)]
    raters = [f"{snippet}\t0.5\t1.25\t{json.dumps(ratings_of(snippet))}" for snippet in rated]
    for filename, lines in zip(builders.RAW_FILES, (texts, raters), strict=True):
        (directory / filename).write_bytes("\r\n".join(lines).encode())
    return directory


def test_every_snippet_is_in_its_split(here: Path):
    rows = {split: builders.load_split("movie_reviews", split) for split in SPLITS}
    assert sorted(row["id"] for split in SPLITS for row in rows[split]) == list(range(1, SNIPPETS + 1))
    for split in SPLITS:
        assert rows[split]
        assert {builders.split_of(row["id"]) for row in rows[split]} == {split}


def test_rows_are_plain_python(here: Path):
    rows = builders.load_split("movie_reviews", "train")
    assert rows
    for row in rows:
        expected = {
            "id": row["id"],
            "text": f'A "café" - number {row["id"]}',
            "rating": pytest.approx(np.mean(ratings_of(row["id"])), abs=1e-6),
            "ratings": ratings_of(row["id"]),
        }
        assert row == expected
        assert [type(row[column]) for column in ("id", "text", "rating", "ratings")] == [int, str, float, list]
        assert {type(rating) for rating in row["ratings"]} == {int}


def test_slices_and_names(here: Path):
    whole = builders.load_split("movie_reviews", "train")
    assert builders.load_split("movie_reviews", "train[:3]") == whole[:3]
    assert builders.full_name("movie_reviews") == f"movie_reviews/{fetch.MOVIE_REVIEWS_VERSION}"


def test_it_is_array_record_read_without_tensorflow(here: Path):
    builders.load_split("movie_reviews", "test")
    assert sorted(path.suffix for path in here.rglob("*record*")) == [".array_record-00000-of-00001"] * 3
    assert not {"tensorflow", "torch"} & set(sys.modules)


def test_the_builder_is_known_by_its_name(here: Path):
    info = tfds.builder("movie_reviews", data_dir=here).info
    assert info.splits["train"].num_examples > 0
    assert "hutto2014vader" in info.citation
    assert info.redistribution_info.license == "MIT"


def test_preparing_is_silent(raw: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    place = builders.prepare_movie_reviews(raw, tmp_path)
    assert place == tmp_path / "movie_reviews" / fetch.MOVIE_REVIEWS_VERSION
    assert capfd.readouterr() == ("", "")


def test_files_that_disagree_are_refused(tmp_path: Path):
    swapped = [2, 1, *range(3, SNIPPETS + 1)]
    with pytest.raises(RlhfError, match=r"lists snippet 1 where .*anonDataRatings.txt has 2"):
        builders.prepare_movie_reviews(write_raw(tmp_path, swapped), tmp_path)


def test_a_full_disk_is_an_os_error(raw: Path, tmp_path: Path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large"):
            builders.prepare_movie_reviews(raw, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_splits_never_move():
    assert [builders.split_of(snippet) for snippet in (1, 2, 3, 7, 11)] == [
        "train",
        "train",
        "validation",
        "test",
        "validation",
    ]
    counts = [sum(builders.split_of(snippet) == split for snippet in range(1, 10606)) for split in SPLITS]
    assert counts == [8449, 1035, 1121]


@pytest.mark.parametrize(
    ("source", "mended"),
    [
        ("Lilo &amp; Stitch and T&amp;A", "Lilo & Stitch and T&A"),
        ("a ''roller coaster'' ride", 'a "roller coaster" ride'),
        ("`Hey Arnold!' of the `70s", "'Hey Arnold!' of the '70s"),
        ("We\u2019ve seen it", "We've seen it"),
        ("all comics    even those", "all comics - even those"),
        ("this movie   despite its flaws", "this movie - despite its flaws"),
        ("a heck \u2013 few filmmakers", "a heck - few filmmakers"),
        ("bump in  the night co writer", "bump in the night co writer"),
        (" Touché! ", "Touché!"),
    ],
)
def test_clean_mends(source: str, mended: str):
    assert builders.clean(source) == mended


@given(st.text(alphabet="aZé0 '`\u2019\u2013.,!?-&;\"", max_size=40))
def test_clean_changes_no_word_and_is_done_once(text: str):
    cleaned = builders.clean(text)
    assert re.findall(r"\w+", cleaned) == re.findall(r"\w+", html.unescape(text))
    assert builders.clean(cleaned) == cleaned


def test_not_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("RLHF_JAX_DATA", str(tmp_path))
    with pytest.raises(RlhfError, match=r"^movie_reviews has not been fetched: run `rlhf-jax fetch movie_reviews`$"):
        builders.load_split("movie_reviews", "train")


def test_an_unknown_split_lists_the_known(here: Path):
    with pytest.raises(RlhfError, match=r"tfds:movie_reviews/dev cannot be read: .*train.*validation.*test"):
        builders.load_split("movie_reviews", "dev")


@pytest.mark.parametrize("damage", ["cut", "records", "features"])
def test_damaged_files(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str):
    place = builders.prepare_movie_reviews(raw, tmp_path)
    monkeypatch.setenv("RLHF_JAX_DATA", str(tmp_path))
    records = place / "movie_reviews-train.array_record-00000-of-00001"
    if damage == "cut":
        records.write_bytes(records.read_bytes()[:-100])
    else:
        (records if damage == "records" else place / "features.json").unlink()
    with pytest.raises(RlhfError, match=rf"movie_reviews.* is damaged.*remove {re.escape(str(place))}"):
        builders.load_split("movie_reviews", "train")


@pytest.fixture
def other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))  # what TFDS_DATA_DIR sets at import
    builder = OtherReviews(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    return Path(builder.data_dir)


def test_any_other_data_set_is_read_from_tfds_directory(other: Path):
    rows = builders.load_split("other_reviews", "train")
    assert rows == [{"text": "très bien", "stars": 5, "replies": {"who": ["Zoë"], "score": [0.5]}}]
    assert builders.full_name("other_reviews") == "other_reviews/2.1.0"


def test_one_that_needs_tensorflow_says_so(other: Path):
    info = other / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(RlhfError, match=r"other_reviews is stored as tfrecord.*file_format='array_record'"):
        builders.load_split("other_reviews", "train")


def test_one_that_is_not_there():
    with pytest.raises(RlhfError, match=r"tfds:no_such_reviews has not been prepared: create it"):
        builders.load_split("no_such_reviews", "train")
