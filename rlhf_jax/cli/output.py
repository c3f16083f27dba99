"""Standard output of the commands."""

import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator

from rich.cells import cell_len
from rich.console import Console


@contextlib.contextmanager
def until_closed() -> Iterator[None]:
    """Exit silently when the reader of standard output closes it, as `head` does."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it exits


class WholeWords:
    """Text that arrives in pieces, with line breaks between words instead of within them."""

    def __init__(self, width: int | None) -> None:
        """Start at the beginning of a line. Args: width of a line in cells; None: lines are not broken."""
        self._width, self._column, self._word = width, 0, ""

    def add(self, piece: str) -> str:
        """Return the text that can be printed now: all but a last word that may continue."""
        if self._width is None:
            return piece
        *complete, self._word = re.split(r"(?<=\s)", self._word + piece)
        return "".join(map(self._placed, complete))

    def finish(self) -> str:
        """Return the rest of the text."""
        word, self._word = self._word, ""
        return self._placed(word)

    def _placed(self, word: str) -> str:
        """Place a word, which may end with a space or a line break."""
        width = cell_len(word.rstrip())
        broken = self._width is not None and self._column > 0 and self._column + width > self._width
        start = 0 if broken else self._column
        self._column = 0 if word.endswith("\n") else start + cell_len(word)
        return f"\n{word}" if broken else word


class RowCount:
    """Number of rows that a command has written, and the rate."""

    def __init__(self, show: Callable[[str], None]) -> None:
        """Start the clock. Args: show prints the number and the rate."""
        self._show, self._done, self._start = show, 0, time.monotonic()

    def add(self, rows: int) -> None:
        """Count rows, and show how many there are."""
        self._done += rows
        seconds = time.monotonic() - self._start
        self._show(f"{self._done} rows, {60 * self._done / seconds:.3g} per minute")


@contextlib.contextmanager
def counting_rows() -> Iterator[RowCount]:
    """Show the number of rows on standard error, if that is a terminal and standard output is not."""
    console = Console(stderr=True, highlight=False)
    if console.is_terminal and not sys.stdout.isatty():
        with console.status("reading the first rows") as status:
            yield RowCount(status.update)
    else:
        yield RowCount(lambda text: None)
