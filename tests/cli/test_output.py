"""Text and counts of commands as they arrive in a terminal."""

import io
import sys

import pytest

from rlhf_jax.cli import output
from rlhf_jax.cli.output import RowCount, WholeWords, counting_rows


def printed(text: str, width: int | None, size: int) -> str:
    """The text in pieces of a size, as it is printed."""
    lines = WholeWords(width)
    pieces = [lines.add(text[start : start + size]) for start in range(0, len(text), size)]
    return "".join([*pieces, lines.finish()])


@pytest.mark.parametrize("size", [1, 3, 100])
def test_lines_break_between_words(size):
    text = "a good film, and one\nof the best of all"
    assert printed(text, 10, size) == "a good \nfilm, and \none\nof the \nbest of \nall"
    assert all(len(line.rstrip()) <= 10 for line in printed(text, 10, size).split("\n"))
    assert printed(text, None, size) == text, "through a pipe nothing is added"


def test_a_word_that_is_too_long_stands_on_a_line_of_its_own():
    assert printed("a " + 12 * "b" + " c", 5, 1) == "a \n" + 12 * "b" + " \nc"


def test_wide_characters_take_two_cells():
    assert printed("映画 映画 映画", 10, 1) == "映画 映画 \n映画"


def test_words_are_printed_when_they_are_complete():
    lines = WholeWords(40)
    assert [lines.add(piece) for piece in ("a go", "od fi", "lm")] == ["a ", "good ", ""]
    assert lines.finish() == "film" and lines.finish() == ""


def test_rows_are_counted_with_their_rate(monkeypatch):
    clock, shown = iter([0.0, 30.0, 60.0]), []
    monkeypatch.setattr(output.time, "monotonic", lambda: next(clock))
    count = RowCount(shown.append)
    count.add(4)
    count.add(5)
    assert shown == ["4 rows, 8 per minute", "9 rows, 9 per minute"]


def test_no_count_is_shown_in_a_file(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    with counting_rows() as count:
        count.add(1)
    assert file.getvalue() == ""
