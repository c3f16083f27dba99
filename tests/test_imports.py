"""Modules that the command line leaves until they are used, so that it starts quickly."""

import subprocess
import sys

import pytest

from rlhf_jax.main import VERBS

HEAVY = {
    "gguf",
    "jax",
    "matplotlib",
    "orbax",
    "pandas",
    "pyarrow",
    "scipy",
    "sklearn",
    "tensorflow",
    "tensorflow_datasets",
    "torch",
    "transformers",
}
NEEDED = {
    "run": {"jax"},
    "sweep": {"jax", "pandas", "pyarrow"},
    "plan": {"jax"},
    "doctor": {"jax"},
    "completion": {"jax"},
    "report": {"jax", "matplotlib", "pandas", "pyarrow", "scipy"},
    "fields": {"jax"},
    "config": {"jax"},
    "status": {"jax"},
    "show": {"jax"},
    "fetch": {"jax"},
    "reproduce": {"jax"},
    "compare": {"jax", "pandas", "pyarrow"},
    "sample": {"jax", "pandas", "pyarrow"},
    "chat": {"jax", "pandas", "pyarrow"},
    "logprobs": {"jax", "pandas", "pyarrow"},
    "score": {"jax", "pandas", "pyarrow"},
    "best-of-n": {"jax", "pandas", "pyarrow"},
    "export": {"jax", "pandas", "pyarrow"},
}
"""Heavy modules that the import of a command may load; pandas loads pyarrow."""


def imported(program: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after a program."""
    listing = "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    command = [sys.executable, "-c", f"import sys\n{program}\n{listing}"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stderr.split())


def test_the_help_and_an_unknown_verb_load_nothing_heavy():
    found = imported("from rlhf_jax.main import main\nassert main(['--help']) == 0 and main(['nonsense']) == 1")
    assert not found & (HEAVY | {"absl", "ml_collections", "numpy", "rich"})


def modules_by_need() -> dict[frozenset[str], list[str]]:
    """The modules of verbs, grouped by the heavy modules that all their verbs need: one interpreter imports a group."""
    verbs, groups = {}, {}
    for verb, target in VERBS.items():
        verbs.setdefault(target.partition(":")[0], []).append(verb)
    for module, own in verbs.items():
        groups.setdefault(frozenset.intersection(*(frozenset(NEEDED[verb]) for verb in own)), []).append(module)
    return groups


@pytest.mark.parametrize("needed, modules", modules_by_need().items(), ids=lambda part: ",".join(sorted(part)))
def test_the_import_of_a_verb_loads_only_what_every_use_of_it_needs(needed, modules):
    assert imported(f"import {', '.join(modules)}") & HEAVY <= needed, modules


def test_a_stage_that_fits_a_judge_loads_scikit_learn_when_it_runs():
    program = "import rlhf_jax.stages.gold\nassert 'sklearn' not in sys.modules\nimport rlhf_jax.rewards.tfidf as tfidf"
    fit = "tfidf.fit(tfidf.TfidfRidgeConfig(alpha=1.0, min_df=1), ['good film', 'bad film'], [1.0, 0.0])"
    assert "sklearn" in imported(f"{program}\n{fit}")
