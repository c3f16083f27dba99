"""Counts of compiled programs, so that a test can say how many of them an input of any length takes."""

import collections
import contextlib
from collections.abc import Iterator

from jax import monitoring

COMPILED = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def compilations() -> Iterator[collections.Counter[str]]:
    """Count the programs that jit compiles in this context, by the name of the jitted function."""
    counts: collections.Counter[str] = collections.Counter()

    def count(event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs
        if event == COMPILED:
            counts[str(kwargs["fun_name"]).removeprefix("jit(").removesuffix(")")] += 1

    monitoring.register_event_duration_secs_listener(count)
    try:
        yield counts
    finally:
        monitoring.unregister_event_duration_listener(count)
