"""The wheel, which is what `pip install git+URL` installs: its contents, and a run from it in an empty directory."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    directory = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", directory, ROOT], check=True)
    (file,) = directory.glob("*.whl")
    return file


@pytest.mark.nightly
def test_the_wheel_has_the_package_the_experiments_their_data_and_the_licence(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    listed = subprocess.run(["git", "ls-files", "rlhf_jax", "experiments"], cwd=ROOT, capture_output=True, text=True)
    files = {name if name.startswith("rlhf_jax/") else f"rlhf_jax/{name}" for name in listed.stdout.split()}
    assert "rlhf_jax/experiments/smoke/reviews_train.jsonl" in files <= names
    others = {name.split("/", 1)[1] for name in names if ".dist-info/" in name}
    assert others == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"rlhf_jax"}


@pytest.mark.nightly
def test_an_experiment_of_the_wheel_runs_where_there_is_no_checkout(wheel, tmp_path):
    """In an environment of its own with the wheel, and this environment's other packages behind it."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["RLHF_JAX_DATA"] = str(tmp_path / "nothing_fetched")
    (tmp_path / "elsewhere").mkdir()

    def run(program: Path | str, *arguments: str | Path) -> str:
        place = tmp_path / "elsewhere"
        done = subprocess.run([program, *arguments], cwd=place, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(sys.executable, "-m", "venv", tmp_path / "venv")
    programs = tmp_path / "venv" / "bin"
    run(programs / "python", "-m", "pip", "install", "--no-deps", wheel)
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (others,) = Path(sys.prefix).glob("lib/python*/site-packages")
    (packages / "behind.pth").write_text(f"{others}\n")
    imported = run(programs / "python", "-c", "import rlhf_jax; print(rlhf_jax.__file__)").strip()
    assert imported == str(packages / "rlhf_jax" / "__init__.py")
    run(programs / "rlhf-jax", "--config=rlhf_jax.experiments.preferences:smoke", "--workdir=x")
    assert (tmp_path / "elsewhere" / "x" / "report.html").exists()
    assert not (tmp_path / "nothing_fetched").exists()
