"""Every command and snippet of the README, run: as it stands where that takes seconds, else in its smoke form.

What is put in the place of something else: a tiny random model for `smollm2` (98 MB from a package index; the real one
is run by tests/parity/test_smollm2.py), a tiny reward model for DIR, and an experiment's `smoke` variant for the whole.
Not run: `pip install` and `make setup`, which install gigabytes; of make's targets it is seen that they are there.
"""

import ast
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from rlhf_jax import experiment
from rlhf_jax.commands import parse_run_flags
from rlhf_jax.config import functions
from rlhf_jax.main import main
from rlhf_jax.stages.kinds import find_kind
from tests.support import checkpoints
from tests.support.commands import reads, succeeds
from tests.support.own_data import ROOT, files

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PROGRAM = ".venv/bin/rlhf-jax"


def commands() -> list[list[str]]:
    """The words of each command of the README's shell blocks, without comments."""
    lines = "\n".join(body.replace("\\\n", " ") for language, body in BLOCKS if language == "bash").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def group(words: list[str]) -> str:
    """The test that runs a command."""
    line = " ".join(words)
    if words[0] == "make":
        return "quickstart" if words[1] == "quickstart" else "make"
    if words[:2] == ["pip", "install"]:
        return "pip"
    for name, sign in (
        ("smoke", "runs/smoke"),
        ("quickstart", "runs/quickstart"),
        ("own", "runs/mine"),
        ("chats", "runs/chats"),
    ):
        if sign in line:
            return name
    if words[1] == "fields":
        return "fields"
    return "verbs" if "--model=smollm2" in line or words[1] == "score" else "none"


COMMANDS = commands()
FLAGS = [flag for found in re.findall(r"`(--config\.[^`]+)`", README) for flag in shlex.split(found)]
"""Flags that stand in the text, beside those of the commands."""


def of(name: str) -> list[list[str]]:
    return [words for words in COMMANDS if group(words) == name]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    return checkpoints.policy(directory / "policy"), checkpoints.reward_model(directory / "judge")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The reader's directory: experiments as in the repository, and files of their own."""
    directory = tmp_path_factory.mktemp("reader")
    (directory / "experiments").symlink_to(ROOT / "experiments")
    files(directory)
    (directory / "prompts.jsonl").write_text('{"prompt": "The film"}\n{"prompt": "It"}\n')
    (directory / "rows.jsonl").write_text('{"prompt": "The film", "completion": " was good."}\n')
    (directory / "rewards.py").write_text("def brevity(prompts, completions, **_):\n    return [1.0] * len(prompts)\n")
    return directory


def call(words: list[str], models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, typed: str = "") -> list[str]:
    """Runs a command of the package's program with its redirections; returns the words that were run."""
    assert words[0] in (PROGRAM, "rlhf-jax")
    policy, judge = map(str, models)
    replaced = []
    for word in words[1:]:
        word = re.sub(r"^--out=smollm2\S+", "--out=exported", word).replace("init=smollm2", f"init={policy},smoke")
        word = word.replace("=smollm2", f"={policy}").replace("=DIR", f"={judge}")
        replaced.append(re.sub(r"(quickstart|preferences)\.py$", r"\1.py:smoke", word))
    given = typed
    if "<" in replaced:
        given = Path(replaced[replaced.index("<") + 1]).read_text()
    reads(monkeypatch, given)
    arguments = replaced[: min([replaced.index(sign) for sign in "<>" if sign in replaced], default=None)]
    assert main(arguments) == 0, arguments
    return arguments


def test_every_command_has_a_test():
    assert len(COMMANDS) > 15
    assert not of("none"), "say in `group` which test runs it"
    assert {language for language, _ in BLOCKS} == {"bash", "python", ""}, "the others are output and the map"


@pytest.mark.parametrize("words", of("make") + [["make", name] for name in ("test", "parity")], ids=" ".join)
def test_make_has_the_targets(words):
    shown = subprocess.run([words[0], "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert "No rule to make target" not in shown.stderr
    named = re.findall(r"requirements-\w+\.txt", shown.stdout)
    assert "DEVICE=tpu" not in words or "requirements-tpu.txt" in named


@pytest.mark.parametrize("words", of("verbs"), ids=" ".join)
def test_verbs(words, models, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    room = [] if words[1] in ("logprobs", "score", "export") else ["--max-new-tokens=4"]
    redirected = min([words.index(sign) for sign in "<>" if sign in words], default=len(words))
    call([*words[:redirected], *room, *words[redirected:]], models, monkeypatch, typed="The film\n/exit\n")
    printed = capsys.readouterr().out
    verb = words[1]
    if verb == "best-of-n":
        rows = [json.loads(line) for line in (place / "best.jsonl").read_text().splitlines()]
        assert [len(row["scores"]) for row in rows] == [16, 16]
    elif verb == "logprobs":
        row = json.loads(printed)
        assert row["logprob"] == pytest.approx(sum(row["token_logprobs"]))
    elif verb == "score":
        assert isinstance(json.loads(printed)["score"], float)
    elif verb == "export":
        assert (place / "exported" / "model.safetensors").exists()
    elif verb == "sample":
        assert printed.strip()
    else:
        assert "tokens" in printed


@pytest.mark.parametrize("words", of("fields"), ids=" ".join)
def test_fields(words, models, monkeypatch, capsys):
    call(words, models, monkeypatch)
    assert "\nclip_ratio *   number > 0\n" in capsys.readouterr().out


def test_kinds_in_the_text_are_kinds():
    named = re.findall(r"`\"kind\": \"(\S+?)\"`", README)
    assert named
    for name in named:
        place, _, kind = name.rpartition(":")
        assert find_kind(f"{ROOT}/{place}:{kind}", "kind").summary


def test_best_of_n_by_a_function(models, place, monkeypatch, capsys):
    assert "--reward=rewards.py:brevity" in README
    monkeypatch.chdir(place)
    reads(monkeypatch, (place / "prompts.jsonl").read_text())
    flags = [f"--model={models[0]}", "--reward=rewards.py:brevity", "--n=2", "--max-new-tokens=4"]
    assert all(json.loads(line)["score"] == 1 for line in succeeds(capsys, "best-of-n", *flags).splitlines())


def test_flags_within_the_text_are_keys_of_the_configs(models, place, monkeypatch):
    monkeypatch.chdir(place)
    assert len(FLAGS) >= 8
    for flag in FLAGS:
        arguments = ["--config=experiments/preferences.py:smoke", "--workdir=x", *files(place)]
        config, _ = parse_run_flags([*arguments, flag.replace("=DIR", f"={models[1]}")])
        experiment.parse(config)


def test_configs_within_the_text_can_be_loaded(place, monkeypatch):
    monkeypatch.chdir(place)
    named = re.findall(r"--config=([^\s`]+)", README)
    assert len(named) >= 5
    for argument in named:
        data = files(place) if "preferences" in argument else []
        config, _ = parse_run_flags([f"--config={argument}", "--workdir=x", *data])
        experiment.parse(config)


REWARDS = re.findall(r"`\"reward_model\": (\{.*?\})`", README, re.DOTALL)


@pytest.mark.parametrize(
    ("snippet", "function"),
    [*zip(REWARDS, ["rlhf_jax.rewards.exact:exact_answer", "rewards.py:brevity"], strict=True)],
)
def test_a_reward_in_python_is_a_section_of_a_config_file(snippet, function, place, monkeypatch):
    monkeypatch.chdir(place)
    arguments = ["--config=experiments/preferences.py:smoke", "--workdir=x", *files(place)]
    config = parse_run_flags(arguments)[0].unlock()
    ppo = config.ppo.to_dict() | {"reward_model": ast.literal_eval(snippet)}
    del config.ppo
    config.ppo = ppo
    assert functions(experiment.parse(config).stages["ppo"]) == (function,)


@pytest.mark.nightly
def test_a_smoke_variant_downloads_nothing(models, place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("RLHF_JAX_DATA", str(place / "data"))
    (words,) = of("smoke")
    call(words, models, monkeypatch)
    assert (place / "runs" / "smoke" / "report.html").exists() and not (place / "data" / "movie_reviews").exists()


@pytest.mark.nightly
def test_own_preferences_with_fields_set_in_the_text_and_the_python_snippet(models, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    (words,) = of("own")
    flags = [flag for flag in FLAGS if re.match(r"--config\.(sft|dpo|ppo)\.", flag) and "=DIR" not in flag]
    assert len(flags) >= 6
    flags += ["--config.data.max_prompt_tokens=32"]  # as much as the snippet's prompt needs
    call([*words, *flags], models, monkeypatch)
    (snippet,) = [body for language, body in BLOCKS if language == "python"]
    known: dict[str, Any] = {}
    values = []
    for statement in ast.parse(snippet).body:
        value = isinstance(statement, ast.Expr)
        code = compile(ast.unparse(statement), "README.md", "eval" if value else "exec")
        values.append(eval(code, known) if value else exec(code, known))
    tables = [value for value in values if isinstance(value, pd.DataFrame)]
    assert len(tables) == 4 and all(len(table) for table in tables)
    assert (place / "exported" / "model.safetensors").exists()


@pytest.mark.nightly
def test_a_model_that_others_trained(models, place, monkeypatch):
    monkeypatch.chdir(place)
    (words,) = of("chats")
    call(words, models, monkeypatch)
    assert (place / "runs" / "chats" / "report.html").exists()


@pytest.mark.nightly
def test_the_quickstart_and_what_is_said_of_it(models, place, movie_reviews, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setenv("RLHF_JAX_DATA", str(movie_reviews))
    made, *others = of("quickstart")
    assert made == ["make", "quickstart"]
    recipe = subprocess.run(["make", "-n", "quickstart"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = [line.split() for line in recipe.splitlines() if "rlhf" in line and "pip" not in line]
    fetch, run = lines[-2:]
    assert main(fetch[1:]) == 0
    flags = [re.sub(r"quickstart\.py$", "quickstart.py:smoke", word) for word in run if word.startswith("--")]
    assert main(flags) == 0
    for name in ("report.html", "results.csv", "differences.csv", "figures/frontier.png"):
        assert (place / "runs" / "quickstart" / name).exists(), name
    capsys.readouterr()
    assert main(flags) == 0 and "nothing to do" in capsys.readouterr().out
    for words in others:
        call(words, models, monkeypatch, typed="the film\n/score\n/exit\n")
    again = {path.parent.name for path in (place / "runs" / "gentle").glob("*/complete.json")}
    assert again == {"ppo", "evaluate"}
    seeds = pd.read_csv(place / "runs" / "seeds" / "results.csv").groupby("method")["seed"].nunique()
    assert seeds["ppo"] == seeds["dpo_1"] == 4
