# datasets is in .venv-parity only, where types are not checked.
# pyrefly: ignore-errors[missing-import]
"""Data sets by name, with the library `datasets`: a directory with the layout of a repository stands for the Hub."""

import json

import datasets
import pytest

from rlhf_jax.data import formats
from rlhf_jax.types import RlhfError

ROWS = [{"prompt": f"Is {number} even?", "chosen": " Yes.", "rejected": " No."} for number in range(0, 6, 2)]
CARD = """---
configs:
- config_name: main
  default: true
  data_files:
  - {split: train, path: main/train.jsonl}
  - {split: test, path: main/test.jsonl}
- config_name: other
  data_files:
  - {split: train, path: other/train.jsonl}
---
"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "pairs" / "main").mkdir(parents=True)
    (tmp_path / "pairs" / "other").mkdir()
    (tmp_path / "pairs" / "README.md").write_text(CARD)
    for name, rows in (("main/train", ROWS), ("main/test", ROWS[:1]), ("other/train", ROWS[1:])):
        (tmp_path / "pairs" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"hub:{tmp_path / 'pairs'}"


def test_splits_and_configs(repository):
    assert formats.read_table(f"{repository}/train") == ROWS
    assert formats.read_table(f"{repository}/test") == ROWS[:1]
    assert formats.read_table(f"{repository}:other/train") == ROWS[1:]
    assert formats.preference_rows(formats.read_table(f"{repository}/train"), "x") == ROWS


def test_the_content_identifies_a_split(repository):
    hashes = {formats.file_hash(f"{repository}{place}") for place in ("/train", ":main/train", "/test", ":other/train")}
    assert len(hashes) == 3


def test_what_cannot_be_loaded_is_said(repository):
    for place in ("/validation", ":third/train"):
        with pytest.raises(RlhfError, match=r"cannot be loaded: .*(validation|third)"):
            formats.read_table(f"{repository}{place}")
    with pytest.raises(RlhfError, match="cannot be loaded"):
        formats.read_table(f"{repository}s/train")
