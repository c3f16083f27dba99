"""SIGTERM, by which schedulers end jobs: training saves a checkpoint first, and the exit status asks for a restart."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

STATUS = 128 + signal.SIGTERM
"""Exit status of a process that SIGTERM ended, 143, on which schedulers restart a job."""


class Terminated(SystemExit):
    """SIGTERM ended the run; the same command continues it."""

    def __init__(self) -> None:
        super().__init__(STATUS)


def raise_on_sigterm() -> None:
    """Raise Terminated in the main thread when the process receives SIGTERM, so that files are closed."""

    def end(number: int, frame: object) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, end)


@contextlib.contextmanager
def noted_sigterm() -> Iterator[Callable[[], bool]]:
    """Note SIGTERM within the context instead of ending; yield a function that returns whether it was received.

    Outside of the main thread, Python cannot handle signals, and nothing is noted.
    """
    received = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield received.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.set())
    try:
        yield received.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
