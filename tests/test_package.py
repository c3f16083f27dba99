"""Package metadata that users need to install and cite it."""

import hashlib
import os
import re
import tomllib
from pathlib import Path

import yaml

from rlhf_jax import __version__

ROOT = Path(__file__).parents[1]
APACHE_2 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
"""SHA-256 of https://www.apache.org/licenses/LICENSE-2.0.txt."""


def test_the_licence_is_apaches_whole_and_the_metadata_name_it():
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE_2
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (project["license"], project["license-files"]) == ("Apache-2.0", ["LICENSE"])


def test_the_citation_is_of_this_version_and_under_this_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["cff-version"], citation["version"], citation["license"]) == ("1.2.0", __version__, "Apache-2.0")
    assert citation["authors"] and citation["title"].startswith("rlhf_jax")


def test_the_versions_that_are_tested_are_the_ends_of_what_is_promised():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    makefile = dict(re.findall(r"^((?:OLD|NEW)EST_\w+) := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert project["requires-python"] == f">={makefile['OLDEST_PYTHON']}"
    pythons = [line.rpartition(" ")[2] for line in project["classifiers"] if "Python :: 3" in line]
    assert pythons == [makefile["OLDEST_PYTHON"], makefile["NEWEST_PYTHON"]]
    (bounds,) = [re.findall(r"\d+(?:\.\d+)+", line) for line in project["dependencies"] if re.match(r"jax\W", line)]
    assert makefile["OLDEST_JAX"] == bounds[0]
    pinned = re.findall(r"^jax==0\.(\d+)", (ROOT / "requirements-cpu.txt").read_text(), re.MULTILINE)
    assert max(map(int, pinned)) == int(bounds[1].partition(".")[2]) - 1


def test_the_workflow_calls_what_people_call():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    commands = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in jobs.items()}
    assert commands == {"check": [".ci/run"], "nightly": ["make nightly"]}
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    used = [step["uses"] for job in jobs.values() for step in job["steps"] if "uses" in step]
    assert used and all(re.fullmatch(r"actions/[\w-]+@v\d+\.\d+\.\d+", action) for action in used)


def test_the_hooks_run_what_ci_runs():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["entry"] for hook in repository["hooks"]] == ["make lint"]
    assert re.search(r"^test: lint\b", (ROOT / "Makefile").read_text(), re.MULTILINE)
