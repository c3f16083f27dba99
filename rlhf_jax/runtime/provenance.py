"""Provenance of a stage's numbers: source code, packages, machine, data, seeds and the size of a batch."""

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
    "grain",
    "libtpu",
    "jax-cuda12-plugin",
    "jax-cuda12-pjrt",
    "jax-cuda13-plugin",
    "jax-cuda13-pjrt",
)
"""Distributions whose release may change a number; those that are not installed are left out of a record."""

ENVIRONMENTS = "environments.json"
"""In a stage's directory: one environment for each process that worked on the stage."""


def source(package: Path = Path(rlhf_jax.__file__).parent) -> dict[str, Json]:
    """Version of the package and, where it is imported from a git checkout, the commit and whether the tree is clean.

    A tree is clean when no tracked file differs from the commit, and the package's directory has no file that is
    neither tracked nor ignored.

    Returns: `version`, `origin` ("git checkout" or "installed package"), `commit`, `clean`, and `changed`, the paths
    that keep the tree from being clean. The last three are None for an installed package, and where there is no git.
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
    """Versions of the installed distributions that compute."""
    versions = {}
    for name in COMPUTE:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def machine() -> dict[str, Json]:
    """Devices, and the processor with what XLA compiles for.

    Returns: `platform` (cpu, gpu, tpu), `platform_version`, `devices` (a kind each), `processor`, `cores` of the
    machine, `threads` that this process may use, `cpu_target` (None on accelerators), the flags that are set in
    XLA_FLAGS, and the release of Python.
    """
    client = jax.devices()[0].client
    return {
        "platform": client.platform,
        "platform_version": " ".join(client.platform_version.split()),
        "devices": [device.device_kind for device in jax.devices()],
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": int(os.environ.get("PJRT_NPROC") or os.environ.get("NPROC") or _usable_cores()),
        "cpu_target": cpu_target() if client.platform == "cpu" else None,
        "xla_flags": os.environ.get("XLA_FLAGS", "").split(),
        "python": platform.python_version(),
    }


@functools.cache
def cpu_target() -> dict[str, Json] | None:
    """Name and features of the processor that XLA's CPU compiler generates code for, as LLVM names them.

    They are those of the host, unless `--xla_cpu_max_isa` among XLA_FLAGS allows fewer. A compiled program carries them
    when it is serialised, beside its target triple; jax has no other way to ask. None where a release of jaxlib writes
    them otherwise.
    """
    program = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((8,), jnp.float32)).compile()
    executable = program.runtime_executable()
    return None if executable is None else parse_cpu_target(executable.serialize())


def parse_cpu_target(serialised: bytes) -> dict[str, Json] | None:
    """The processor's name and features in a serialised program: fields 2 and 3 of XLA's TargetMachineOptionsProto."""
    found = re.search(rb"\x12[\x01-\x7f]([\w.\-]+)\x1a([\x80-\xff]*[\x00-\x7f])(?=[+-]\w)", serialised)
    if found is None:
        return None
    length = sum((byte & 0x7F) << (7 * place) for place, byte in enumerate(found[2]))
    features = serialised[found.end() : found.end() + length].decode("ascii").split(",")
    return {"name": found[1].decode("ascii"), "features": [name[1:] for name in features if name.startswith("+")]}


def environment() -> dict[str, Json]:
    """All of the above, and the date."""
    return {"source": source(), "packages": packages(), "machine": machine(), "date": time.strftime("%Y-%m-%d")}


def begin(directory: Path, here: dict[str, Json]) -> None:
    """Adds the environment of this process to those that have worked on a stage; the first one for a new stage."""
    path = directory / ENVIRONMENTS
    resumed = path.exists() and any(entry.name not in ("config.json", ENVIRONMENTS) for entry in directory.iterdir())
    write_json(path, [*(read_json(path) if resumed else []), here])


def record(directory: Path, identity: Identity, seeds: Iterable[int], batch: dict[str, Json] | None) -> dict[str, Json]:
    """The `provenance` of a stage's summary.

    Returns: the environment of the process that completed the stage; `earlier`, the environments of those that worked
    on it before and differ in more than the date; `seeds`; `sha256` of the data's files; `inputs`, the hash of each
    stage and file that was read; `config`, the hash of all of these and the stage's section; and `batch` where the
    stage trains.
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
    """The batch of one update, whatever it is cut into.

    Args: rows of an update over all devices and micro-batches, each a `unit`; micro_batch as in the optimiser's
    section; devices that share the rows; tokens of the responses in each update that was measured.

    Returns: `rows`, `unit`, the numbers of `micro_batches` and `devices` that the rows are split over, and `tokens`,
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
    """Return the output of a git command; None if it fails, as outside of a checkout."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # a hook's are of its own
    command = ["git", "--no-optional-locks", "-C", str(directory), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=own)
    return done.stdout if done.returncode == 0 else None


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", path.read_text() if path.exists() else "", re.MULTILINE)
    return names[0] if names else platform.processor()


def _undated(one: dict[str, Json]) -> dict[str, Json]:
    return {key: value for key, value in one.items() if key != "date"}
