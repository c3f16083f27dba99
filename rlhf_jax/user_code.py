"""User-defined functions and classes, named `package.module:name` or `path/file.py:name` in a config.

Relative paths start at the working directory. The file's hash is part of the identity of the stage that names it.
"""

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf_jax.types import RlhfError


def load(source: str, role: str) -> Callable[..., Any]:
    """Load the function or class that a source names.

    Args: role is its role, for messages, such as "reward function".
    Raises RlhfError unless the source loads and is a function (not an async one) or a class.
    """
    found = load_object(source, role)
    if not callable(found):
        place, name = _parts(source, role)
        raise RlhfError(f"{role} {source}: {place} has no function {name!r}")
    if inspect.iscoroutinefunction(found):
        raise RlhfError(f"{role} {source} is asynchronous: give a plain function")
    return found


def load_object(source: str, role: str) -> object:
    """Load the object that a source names, or return None if the module has no such name; otherwise as `load`."""
    place, name = _parts(source, role)
    try:
        module = _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:  # a user's module may raise anything
        raise RlhfError(f"{role} {source} cannot be loaded: {type(error).__name__}: {error}") from error
    return getattr(module, name, None)


def options_of(
    function: Callable[..., Any], source: str, role: str, *, arguments: Sequence[str], options: Sequence[str]
) -> tuple[str, ...]:
    """Check a function's signature, and return the options that it accepts, in the order of its parameters.

    Args: arguments are the names that its positional parameters must have, in order; options are the names of further
    parameters that it may have, passed by keyword. Any other parameter needs a default, and keeps it.
    Raises RlhfError with the expected signature.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise RlhfError(f"{role} {source} has no signature that Python can read: write it with `def`") from error
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = [parameter for parameter in signature.parameters.values() if parameter.kind not in variadic]
    first, rest = parameters[: len(arguments)], parameters[len(arguments) :]
    in_order = all(parameter.kind is not parameter.KEYWORD_ONLY for parameter in first)
    unknown = [x.name for x in rest if x.default is x.empty and x.name not in options]
    if not in_order or [parameter.name for parameter in first] != list(arguments) or unknown:
        name = source.rpartition(":")[2]
        may_have = f", where ... may be {', '.join(options)}" if options else ""
        written = ", ".join([*arguments, *(["*", "..."] if options else [])])
        raise RlhfError(f"{role} {source} has the signature {signature}: write `def {name}({written})`{may_have}")
    return tuple(parameter.name for parameter in rest if parameter.name in options)


def source_file(source: str, role: str) -> Path | None:
    """Return the path of the file that a source names, or None if there is no such file."""
    place, _ = _parts(source, role)
    file: str | None = place
    if not place.endswith(".py"):
        try:
            spec = importlib.util.find_spec(place)
        except (ImportError, ValueError):
            spec = None
        file = None if spec is None else spec.origin
    return Path(file) if file is not None and Path(file).is_file() else None


def file_hash(source: str) -> str:
    """Compute the SHA-256, in hex, of the file that a source names. Raises RlhfError if there is no such file."""
    file = source_file(source, "function")
    if file is None:
        raise RlhfError(
            f"{source}: there is no {source.rpartition(':')[0]}; a relative path starts at the working directory"
        )
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _parts(source: str, role: str) -> tuple[str, str]:
    place, _, name = source.rpartition(":")
    if not place or not name.isidentifier():
        raise RlhfError(f"{source!r} names no {role}: write package.module:function or path/file.py:function")
    return place, name


def _load_file(path: Path) -> ModuleType:
    text = path.read_bytes()
    name = f"_rlhf_jax_user_{path.stem}_{hashlib.sha256(text).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    loader = SourceFileLoader(name, str(path))
    module = importlib.util.module_from_spec(ModuleSpec(name, loader, origin=str(path)))
    module.__file__ = str(path)
    sys.modules[name] = module  # dataclasses look up their module
    try:
        # Not exec_module, which may run stale bytecode: it compares size and modification second only.
        exec(loader.source_to_code(text, path), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module
