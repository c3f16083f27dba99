"""Provenance in a stage's summary, compared with git, the installed packages and the machine."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import jax
import pytest

import rlhf_jax
from rlhf_jax.runtime import provenance
from rlhf_jax.runtime.files import read_json, read_rows, write_json
from rlhf_jax.runtime.workdir import Identity
from tests.support import xla_flags
from tests.support.commands import run_without_figures
from tests.support.own_data import PREFERENCES, files

ROOT = Path(rlhf_jax.__file__).parents[1]
ASK = "import json; from rlhf_jax.runtime import provenance; print(json.dumps(provenance.machine()))"


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
    command = ["git", "-C", str(directory), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def machine(command: tuple[str, ...] = (), **environment: str) -> dict:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", **environment}
    done = subprocess.run([*command, sys.executable, "-c", ASK], env=variables, check=True, capture_output=True)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three stages, of which the last reads the others."""
    directory = tmp_path_factory.mktemp("run")
    flags = ["--config.stages=('sft','reward_model','ppo')", "--config.seed=3", "--config.ppo.trim_padding=False"]
    run_without_figures(PREFERENCES, f"--workdir={directory / 'run'}", *files(directory), *flags)
    return directory


def summary(run: Path, stage: str) -> dict:
    return read_json(run / "run" / stage / "summary.json")["provenance"]


def metrics(run: Path, stage: str) -> list[dict]:
    return read_rows(run / "run" / stage / "metrics.jsonl")


@pytest.mark.nightly
def test_a_summary_names_the_commit_the_packages_and_the_machine(run):
    found = summary(run, "ppo")
    assert found["source"]["version"] == rlhf_jax.__version__
    assert found["source"]["commit"] == git(ROOT, "rev-parse", "HEAD")
    changed = git(ROOT, "status", "--porcelain", "--untracked-files=no") or git(
        ROOT, "status", "--porcelain", "rlhf_jax"
    )
    assert found["source"]["clean"] is (changed == "")
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers", "tokenizers"):
        assert found["packages"][name] == importlib.metadata.version(name)
    assert found["machine"]["devices"] == [device.device_kind for device in jax.devices()]
    assert found["machine"]["threads"] == len(os.sched_getaffinity(0))
    assert set(xla_flags.XLA_FLAGS.split()) <= set(found["machine"]["xla_flags"])
    assert found["earlier"] == []


@pytest.mark.nightly
def test_a_summary_names_seeds_data_inputs_and_the_batch_of_an_update(run):
    ppo, sft = summary(run, "ppo"), summary(run, "sft")
    assert (sft["seeds"], ppo["seeds"]) == ([3], [3])
    for split in ("train", "eval"):
        assert ppo["sha256"][split] == sha256((run / f"{split}.jsonl").read_bytes()).hexdigest()
    assert ppo["inputs"] == {name: summary(run, name)["config"] for name in ("sft", "reward_model")}
    config = read_json(run / "run" / "ppo" / "config.json")["section"]
    rows = metrics(run, "ppo")
    update = config["batch_size"] // config["minibatches"]
    assert ppo["batch"]["rows"] == update and ppo["batch"]["unit"] == "responses"
    assert ppo["batch"]["tokens"] == pytest.approx(
        sum(row["num_tokens"] for row in rows) / len(rows) / config["minibatches"]
    )
    assert sft["batch"]["rows"] == read_json(run / "run" / "sft" / "config.json")["section"]["batch_size"]
    trained = [row["num_tokens"] for row in metrics(run, "sft")]
    assert sft["batch"]["tokens"] == pytest.approx(sum(trained) / len(trained))
    whole = provenance.effective_batch(rows=32, unit="pairs", micro_batch=12, devices=2, tokens=[10, 20])
    assert whole == {"rows": 32, "unit": "pairs", "micro_batches": 3, "devices": 2, "tokens": 15}


def test_the_features_are_those_that_xla_compiles_for():
    whole, older = machine(), machine(XLA_FLAGS="--xla_cpu_max_isa=AVX2")
    host = set(re.search(r"^(?:flags|Features)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split())  # type: ignore[index]
    for feature in ("avx2", "fma", "avx512f", "avx512bw"):
        assert (feature in whole["cpu_target"]["features"]) == (feature in host), feature
    assert not [name for name in older["cpu_target"]["features"] if name.startswith(("avx512", "amx"))]
    assert ("avx2" in older["cpu_target"]["features"]) == ("avx2" in host)
    assert older["xla_flags"] == ["--xla_cpu_max_isa=AVX2"]


def test_threads_are_those_that_the_process_may_use():
    first = min(os.sched_getaffinity(0))
    assert machine(("taskset", "-c", str(first)))["threads"] == 1


def test_features_are_read_by_their_length():
    target = b"\x12\x03zn4\x1a\x0d+avx2,-amx-x,z\x05hello"
    assert provenance.parse_cpu_target(b"x86\x12\x08" + target) == {"name": "zn4", "features": ["avx2"]}
    assert provenance.parse_cpu_target(b"nothing of the kind") is None
    own = provenance.cpu_target()
    assert own is not None and all(re.fullmatch(r"[a-z0-9.\-_]+", name) for name in own["features"])
    assert jax.devices()[0].client.platform == "cpu"


@pytest.fixture
def checkout(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (tmp_path / "notes.txt").write_text("")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


def test_a_tree_is_clean_until_a_tracked_file_or_the_package_changes(checkout):
    package = checkout / "package"
    found = provenance.source(package)
    assert (found["origin"], found["commit"]) == ("git checkout", git(checkout, "rev-parse", "HEAD"))
    assert (found["clean"], found["changed"]) == (True, [])
    (checkout / "untracked.txt").write_text("a note of mine")
    assert provenance.source(package)["clean"]
    (package / "loss.py").write_text("")
    (checkout / "notes.txt").write_text("changed")
    assert provenance.source(package)["changed"] == ["notes.txt", "package/loss.py"]
    assert not provenance.source(package)["clean"]


def test_an_installed_package_has_a_version_and_no_commit(checkout, tmp_path_factory, monkeypatch):
    inside = checkout / ".venv" / "package"  # an environment within a checkout is none of its files
    inside.mkdir(parents=True)
    outside = tmp_path_factory.mktemp("site-packages")
    for package in (inside, outside):
        (package / "__init__.py").write_text("")
        found = provenance.source(package)
        assert (found["origin"], found["commit"], found["clean"]) == ("installed package", None, None)
        assert found["version"] == rlhf_jax.__version__
    monkeypatch.setenv("PATH", "")
    assert provenance.source(checkout / "package")["commit"] is None


def test_a_stage_that_another_machine_went_on_with_says_so(tmp_path):
    identity = Identity({"kind": "sft"}, {"data_sha256": {}}, {})
    (tmp_path / "config.json").write_text("{}")
    places = [{"machine": machine, "date": date} for machine, date in (("a", 1), ("b", 2), ("a", 3), ("c", 4))]
    provenance.begin(tmp_path, places[0])
    provenance.begin(tmp_path, places[1])  # the first one failed before it had written anything
    assert read_json(tmp_path / provenance.ENVIRONMENTS) == places[1:2]
    write_json(tmp_path / "metrics.jsonl", {})
    for place in (places[1], *places[2:]):
        provenance.begin(tmp_path, place)
    found = provenance.record(tmp_path, identity, [0], None)
    assert found["machine"] == "c" and "batch" not in found
    assert [place["machine"] for place in found["earlier"]] == ["b", "a"]
