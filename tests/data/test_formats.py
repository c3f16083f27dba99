"""Tables in every form people keep them in, whole and damaged, and what is checked of their rows."""

import csv
import gzip
import json
import lzma
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.data import builders, formats
from rlhf_jax.types import RlhfError

Row = dict[str, Any]

ROWS = [{"prompt": f"prompt {i}", "chosen": f"très bon, {i}\n", "rejected": f'"bad" {i}'} for i in range(300)]


def write_jsonl(path: Path, rows: list[Row]) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    opener: Callable = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wb") as file:
        file.write(lines)


def write_json(path: Path, rows: list[Row]) -> None:
    path.write_text(json.dumps(rows, indent=1))


def write_parquet(path: Path, rows: list[Row]) -> None:
    pa.parquet.write_table(pa.Table.from_pylist(rows), path)


def write_csv(path: Path, rows: list[Row]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def write_arrow(path: Path, rows: list[Row]) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=100)


def write_saved(directory: Path, rows: list[Row]) -> None:
    """As datasets.save_to_disk writes it (compared with datasets 5.2), in files whose names do not give the order."""
    directory.mkdir()
    write_arrow(directory / "b.arrow", rows[:200])
    write_arrow(directory / "a.arrow", rows[200:])
    state = {"_data_files": [{"filename": "b.arrow"}, {"filename": "a.arrow"}], "_format_type": None}
    (directory / "state.json").write_text(json.dumps(state))


def write_hub(directory: Path, rows: list[Row]) -> None:
    """As Parquet data sets lie on the Hub."""
    (directory / "data").mkdir(parents=True)
    write_parquet(directory / "data" / "train-00000-of-00002.parquet", rows[:200])
    write_parquet(directory / "data" / "train-00001-of-00002.parquet", rows[200:])


WRITERS: dict[str, Callable[[Path, list[Row]], None]] = {
    "table.jsonl": write_jsonl,
    "table.jsonl.gz": write_jsonl,
    "table.jsonl.xz": write_jsonl,
    "lines.json": write_jsonl,
    "list.json": write_json,
    "table.parquet": write_parquet,
    "table.csv": write_csv,
    "table.arrow": write_arrow,
    "saved": write_saved,
    "hub": write_hub,
}


def write(directory: Path, name: str, rows: list[Row] | None = None) -> str:
    WRITERS[name](directory / name, ROWS if rows is None else rows)
    return str(directory / name)


@pytest.mark.parametrize("name", WRITERS)
def test_every_form_gives_the_same_rows(tmp_path: Path, name: str):
    assert formats.read_table(write(tmp_path, name)) == ROWS


def test_a_split_of_a_hub_directory(tmp_path: Path):
    directory = write(tmp_path, "hub")
    write_parquet(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet", ROWS[:3])
    assert formats.read_table(f"{directory}/data/train") == ROWS
    assert formats.read_table(f"{directory}/data/test") == ROWS[:3]
    with pytest.raises(RlhfError, match=r"different tables .*name one file, or a split"):
        formats.read_table(directory)


def test_a_split_of_a_saved_dictionary(tmp_path: Path):
    write_saved(tmp_path / "train", ROWS)
    assert formats.read_table(str(tmp_path / "train")) == ROWS
    with pytest.raises(RlhfError, match=r"has the splits train: choose one, as in .*train"):
        formats.read_table(str(tmp_path))


VALUES = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=8)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def tables(values: st.SearchStrategy) -> st.SearchStrategy[list[Row]]:
    columns = st.lists(TEXTS.filter(lambda name: name and name[0] != "\ufeff"), min_size=1, max_size=4, unique=True)
    return columns.flatmap(
        lambda names: st.lists(st.fixed_dictionaries(dict.fromkeys(names, values)), min_size=1, max_size=4)
    )


@given(tables(VALUES))
def test_jsonl_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[Row]):
    path = tmp_path_factory.mktemp("jsonl") / "table.jsonl"
    write_jsonl(path, rows)
    assert formats.read_table(str(path)) == rows


@given(tables(TEXTS))
def test_csv_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[Row]):
    path = tmp_path_factory.mktemp("csv") / "table.csv"
    write_csv(path, rows)
    assert formats.read_table(str(path)) == rows


@given(tables(st.none() | TEXTS) | tables(st.floats(allow_nan=False)))
def test_parquet_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[Row]):
    path = tmp_path_factory.mktemp("parquet") / "table.parquet"
    write_parquet(path, rows)
    assert formats.read_table(str(path)) == rows


def test_very_long_texts_fit_into_a_csv(tmp_path: Path):
    rows = [{"text": "long " * 100_000}]
    csv.field_size_limit(131_072)
    assert formats.read_table(write(tmp_path, "table.csv", rows)) == rows
    assert csv.field_size_limit() == 131_072


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path):
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbf"text",n\r\nfine,1\r\n')
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "fine"}\n')
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf[{"text": "fine"}]\n')
    assert formats.read_table(str(tmp_path / "a.csv")) == [{"text": "fine", "n": "1"}]
    assert formats.read_table(str(tmp_path / "a.jsonl")) == [{"text": "fine"}]
    assert formats.read_table(str(tmp_path / "a.json")) == [{"text": "fine"}]


def test_blank_lines_and_capitals_do_not_matter(tmp_path: Path):
    (tmp_path / "A.CSV").write_text("text,n\n\nx,1\n\n")
    (tmp_path / "A.JSONL").write_text('\n{"text": "x"}\n\n')
    assert formats.read_table(str(tmp_path / "A.CSV")) == [{"text": "x", "n": "1"}]
    assert formats.read_table(str(tmp_path / "A.JSONL")) == [{"text": "x"}]


def cut(path: str, kept: float) -> None:
    os.truncate(path, int(os.path.getsize(path) * kept))


@pytest.mark.parametrize("kept", [0.99, 0.7, 0.3])
@pytest.mark.parametrize(
    "name",
    ["table.jsonl", "table.jsonl.gz", "table.jsonl.xz", "list.json", "table.parquet", "table.csv", "table.arrow"],
)
def test_a_file_cut_short(tmp_path: Path, name: str, kept: float):
    # A text file cut between two rows cannot be told from a whole one: these are cut inside a row.
    path = write(tmp_path, name)
    cut(path, kept)
    with pytest.raises(RlhfError, match=rf"{name}.*copy .*(again|truncated)"):
        formats.read_table(path)


def test_a_cut_text_file_names_the_row(tmp_path: Path):
    for name in ("table.jsonl", "table.csv"):
        path = write(tmp_path, name)
        cut(path, 0.5)
        with pytest.raises(RlhfError, match=rf"{name}, row 15[0-9]\b"):
            formats.read_table(path)


def test_cut_compressed_files_name_the_row(tmp_path: Path):
    # Noise does not compress, so that half of the file is half of the rows.
    rows = [{"text": os.urandom(500).hex()} for _ in range(1000)]
    for name in ("table.jsonl.gz", "table.jsonl.xz"):
        path = write(tmp_path, name, rows)
        cut(path, 0.5)
        with pytest.raises(RlhfError, match=rf"{name}, row (4[0-9][0-9]|5[0-4][0-9]): truncated"):
            formats.read_table(path)


def test_a_damaged_byte_in_a_compressed_file(tmp_path: Path):
    for name in ("table.jsonl.gz", "table.jsonl.xz"):
        path = Path(write(tmp_path, name, [{"text": os.urandom(500).hex()} for _ in range(100)]))
        content = bytearray(path.read_bytes())
        content[len(content) // 2 : len(content) // 2 + 50] = b"\xff" * 50
        path.write_bytes(content)
        with pytest.raises(RlhfError, match=rf"{name}, row [0-9]+\b"):
            formats.read_table(str(path))


def test_a_cut_arrow_stream_is_noticed_between_batches(tmp_path: Path):
    path = Path(write(tmp_path, "table.arrow"))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(RlhfError, match=r"table.arrow is truncated after row 300"):
        formats.read_table(str(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": }\n', r"a\.jsonl, row 2 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n["x"]\n', r"a\.jsonl, row 2 is not a JSON object"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}\n', r"a\.jsonl, row 2 is not JSON .*utf-8"),
        ("a.jsonl.gz", b'{"text": "x"}\n', r"a\.jsonl\.gz, row 1: truncated or damaged"),
        ("a.jsonl.xz", b'{"text": "x"}\n', r"a\.jsonl\.xz, row 1: truncated or damaged"),
        ("a.json", b'[{"text": "x"},\n"y"]', r"a\.json, row 2 is not a JSON object"),
        ("a.json", b'[{"text": "x"},\n{"text"]', r"a\.json is not JSON .*line 2"),
        ("a.parquet", b"PAR1 not really", r"a\.parquet cannot be read as Parquet"),
        ("a.arrow", b"not really", r"a\.arrow cannot be read as Arrow"),
        ("a.csv", b"text,n\nx,1\ny\n", r"a\.csv, row 2 \(line 3\) has 1 values for 2 columns"),
        ("a.csv", b'text,n\n"x\ny",1\nz,1,2\n', r"a\.csv, row 2 \(line 4\) has 3 values for 2 columns"),
        ("a.csv", b'text,n\nx,1\n"y,2\n', r"a\.csv, row 2 \(line 3\) is not CSV"),
        ("a.csv", b"text,n\nx,1\n\xe9,2\n", r"a\.csv, row 2 .* is not CSV in UTF-8"),
        ("a.csv", b"text,text\nx,1\n", r"a\.csv: the header \(text, text\) must give every column a distinct name"),
        ("a.csv", b"text,\nx,1\n", r"a\.csv: the header .* must give every column a distinct name"),
        ("a.txt", b"x", r"a\.txt has an unknown file type: give one of .jsonl"),
        ("a.jsonl", b"\n\n", r"a\.jsonl has no rows"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), r"a\.jsonl\.gz has no rows"),
        ("a.json", b"[]", r"a\.json has no rows"),
        ("a.csv", b"", r"a\.csv has no rows"),
        ("a.csv", b"text,n\n", r"a\.csv has no rows"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RlhfError, match=message):
        formats.read_table(str(tmp_path / name))


def test_sources_that_are_not_there(tmp_path: Path):
    with pytest.raises(RlhfError, match=r"nothing\.jsonl does not exist"):
        formats.read_table(str(tmp_path / "nothing.jsonl"))
    with pytest.raises(RlhfError, match=r"has neither a save_to_disk data set nor Parquet"):
        formats.read_table(str(tmp_path))
    with pytest.raises(RlhfError, match=r"tfds:movie_reviews has no split: write tfds:NAME/SPLIT"):
        formats.read_table("tfds:movie_reviews")
    (tmp_path / "table.jsonl").mkdir()
    with pytest.raises(RlhfError, match=r"table\.jsonl has neither"):
        formats.read_table(str(tmp_path / "table.jsonl"))


def test_a_damaged_saved_directory(tmp_path: Path):
    path = write(tmp_path, "saved")
    (tmp_path / "saved" / "a.arrow").unlink()
    with pytest.raises(RlhfError, match=r"saved cannot be read: No such file"):
        formats.read_table(path)
    state = tmp_path / "saved" / "state.json"
    state.write_text(json.dumps({"_data_files": [], "_indices_data_files": [{"filename": "i.arrow"}]}))
    with pytest.raises(RlhfError, match=r"saved by an old version of datasets"):
        formats.read_table(path)
    state.write_text(state.read_text()[:-5])
    with pytest.raises(RlhfError, match=r"state\.json is damaged"):
        formats.read_table(path)


@pytest.fixture
def reviews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """A movie_reviews of ten snippets, prepared where fetched data is looked for."""
    numbers = range(1, 11)
    lines = ["\r\n".join(f"{n}\t1.5\tfilm {n}" for n in numbers), "\r\n".join(f"{n}\t1.5\t.5\t[1, 2]" for n in numbers)]
    for filename, content in zip(builders.RAW_FILES, lines, strict=True):
        (tmp_path / filename).write_text(content, newline="")
    builders.prepare_movie_reviews(tmp_path, tmp_path)
    monkeypatch.setenv("RLHF_JAX_DATA", str(tmp_path))
    return [{"id": n, "text": f"film {n}", "rating": 1.5, "ratings": [1, 2]} for n in numbers]


def test_a_tfds_source(reviews: list[Row]):
    rows = formats.read_table("tfds:movie_reviews/train")
    assert sorted(rows, key=lambda row: row["id"]) == [r for r in reviews if builders.split_of(r["id"]) == "train"]
    assert formats.kind_of(rows, "tfds:movie_reviews/train") == "text"


def test_the_hash_of_a_tfds_source_depends_on_version_and_split(reviews: list[Row], monkeypatch: pytest.MonkeyPatch):
    def hashes() -> list[str]:
        return [formats.file_hash(f"tfds:movie_reviews/{split}") for split in ("train", "train", "test")]

    train, again, test = hashes()
    assert train == again != test
    monkeypatch.setattr(builders, "full_name", lambda name: f"{name}/9.9.9")
    assert set(hashes()).isdisjoint({train, test})


@pytest.mark.parametrize("name", WRITERS)
def test_a_hash_changes_with_the_content_only(tmp_path: Path, name: str):
    changed = [*ROWS[:-1], ROWS[-1] | {"chosen": "other"}]
    paths = []
    for directory, rows in (("a", ROWS), ("b", ROWS), ("c", changed)):
        (tmp_path / directory).mkdir()
        paths.append(write(tmp_path / directory, name, rows))
    if name == "table.jsonl.gz":  # whose header holds the time
        for path, rows in zip(paths, (ROWS, ROWS, changed), strict=True):
            Path(path).write_bytes(gzip.compress(json.dumps(rows).encode(), mtime=0))
    one, same, other = map(formats.file_hash, paths)
    assert one == same != other


def test_a_hash_depends_on_the_order_of_files(tmp_path: Path):
    path = write(tmp_path, "saved")
    before = formats.file_hash(path)
    state = json.loads((tmp_path / "saved" / "state.json").read_text())
    state["_data_files"].reverse()
    (tmp_path / "saved" / "state.json").write_text(json.dumps(state))
    assert formats.file_hash(path) != before


def test_the_hash_of_nothing(tmp_path: Path):
    with pytest.raises(RlhfError, match=r"does not exist"):
        formats.file_hash(str(tmp_path / "nothing.csv"))


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        ("id text rating", "text"),
        ("prompt completion", "prompt_completion"),
        ("prompt completion label", "unpaired"),
        ("rejected chosen prompt margin", "preference"),
        ("chosen rejected", "implicit_prompt_preference"),
        ("prompt id", "prompt"),
        ("id messages", "messages"),
        ("text messages prompt", "messages"),
        ("messages prompt completion", "prompt_completion"),
    ],
)
def test_kinds(columns: str, kind: str):
    assert formats.kind_of([dict.fromkeys(columns.split(), "x")], "t.jsonl") == kind


def test_a_table_of_no_kind_lists_its_columns():
    with pytest.raises(RlhfError, match=r"t\.csv has the columns question, answer, .*prompt, chosen, rejected; chosen"):
        formats.kind_of([{"question": "x", "answer": "y"}], "t.csv")


def test_missing_columns_name_the_row():
    rows = [{"prompt": "x", "chosen": "a"}, {"prompt": "y"}]
    formats.require_columns(rows, ["prompt"], "t.jsonl")
    with pytest.raises(RlhfError, match=r"t\.jsonl, row 2 has no column chosen \(it has prompt\)"):
        formats.require_columns(rows, ["prompt", "chosen"], "t.jsonl")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "row 2, column prompt is null, not text"),
        (7, "row 2, column prompt is of type int, not text"),
        (math.nan, "row 2, column prompt is of type float, not text"),
        (
            [{"role": "user", "content": "x"}],
            "row 2, column prompt is of type list, not text.*or chats in every column",
        ),
        ("a\ud83d", "row 2, column prompt contains a lone surrogate"),
    ],
)
def test_what_is_not_text_names_the_row(value: Any, message: str):
    rows = [{"prompt": ""}, {"prompt": value}]
    with pytest.raises(RlhfError, match=rf"t.jsonl, {message}"):
        formats.checked_rows(rows, iter(["prompt"]), "t.jsonl")
    assert formats.checked_rows(rows[:1], ["prompt"], "t.jsonl") == rows[:1]


def say(*contents: str) -> list[Row]:
    """A conversation that the user begins."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("x", "column prompt is of type str, but others are chats"),
        (None, "column prompt is null, but others"),
        ([*say("x"), "y"], "column prompt, message 2 is of type str: write it as {'role': ..., 'content': ...}"),
        ([{"from": "human", "value": "x"}], r"column prompt, message 1 has no role \(it has from, value\): add it"),
        ([{"role": "user"}], r"column prompt, message 1 has no content \(it has role\)"),
        ([{"role": "user", "content": None}], r"column prompt, message 1 has no content \(it has role\)"),
        ([{"content": "x"}], "column prompt, message 1 has no role"),
        ([{}], r"column prompt, message 1 has no role \(it has nothing\)"),
        ([{"role": 3, "content": "x"}], "column prompt, message 1, role is of type int, not text"),
        ([{"role": "user", "content": ["x"]}], "column prompt, message 1, content is of type list, not text"),
        ([{"role": "user", "content": "a\ud83d"}], "column prompt, message 1, content contains a lone surrogate"),
    ],
)
def test_what_is_no_chat_names_row_and_message(value: Any, message: str):
    rows = [{"prompt": say("x")}, {"prompt": value}]
    with pytest.raises(RlhfError, match=rf"t.jsonl, row 2, {message}"):
        formats.checked_rows(rows, ["prompt"], "t.jsonl")


def test_keys_that_other_messages_have_are_left_out(tmp_path: Path):
    call = {"role": "assistant", "tool_calls": [{"name": "look"}]}
    rows = [{"messages": [*say("x"), call]}, {"messages": say("y")}]
    write_parquet(tmp_path / "t.parquet", rows)
    read = formats.read_table(str(tmp_path / "t.parquet"))
    assert set(read[1]["messages"][0]) == {"role", "content", "tool_calls"}
    assert formats.checked_rows(read, ["messages"], "t.parquet") == rows


def test_preference_rows_keep_other_columns():
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b", "margin": 0.5}]
    assert formats.preference_rows(rows, "t.jsonl") == rows


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": " \n", "rejected": "b"}, "row 2, column chosen is empty"),
        ({"prompt": "p", "chosen": "a", "rejected": ""}, "row 2, column rejected is empty"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "row 2, column prompt is null"),
        ({"prompt": "p", "chosen": "a"}, "row 2 has no column rejected"),
    ],
)
def test_bad_preferences_name_the_row(row: Row, message: str):
    with pytest.raises(RlhfError, match=rf"t.csv, {message}"):
        formats.preference_rows([ROWS[0], row], "t.csv")


def test_other_tables_are_no_preferences():
    with pytest.raises(RlhfError, match=r"t\.csv is not preference data"):
        formats.preference_rows([{"text": "x"}], "t.csv")


@pytest.mark.parametrize(
    ("chosen", "rejected", "shared"),
    [
        (say("q", "good"), say("q", "bad"), 1),
        (say("q", "a", "r", "good"), say("q", "a", "r", "bad"), 3),
        (say("q", "same"), say("q", "same"), 1),
        (say("q", "a", "r", "b"), say("q", "a", "s", "b"), 1),  # they part where the user speaks
        (say("q", "a"), say("q", "a", "r", "b"), 1),
        ([{"role": "system", "content": "s"}, *say("q", "a")], [{"role": "system", "content": "s"}, *say("q", "b")], 2),
    ],
)
def test_an_implicit_prompt_of_chats_is_what_the_assistant_answers_in_both(chosen: list, rejected: list, shared: int):
    (row,) = formats.preference_rows([{"chosen": chosen, "rejected": rejected, "id": 3}], "t.jsonl")
    expected = {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:], "id": 3}
    assert row == expected and row["chosen"][0]["role"] == row["rejected"][0]["role"] == "assistant"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": say("q", "a"), "rejected": say("r", "a")}, "chosen and rejected share no initial messages"),
        ({"chosen": say("q"), "rejected": say("q", "a")}, "chosen and rejected share no initial messages"),
        ({"chosen": say("q", "a"), "rejected": []}, "column rejected is empty"),
        ({"chosen": "q", "rejected": say("q", "a")}, "column chosen is of type str, but others are chats"),
    ],
)
def test_bad_preferences_of_chats_name_the_row(row: Row, message: str):
    with pytest.raises(RlhfError, match=rf"t.jsonl, row 2[:,] {message}"):
        formats.preference_rows([{"chosen": say("q", "a"), "rejected": say("q", "b")}, row], "t.jsonl")


def test_a_prompt_of_text_does_not_go_with_answers_in_messages():
    with pytest.raises(
        RlhfError, match=r"row 1, column chosen is of type list.*without a column prompt if the answers"
    ):
        formats.preference_rows([{"prompt": "q", "chosen": say("q", "a"), "rejected": say("q", "b")}], "t.jsonl")


TURNS = "\n\nHuman: Is it good?\n\nAssistant: Yes.\n\nHuman: How good?\n\nAssistant:"


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The film is great", "The film is grim", "The film is"),
        ("The film is good", "The film is goods", "The film is"),
        ("The film", "The film is good", "The"),
        ("a film  or two", "a film  of two", "a film"),
        ("a film\nby", "a film by", "a film"),
        ("yes", "yesterday", ""),
        ("yes", "no", ""),
        ("same words", "same words", "same"),
        ("The film ", "The film is", "The"),
        (f"{TURNS} It is fine", f"{TURNS} It is bad", TURNS),
        (f"{TURNS} Good", TURNS, TURNS.rpartition("\n\n")[0]),
    ],
)
def test_implicit_prompts_end_at_a_turn_or_a_word(chosen: str, rejected: str, prompt: str):
    (row,) = formats.preference_rows([{"chosen": chosen, "rejected": rejected, "id": 3}], "t.jsonl")
    expected = {"prompt": prompt, "chosen": chosen[len(prompt) :], "rejected": rejected[len(prompt) :], "id": 3}
    assert row == expected


@given(st.text(alphabet="ab \n", max_size=12), *[st.text(alphabet="ab \n", max_size=6)] * 2)
def test_implicit_prompts_lose_nothing_and_cut_no_word(shared: str, one: str, other: str):
    chosen, rejected = f"{shared}{one}a", f"{shared}{other}b"
    (row,) = formats.preference_rows([{"chosen": chosen, "rejected": rejected}], "t.jsonl")
    assert (row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]) == (chosen, rejected)
    assert row["chosen"].strip()
    assert row["rejected"].strip()
    if row["prompt"]:
        assert row["chosen"][0].isspace()
        assert row["rejected"][0].isspace()
        assert not row["prompt"][-1].isspace()


def test_labels_may_be_written_in_many_ways():
    written = [True, False, 1, 0, "True", "false", "1", 0]
    rows = [{"prompt": "a", "completion": " b", "label": label, "id": 7} for label in written]
    checked = formats.unpaired_rows(rows, "table")
    assert [row["label"] for row in checked] == [True, False] * 4
    assert all(type(row["label"]) is bool and row["id"] == 7 for row in checked)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "a", "completion": " b", "label": 0.5}, "table, row 2, column label is 0.5: give true"),
        ({"prompt": "a", "completion": " b", "label": None}, "row 2, column label is None"),
        ({"prompt": "a", "completion": " b"}, "row 2 has no column label"),
        ({"prompt": "a", "completion": " ", "label": True}, "row 2, column completion is empty"),
        ({"prompt": "a", "completion": [], "label": True}, "row 2, column completion is of type list, not text"),
    ],
    ids=["number", "null", "missing", "blank", "chat"],
)
def test_bad_unpaired_rows_are_named(row, message):
    with pytest.raises(RlhfError, match=message):
        formats.unpaired_rows([{"prompt": "a", "completion": " b", "label": True}, row], "table")
