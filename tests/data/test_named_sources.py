"""Tables that are named: their names, and what is said where a library is missing.

tests/parity/test_hub_data.py reads data sets with the library `datasets`.
"""

import sys

import pytest

from rlhf_jax.data import formats
from rlhf_jax.data.named_sources import named_source
from rlhf_jax.types import RlhfError


def test_files_are_not_named():
    assert named_source("train.jsonl") is None and named_source("hub/train.jsonl") is None
    found = [named_source(name) for name in ("tfds:a/train", "hub:a/b/train", "arithmetic:train,problems=2")]
    assert [kind.prefix for kind in found if kind] == ["tfds:", "hub:", "arithmetic:"]


@pytest.mark.parametrize("source", ["hub:train", "hub:", "hub:owner/", "hub:/train"])
def test_a_data_set_on_the_hub_needs_a_split(source):
    with pytest.raises(RlhfError, match=r"has no split: write hub:OWNER/NAME/SPLIT"):
        formats.read_table(source)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for read in (formats.read_table, formats.file_hash):
        with pytest.raises(RlhfError, match=r"needs the library datasets: pip install 'rlhf-jax\[datasets\]'"):
            read("hub:nobody/nothing/train")


def test_generated_rows_are_identified_by_their_content():
    settings = "problems=3,steps=1-2,largest=9"
    one, same, other = (formats.file_hash(f"arithmetic:{split},{settings}") for split in ("train", "train", "test"))
    assert one == same != other
