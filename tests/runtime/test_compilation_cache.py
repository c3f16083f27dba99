"""The compilation cache: shared by processes, bounded, and never a reason for another result or a failure."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from rlhf_jax.runtime import compilation_cache

PROGRAM = """
import jax
import jax.numpy as jnp
from rlhf_jax.runtime import compilation_cache

compilation_cache.MIN_SECONDS = 0.0
compilation_cache.enable()
events = []
jax.monitoring.register_event_listener(lambda event, **kwargs: events.append(event))
result = jax.jit(lambda x: jnp.sin(x) @ x)(jnp.linspace(0, 1, 16).reshape(4, 4))
print(result.tobytes().hex(), events.count("/jax/compilation_cache/cache_hits"))
"""


def start(cache: str) -> subprocess.Popen:
    """Start a process that runs `PROGRAM` with a cache."""
    environment = {**os.environ, compilation_cache.VARIABLE: cache, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-W", "error", "-c", PROGRAM]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> tuple[str, int]:
    """Return the program's result and how many programs it read from the cache; nothing is written to stderr."""
    out, err = process.communicate()
    assert process.returncode == 0 and not err, err
    result, hits = out.split()
    return result, int(hits)


def test_processes_share_programs_and_results_do_not_depend_on_the_cache(tmp_path):
    first, second = map(finish, [start(str(tmp_path)) for _ in range(2)])  # at once, in an empty directory
    expected, hits = finish(start("off"))
    assert first[0] == second[0] == expected and hits == 0
    (directory,) = tmp_path.iterdir()
    programs = sorted(file.name for file in directory.glob("*-cache"))
    damaged = directory / programs[0]  # as if its writer had been killed
    damaged.write_bytes(damaged.read_bytes()[:20])
    damaged.with_name(damaged.name.replace("-cache", "-atime")).unlink()
    assert finish(start(str(tmp_path))) == (expected, len(programs) - 1)
    assert finish(start(str(tmp_path))) == (expected, len(programs))
    assert sorted(file.name for file in directory.glob("*-cache")) == programs


@pytest.fixture
def no_cache():
    """Take away the tests' own cache, and its limits, and give them back."""
    names = [
        "jax_compilation_cache_dir",
        "jax_compilation_cache_max_size",
        "jax_persistent_cache_min_compile_time_secs",
    ]
    before = {name: jax.config.values[name] for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_cache_is_on_by_default_bounded_and_in_the_users_cache_directory(tmp_path, monkeypatch, no_cache):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(compilation_cache.VARIABLE)
    compilation_cache.enable()
    assert Path(jax.config.values["jax_compilation_cache_dir"]).parent == tmp_path / "rlhf_jax" / "programs"
    assert 0 < jax.config.values["jax_compilation_cache_max_size"] < 10 * 2**30


def test_a_cache_of_the_process_itself_is_kept(tmp_path, monkeypatch, no_cache):
    monkeypatch.setenv(compilation_cache.VARIABLE, str(tmp_path / "ours"))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    compilation_cache.enable()
    assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "own")
    assert not (tmp_path / "ours").exists()


def test_a_directory_that_cannot_be_used_is_named_once(tmp_path, monkeypatch, no_cache, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv(compilation_cache.VARIABLE, str(tmp_path / "file"))
    for _ in range(2):
        compilation_cache.enable()
    assert jax.config.values["jax_compilation_cache_dir"] is None
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "file") in line and "Not a directory" in line and "RLHF_JAX_CACHE" in line


def test_unlike_processors_have_different_directories(tmp_path, monkeypatch):
    monkeypatch.setenv(compilation_cache.VARIABLE, str(tmp_path))
    here = compilation_cache.cache_dir()
    assert here is not None and here == compilation_cache.cache_dir()
    monkeypatch.setattr(compilation_cache, "processor", lambda: "another processor")
    assert compilation_cache.cache_dir() != here
