"""The names that `import rlhf_jax` gives: which they are, what is said of them, and experiments run from Python."""

import ast
import inspect
import re
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pandas as pd
import pytest

import rlhf_jax
from rlhf_jax import experiment
from rlhf_jax.commands import parse_run_flags
from rlhf_jax.main import main
from tests.support import checkpoints
from tests.support.own_data import ROOT

FUNCTIONS = {
    "best_of_n": "policy reward rows n soft seed batch_size options",
    "draw": "run",
    "encode_preferences": "rows tokenizer max_prompt_tokens max_response_tokens",
    "evaluate": "policies prompts judge seed batch_size options",
    "export": "model directory",
    "fetch": "name",
    "load_config": "source overrides",
    "load_policy": "source dtype family",
    "load_reward_model": "source dtype family",
    "load_rows": "source",
    "logprobs": "policy rows eos batch_size",
    "run": "config workdir stage inputs",
    "sample": "policy prompts n seed reward reference options",
    "score": "reward rows batch_size",
    "sequence_logprobs": "logprobs mask",
}
CLASSES = {"Policy", "RewardModel", "RlhfError", "Run"}
MODULES = {"advantages", "kl", "policy_losses", "preference_losses", "reward_losses", "unpaired_losses"}
RUN_ELSEWHERE = {"run", "fetch", "draw", "sequence_logprobs"}
"""Functions whose examples need minutes or a download, or that have none."""


def example(name: str) -> str:
    """The indented block of a function's docstring."""
    documented = inspect.getdoc(getattr(rlhf_jax, name)) or ""
    found = re.search(r"\n\n((?:    .+\n)+)\n", documented)
    assert found, f"{name} has no example"
    return textwrap.dedent(found[1])


def test_the_names_are_these():
    assert set(rlhf_jax.__all__) == {"__version__", *FUNCTIONS, *CLASSES, *MODULES}
    assert dir(rlhf_jax) == sorted(rlhf_jax.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        rlhf_jax.nothing  # noqa: B018
    assert all(isinstance(getattr(rlhf_jax, name), type) for name in CLASSES)
    assert all(isinstance(getattr(rlhf_jax, name), types.ModuleType) for name in MODULES)
    told = rlhf_jax.__doc__ or ""
    assert all(f"`{name}`" in told for name in rlhf_jax.__all__ if name != "__version__")


def test_type_checkers_are_told_the_same():
    tree = ast.parse(Path(rlhf_jax.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    named = {}
    for statement in block.body:
        assert isinstance(statement, ast.ImportFrom)
        (alias,) = statement.names
        named[alias.asname] = (statement.module, alias.name)
    assert named == {name: (home, name) for home, names in rlhf_jax.HOMES.items() for name in names}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_and_error_is_documented(name):
    function = getattr(rlhf_jax, name)
    documented, signature = inspect.getdoc(function) or "", inspect.signature(function)
    assert list(signature.parameters) == FUNCTIONS[name].split()
    assert function.__module__ in rlhf_jax.HOMES
    if name in ("draw", "sequence_logprobs"):  # one line says all
        return
    for parameter in signature.parameters:
        assert re.search(rf"\b{parameter}\b", documented), parameter
    assert signature.return_annotation is not inspect.Parameter.empty
    assert "Raises" in documented or name == "encode_preferences"


def test_importing_the_package_imports_nothing_heavy():
    code = "import rlhf_jax, sys; print(sorted({'jax', 'numpy', 'pandas', 'flax', 'transformers'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """The variables of the examples, and the directories whose names stand in them."""
    directory = tmp_path_factory.mktemp("examples")
    model = checkpoints.policy(directory / "smollm2")
    checkpoints.reward_model(directory / "path" / "to" / "classifier")
    pairs = directory / "runs" / "smoke" / "preferences" / "preferences.jsonl"
    pairs.parent.mkdir(parents=True)
    pairs.write_text('{"prompt": "The film", "chosen": " was good.", "rejected": " was bad."}\n')
    policy = rlhf_jax.load_policy(model)
    return directory, {name: getattr(rlhf_jax, name) for name in FUNCTIONS} | {
        "policy": policy,
        "start": policy,
        "reward_model": rlhf_jax.load_reward_model(directory / "path" / "to" / "classifier"),
        "rows": [{"prompt": "It", "completion": " is.", "chosen": " is.", "rejected": " was."}],
        "prompts": ["The film", "It"],
    }


@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - RUN_ELSEWHERE))
def test_the_examples_of_docstrings_run(name, known, monkeypatch):
    directory, variables = known
    monkeypatch.chdir(directory)
    code = example(name).replace('"smollm2"', f'"{directory / "smollm2"}"')
    exec(compile(code, name, "exec"), dict(variables))


@pytest.mark.parametrize("name", sorted({"run", "fetch"}))
def test_the_other_examples_are_python(name):
    ast.parse(example(name))


def test_overrides_are_those_of_the_command_line():
    flags = ["--config.ppo.kl_coef=0.25", "--config.dpo.loss.losses=('ipo','sft')", "--config.seeds=3"]
    by_flags, _ = parse_run_flags(["--config=preferences:smoke", "--workdir=x", *flags])
    for values in (
        {"ppo.kl_coef": 0.25, "dpo.loss.losses": ("ipo", "sft"), "seeds": 3},
        {"ppo.kl_coef": "0.25", "dpo.loss": {"losses": ("ipo", "sft")}, "seeds": "3"},
    ):
        by_names = rlhf_jax.load_config("preferences:smoke", values)
        assert experiment.parse(by_names) == experiment.parse(by_flags)
    assert experiment.parse(by_flags) != experiment.parse(rlhf_jax.load_config("preferences:smoke"))
    with pytest.raises(rlhf_jax.RlhfError, match=r"config\.ppo\.kl_cof .* Did you mean 'kl_coef'"):
        rlhf_jax.run(rlhf_jax.load_config("preferences:smoke", {"ppo.kl_cof": 1.0}), "x")


def test_more_seeds_change_only_the_stages_that_train_several_seeds(tmp_path):
    one, four = (experiment.parse(rlhf_jax.load_config("quickstart:smoke", {"seeds": seeds})) for seeds in (1, 4))
    same = {name for name in one.stages if one.identity(name, str) == four.identity(name, str)}
    assert {"sft", "preferences", "reward_model", "best_of_n", "evaluate"} <= same
    assert {one.stages[name].kind for name in one.stages.keys() - same} == {"dpo", "ppo"}


def test_python_and_the_command_line_run_the_same_experiment(tmp_path, capsys):
    config = rlhf_jax.load_config("preferences:smoke", {"sft.epochs": 0.5})
    run = rlhf_jax.run(config, tmp_path / "run", stage="sft")
    assert run.is_complete("sft") and isinstance(run.metrics("sft"), pd.DataFrame)
    assert f"Stage sft: {tmp_path / 'run' / 'sft'}" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    flags = [f"--workdir={tmp_path / 'run'}", "--stage=sft"]
    assert main(["--config=preferences:smoke", "--config.sft.epochs=0.5", *flags]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(rlhf_jax.RlhfError, match="was made from another config"):
        rlhf_jax.run("preferences:smoke", tmp_path / "run", stage="sft")
    elsewhere = rlhf_jax.run(config, tmp_path / "new", stage="sft", inputs=tmp_path / "run")
    assert elsewhere.directory("sft") == tmp_path / "run" / "sft"
