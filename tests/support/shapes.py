"""Check of annotations, shapes included, that conftest applies to every function of the package."""

import sys
import typing
from collections.abc import Callable

import beartype

# An int passes for a float, as it does for the static checker.
_check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))


def checked(function: Callable) -> Callable:
    """Check arguments and results; of a generic named tuple only its class, as beartype does not support them."""
    for found in vars(sys.modules[function.__module__]).values():
        bases = getattr(found, "__orig_bases__", ()) if isinstance(found, type) else ()
        if typing.NamedTuple in bases and len(bases) > 1:
            found.__orig_bases__ = tuple(base for base in bases if base is not typing.NamedTuple)
    return _check(function)
