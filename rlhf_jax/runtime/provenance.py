"""Provenance of a stage's results: source code, packages, machine, data, seeds and effective batch size."""

import functools
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

import rlhf_jax
from rlhf_jax.runtime.files import read_json, write_json
from rlhf_jax.runtime.stage_state import LOCK, STATE
from rlhf_jax.runtime.workdir import Identity
from rlhf_jax.types import Json

COMPUTE = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "scipy",
    "scikit-learn",
    "transformers",
    "tokenizers",
    "libtpu",
    "jax-cuda12-plugin",
    "jax-cuda12-pjrt",
    "jax-cuda13-plugin",
    "jax-cuda13-pjrt",
)
"""Distributions whose version may affect results; a record omits those that are not installed."""

ENVIRONMENTS = "environments.json"
"""File in a stage's directory with the environment of each process that worked on the stage."""


def source(package: Path = Path(rlhf_jax.__file__).parent) -> dict[str, Json]:
    """Find the version of the package and, in a git checkout, the commit and whether the tree is clean.

    A tree is clean if no tracked file differs from the commit and no untracked file in the package's directory is
    missing from .gitignore.

    Returns: `version`, `origin` ("git checkout" or "installed package"), `commit`, `clean`, and `changed`, the paths of
    changed and untracked files. The last three are None for an installed package or without git.
    """
    found: dict[str, Json] = {"version": rlhf_jax.__version__, "origin": "installed package"}
    unknown = {"commit": None, "clean": None, "changed": None}
    if shutil.which("git") is None or _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return found | unknown
    commit = _git(package, "rev-parse", "HEAD")
    tracked = _git(package, "status", "--porcelain", "--untracked-files=no", ":/")
    own = _git(package, "status", "--porcelain", "--untracked-files=all", ".")
    if commit is None or tracked is None or own is None:
        return found | unknown
    changed = sorted({line[3:] for line in (tracked + own).splitlines()})
    return found | {
        "origin": "git checkout",
        "commit": commit.strip(),
        "clean": not changed,
        "changed": changed,
    }


def packages() -> dict[str, str]:
    """Return the versions of the installed distributions in `COMPUTE`."""
    versions = {}
    for name in COMPUTE:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def machine() -> dict[str, Json]:
    """Describe the devices, the processor and XLA's target, and the Python version.

    Returns: `platform` (cpu, gpu, tpu), `platform_version`, `devices` (the kind of each), `processor`, `cores` of the
    machine, `threads` that this process may use, `cpu_target` (None on accelerators), `xla_flags` and `python`.
    """
    client = jax.devices()[0].client
    return {
        "platform": client.platform,
        "platform_version": " ".join(client.platform_version.split()),
        "devices": [device.device_kind for device in jax.devices()],
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": int(os.environ.get("PJRT_NPROC") or os.environ.get("NPROC") or _usable_cores()),
        "cpu_target": cpu_target() if client.platform == "cpu" else None,
        "xla_flags": os.environ.get("XLA_FLAGS", "").split(),
        "python": platform.python_version(),
    }


def machine_name(machine: dict[str, Json]) -> str:
    """Describe the machine of a `provenance`: its accelerators, or its processor and the threads used."""
    if machine["platform"] != "cpu":
        kinds = machine["devices"]
        return " and ".join(f"{kinds.count(kind)} × {kind}" for kind in dict.fromkeys(kinds))
    target = machine["cpu_target"]
    compiled = f" (compiled for {target['name']})" if target else ""
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    return f"{threads} of {machine['processor']}{compiled}"


@functools.cache
def cpu_target() -> dict[str, Json] | None:
    """Find the name and features, in LLVM's terms, of the processor for which XLA's CPU compiler generates code.

    This is the host's processor, unless `--xla_cpu_max_isa` in XLA_FLAGS restricts the features. JAX has no API for it;
    it is parsed from a serialised program. None if jaxlib's format of it has changed.
    """
    program = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((8,), jnp.float32)).compile()
    executable = program.runtime_executable()
    return None if executable is None else parse_cpu_target(executable.serialize())


def parse_cpu_target(serialised: bytes) -> dict[str, Json] | None:
    """Parse the processor's name and features, fields 2 and 3 of XLA's TargetMachineOptionsProto, from a program."""
    found = re.search(rb"\x12[\x01-\x7f]([\w.\-]+)\x1a([\x80-\xff]*[\x00-\x7f])(?=[+-]\w)", serialised)
    if found is None:
        return None
    length = sum((byte & 0x7F) << (7 * place) for place, byte in enumerate(found[2]))
    features = serialised[found.end() : found.end() + length].decode("ascii").split(",")
    return {"name": found[1].decode("ascii"), "features": [name[1:] for name in features if name.startswith("+")]}


def environment() -> dict[str, Json]:
    """Collect source, packages, machine and date."""
    return {"source": source(), "packages": packages(), "machine": machine(), "date": time.strftime("%Y-%m-%d")}


def begin(directory: Path, here: dict[str, Json]) -> str | None:
    """Add the environment of this process to the stage's list, or start the list for a new stage.

    Returns a sentence if the stage was worked on with another layout of devices.
    """
    path = directory / ENVIRONMENTS
    new = {"config.json", ENVIRONMENTS, STATE, LOCK}
    resumed = path.exists() and any(entry.name not in new for entry in directory.iterdir())
    before = read_json(path) if resumed else []
    write_json(path, [*before, here])
    old, now = before[-1].get("layout") if before else None, here.get("layout")
    if old is None or now is None or old == now:
        return None
    return (
        f"{directory.name} continues on {_described(now)}; it was started on {_described(old)}. Results agree with "
        "those of one layout up to rounding, not bit for bit."
    )


def _described(layout: dict[str, Json]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in layout.items())


def record(directory: Path, identity: Identity, seeds: Iterable[int], batch: dict[str, Json] | None) -> dict[str, Json]:
    """Make the `provenance` entry of a stage's summary.

    Returns: the environment of the process that completed the stage; `earlier`, the environments of earlier processes
    that differ in more than the date; `seeds`; `sha256` of the data files; `inputs`, the fingerprints of earlier stages
    and hashes of files; `config`, the stage's fingerprint; and `batch` if the stage trains.
    """
    *before, last = read_json(directory / ENVIRONMENTS)
    return {
        **last,
        "earlier": [
            other for i, other in enumerate(before) if _undated(other) not in map(_undated, [*before[:i], last])
        ],
        "seeds": list(seeds),
        "sha256": identity.common["data_sha256"],
        "inputs": identity.inputs,
        "config": identity.fingerprint,
        **({} if batch is None else {"batch": batch}),
    }


def effective_batch(
    *, rows: int, unit: str, micro_batch: int | None, devices: int, tokens: Sequence[float]
) -> dict[str, Json]:
    """Describe the batch of one update over all devices and micro-batches.

    Args: rows per update, in total, and the name of one row, `unit`; micro_batch as in the optimiser's section; number
    of devices that share the rows; response tokens of each logged update.

    Returns: `rows`, `unit`, the numbers of `micro_batches` and `devices` over which the rows are split, and `tokens`,
    the mean number of response tokens per update.
    """
    return {
        "rows": rows,
        "unit": unit,
        "micro_batches": 1 if micro_batch is None else -(-rows // micro_batch),
        "devices": devices,
        "tokens": sum(tokens) / len(tokens),
    }


def _git(directory: Path, *arguments: str) -> str | None:
    """Return the output of a git command, or None if it fails, for example outside a checkout."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # a git hook sets its own
    command = ["git", "--no-optional-locks", "-C", str(directory), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=own)
    return done.stdout if done.returncode == 0 else None


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor() -> str:
    """Name of the processor's model."""
    path = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", path.read_text() if path.exists() else "", re.MULTILINE)
    return names[0] if names else platform.processor()


def _undated(one: dict[str, Json]) -> dict[str, Json]:
    return {key: value for key, value in one.items() if key != "date"}
