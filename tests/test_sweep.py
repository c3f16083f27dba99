"""Sweeps: the points, the stages that they share, resumption, processes, and the table."""

import json
import shlex
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from rlhf_jax import experiment, load_config, sweep
from rlhf_jax.main import main
from tests.support.commands import fails, succeeds
from tests.support.own_data import ROOT

FILE = """
from rlhf_jax import load_config

def get_config(arg=""):
    config = load_config("preferences:smoke").unlock()
    config.stages = ("sft", "reward_model", "dpo", "evaluate")
    config.evaluate.policies = ("dpo",)
    return config

def get_sweep(arg=""):
    return [{"dpo.beta": beta, "dpo.loss.losses": ("ipo",)} for beta in (0.1, 0.5)]
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "mine.py").write_text(FILE)
    return tmp_path / "mine.py"


def test_points_are_named_after_their_values():
    assert sweep.names_of([{"ppo.kl_coef": 0.1, "dpo.beta": 1}]) == ["kl_coef=0.1,beta=1"]
    fields = {"ppo.optimizer.learning_rate": 1e-4, "dpo.optimizer.learning_rate": 0.1}
    assert sweep.names_of([fields]) == ["ppo.optimizer.learning_rate=0.0001,dpo.optimizer.learning_rate=0.1"]
    assert sweep.names_of([{"sft.model.init": "../a b"}]) == ["init=.._a_b"]
    long = sweep.names_of([{"a": "x" * 200}, {"a": "x" * 201}])
    assert len(set(long)) == 2 and max(map(len, long)) < 100


def test_stages_are_shared_that_no_point_changes(file):
    config = f"{file}"
    found = sweep.points(config, load_config(config), [])
    parsed = [experiment.parse(point.config) for point in found]
    assert sweep.shared_stages(parsed) == ["sft", "reward_model"]
    assert sweep.shared_stages(parsed[:1]) == [], "one point shares nothing"
    seeds = [experiment.parse(point.config) for point in found]
    other = sweep.points(config, load_config(config, {"seed": 1}), [])
    assert sweep.shared_stages([seeds[0], experiment.parse(other[0].config)]) == [], "another seed, another SFT"


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("[]", "should return a list of dicts"),
        ("{'dpo.beta': 1}", "should return a list of dicts"),
        ("[{'dpo.beta': 0.1}, {'dpo.beta': 0.1}]", "returned the point beta=0.1 twice"),
        ("[{'dpo.beta': -1.0}]", "config.dpo.beta = -1.0 must be above 0"),
        ("[{'dpo.bta': 1.0}]", "Did you mean 'beta'?"),
    ],
)
def test_points_are_checked_before_anything_runs(returned, message, file, capsys):
    file.write_text(FILE.partition("def get_sweep")[0] + f"def get_sweep(arg=''):\n    return {returned}\n")
    workdir = file.parent / "runs"
    assert message in fails(capsys, "sweep", f"--config={file}", f"--workdir={workdir}")
    assert not workdir.exists()


def test_a_config_without_a_sweep(capsys, tmp_path):
    found = fails(capsys, "sweep", "--config=quickstart:smoke", f"--workdir={tmp_path}")
    assert "there is no function get_sweep" in found


def test_a_dry_run_lists_points_and_shared_stages(file, capsys):
    found = succeeds(capsys, "sweep", f"--config={file}", f"--workdir={file.parent / 'runs'}", "--dry-run")
    assert found.splitlines()[:2] == ["beta=0.1,losses=_ipo_", "beta=0.5,losses=_ipo_"]
    assert "2 points. Shared stages: sft, reward_model." in found
    assert not (file.parent / "runs").exists()


def test_the_script_of_a_slurm_array_has_a_task_for_each_point():
    commands = [["rlhf-jax", "sweep", f"--point=a b{number}"] for number in range(3)]
    script = sweep.slurm_script(commands, Path("runs"))
    assert "#SBATCH --array=0-2" in script
    for number, command in enumerate(commands):
        echoed = script.replace(f"{number}) rlhf-jax", f"{number}) printf '%s\\n' rlhf-jax")
        ran = subprocess.run(
            ["bash", "-c", echoed], env={"SLURM_ARRAY_TASK_ID": str(number)}, capture_output=True, text=True, check=True
        )
        assert ran.stdout.splitlines() == command


@pytest.mark.nightly
def test_a_sweep_runs_resumes_and_tabulates(file, capsys):
    workdir = file.parent / "runs"
    flags = [f"--config={file}", f"--workdir={workdir}", "--config.seed=3"]
    assert main(["sweep", *flags]) == 0
    table = pd.read_csv(workdir / "sweep.csv")
    assert set(table["dpo.beta"]) == {0.1, 0.5} and set(table["method"]) == {"sft", "best_of_4", "dpo"}
    complete = {path.relative_to(workdir).parent.as_posix() for path in workdir.rglob("complete.json")}
    points = ("beta=0.1,losses=_ipo_", "beta=0.5,losses=_ipo_")
    shared = {f"shared/{stage}" for stage in ("sft", "reward_model")}
    assert complete == shared | {f"{point}/{stage}" for point in points for stage in ("dpo", "evaluate")}
    assert json.loads((workdir / points[0] / "point.json").read_text()) == {"dpo.beta": 0.1, "dpo.loss.losses": ["ipo"]}
    capsys.readouterr()
    file.write_text(FILE.replace("(0.1, 0.5)", "(0.1, 0.5, 0.9)"))
    assert main(["sweep", *flags, "--processes=2"]) == 0
    printed = capsys.readouterr().out
    assert "beta=0.9,losses=_ipo_: complete" in printed
    assert "nothing to do" in (workdir / points[0] / "log.txt").read_text()
    assert set(pd.read_csv(workdir / "sweep.csv")["dpo.beta"]) == {0.1, 0.5, 0.9}


@pytest.mark.nightly
def test_a_point_that_fails_in_a_process_is_named(file, capsys):
    file.write_text(FILE.replace('("ipo",)} for beta in (0.1, 0.5)', '(f"{__file__}:loss",)} for beta in (0.1, 0.5)'))
    with file.open("a") as more:
        more.write("def loss(chosen_logps, *, beta):\n    return chosen_logps / 0 * float('nan')\n")
    flags = [f"--config={file}", f"--workdir={file.parent / 'runs'}", "--processes=2"]
    assert "2 points failed" in fails(capsys, "sweep", *flags)


def test_the_command_of_a_point_is_that_of_the_sweep(file, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "run_shared", lambda *_: None)
    flags = [f"--config={file}", f"--workdir={file.parent / 'runs'}", "--config.dpo.epochs=1.0"]
    script = succeeds(capsys, "sweep", *flags, "--slurm")
    (line,) = [line for line in script.splitlines() if line.startswith("  0)")]
    words = shlex.split(line.removesuffix(";;"))
    assert words[2:] == ["-m", "rlhf_jax", "sweep", *flags, "--point=beta=0.1,losses=_ipo_"]


def test_the_example_of_the_docs_is_a_sweep(tmp_path, capsys):
    text = (ROOT / "docs" / "how-to" / "sweeps.md").read_text()
    (tmp_path / "kl.py").write_text(text.partition('```python title="kl.py"\n')[2].partition("```")[0])
    flags = [f"--config={tmp_path / 'kl.py'}:smoke", f"--workdir={tmp_path / 'runs'}", "--dry-run"]
    found = succeeds(capsys, "sweep", *flags)
    assert "kl_coef=0.05,learning_rate=0.0001" in found
    assert "6 points. Shared stages: gold, sft, preferences, reward_model, best_of_n, dpo_1, dpo_01." in found
