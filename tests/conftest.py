"""Settings of all tests: eight CPU devices, no silent broadcasting or promotion, and checked shapes."""

import gc
import os
from contextlib import nullcontext
from pathlib import Path

from tests.support import shapes, xla_flags

# Before JAX is imported, here and in the processes that tests start.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["RLHF_JAX_HUGE_PAGES"] = "off"  # commands start once
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {xla_flags.XLA_FLAGS}"
)

import hypothesis
import jax
import jaxtyping
import pytest

from tests.support import memory, program_cache

jax.config.update("jax_numpy_rank_promotion", "raise")
# Hundreds of small programs: with all of them kept, the second run of tests/core takes half the time it does with 0.3.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # else a key contains the directory of the cache

# The same examples in every run, and no deadline: the first example compiles.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("tests")

gc.set_threshold(200_000, 50, 1000)  # JAX keeps millions of objects: looking through them takes its time

STRICT_PROMOTION = {"core", "models", "sampling"}  # optax breaks under it elsewhere


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-shapes", action="store_true", help="leave types and shapes of functions unchecked: quicker")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("no_shapes"):  # before rlhf_jax is imported
        jaxtyping.install_import_hook("rlhf_jax", f"{shapes.__name__}.{shapes.checked.__name__}")
    # Processes that tests start, and kill, write into another cache, which is not the user's either.
    os.environ["RLHF_JAX_CACHE"] = str(config.cache.mkdir("commands"))
    jax.config.update("jax_compilation_cache_dir", str(program_cache.own_cache(config)))
    config.addinivalue_line("filterwarnings", "ignore:Error reading persistent compilation cache entry:UserWarning")


@pytest.fixture(autouse=True)
def promotion(request: pytest.FixtureRequest):
    room = request.path.relative_to(Path(__file__).parent).parts[0]
    with jax.numpy_dtype_promotion("strict") if room in STRICT_PROMOTION else nullcontext():
        yield


@pytest.fixture(autouse=True)
def bounded_memory():
    yield
    if memory.resident() > memory.LIMIT:
        memory.drop_programs()


@pytest.fixture(scope="session")
def movie_reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory ($RLHF_JAX_DATA) with the movie reviews, fetched once for all workers."""
    from rlhf_jax.data import fetch  # after the import hook

    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    directory = Path(os.environ.get("RLHF_JAX_DATA") or shared / "rlhf_jax_data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_JAX_DATA", str(directory))
        fetch.fetch("movie_reviews")
    return directory


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the cases after the first of `nightly_rest`, and put the longest chain of processes first.

    One worker would be left alone with that chain at the end.
    """
    seen = set()
    for item in items:
        function = (item.path, item.originalname) if isinstance(item, pytest.Function) else None
        if function in seen and item.get_closest_marker("nightly_rest"):
            item.add_marker("nightly")
        seen.add(function)
    items.sort(key=lambda item: item.path.name != "test_resume.py")
