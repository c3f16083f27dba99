"""Every command and snippet of the README and of docs/, run or parsed.

Commands of the README and of the tutorials run as they stand where that takes seconds, else in their smoke form; the
flags of all others are parsed. Blocks of Python run in the order of their page; a block with a title is a file of that
name.

What is put in the place of something else: a tiny random model for `smollm2` (98 MB from a package index; the real one
is run by tests/parity/test_smollm2.py) and for MODEL, a tiny reward model for DIR, and an experiment's `smoke` variant
for the whole. Not run: `pip install` and `make setup`, which install gigabytes; of make's targets it is seen that they
are there.
"""

import argparse
import ast
import importlib
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest

from experiments.benchmarks import training
from rlhf_jax import experiment
from rlhf_jax.cli.parser import Parser
from rlhf_jax.commands import parse_run_flags
from rlhf_jax.config import functions
from rlhf_jax.main import VERBS, main
from rlhf_jax.stages.kinds import find_kind
from tests.support import checkpoints
from tests.support.commands import reads, succeeds
from tests.support.own_data import ROOT, files

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in DOCUMENTS}
TEXT = "\n".join(TEXTS.values())


class Block(NamedTuple):
    """A fenced block of a document."""

    document: str
    language: str
    title: str
    body: str


BLOCKS = [
    Block(document, *found)
    for document, text in TEXTS.items()
    for found in re.findall(r"^```(\w*)(?: title=\"(\S+)\")?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
]
NEEDS_A_RUN = {"docs/how-to/python.md": 0, "docs/how-to/debug.md": 0}
"""Blocks of Python that read the run of a command, by document and place; nightly tests run them."""


def commands() -> list[list[str]]:
    """The words of each command of the shell blocks, without comments and variables of the environment."""
    lines = "\n".join(block.body.replace("\\\n", " ") for block in BLOCKS if block.language == "bash").splitlines()
    found = []
    for line in lines:
        words = [word for word in shlex.split(line, comments=True) if not re.match(r"[A-Z_]+=", word)]
        if words and words[0].endswith("rlhf-jax"):
            words[0] = "rlhf-jax"
        found += [words] if words and words not in found else []
    return found


def group(words: list[str]) -> str:
    """The test that runs a command."""
    line = " ".join(words)
    if words[0] == "make":
        return "quickstart" if words[1] == "quickstart" else "make"
    if words[:2] == ["pip", "install"]:
        return "pip"
    if words[:2] == ["python", "-m"]:
        return "benchmark"
    for name, sign in (
        ("smoke", "--config=quickstart:smoke --workdir=runs/smoke"),
        ("quickstart", "runs/quickstart"),
        ("own", "--workdir=runs/mine --config.data.train=train.jsonl --config.data.eval=eval.jsonl"),
        ("own loss", "runs/own"),
        ("chats", "runs/chats"),
    ):
        if line.endswith(sign) or (sign in line and name in ("quickstart", "own loss", "chats")):
            return name
    if words[1] == "fields":
        return "fields"
    if "/shared/run" in line:
        return "machines"
    return "verbs" if "--model=smollm2" in line or words[1] == "score" else "parsed"


COMMANDS = commands()
FLAGS = [shlex.split(found) for found in dict.fromkeys(re.findall(r"`(--config\.[^`]+)`", TEXT))]
"""Flags that stand together in the text, beside those of the commands."""


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
    (directory / "examples").symlink_to(ROOT / "examples")
    for block in BLOCKS:
        if block.title:
            file = directory / block.title
            assert not file.exists() or file.read_text() == block.body, "two files of the same name"
            file.write_text(block.body)
    return directory


def call(words: list[str], models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, typed: str = "") -> list[str]:
    """Runs a command of the package's program with its redirections; returns the words that were run."""
    assert words[0] == "rlhf-jax"
    policy, judge = map(str, models)
    replaced = []
    for word in words[1:]:
        word = re.sub(r"^--out=smollm2\S+", "--out=exported", word).replace("init=smollm2", f"init={policy},smoke")
        word = word.replace("=smollm2", f"={policy}").replace("=DIR", f"={judge}")
        replaced.append(
            re.sub(r"(quickstart\.py|preferences\.py|=quickstart|=preferences|mine\.py)$", r"\1:smoke", word)
        )
    given = typed
    if "<" in replaced:
        given = Path(replaced[replaced.index("<") + 1]).read_text()
    reads(monkeypatch, given)
    arguments = replaced[: min([replaced.index(sign) for sign in "<>" if sign in replaced], default=None)]
    if "--out=exported" in arguments:
        shutil.rmtree("exported", ignore_errors=True)  # of another page
    assert main(arguments) == 0, arguments
    return arguments


def test_every_block_has_a_test():
    assert len(COMMANDS) > 30
    assert {block.language for block in BLOCKS} == {"bash", "python", "json", "text", ""}, "the others are output"
    for name in ("smoke", "own", "own loss", "chats"):
        assert len(of(name)) == 1, name


def test_examples_of_json_are_json():
    found = [line for block in BLOCKS if block.language == "json" for line in block.body.splitlines()]
    assert found and all(json.loads(line) for line in found)


class Parsed(Exception):
    """Raised in the place of a command, once its arguments are parsed."""


@pytest.mark.parametrize("words", of("benchmark"), ids=" ".join)
def test_the_arguments_of_the_benchmark_are_known(words, monkeypatch):
    monkeypatch.setattr(training, "trl_version", lambda python: "1.16.0")
    assert words[2] == training.__name__
    assert set(training.parse(words[3:]).kind) <= set(training.PASSES)


@pytest.mark.parametrize("words", of("parsed"), ids=" ".join)
def test_the_arguments_of_commands_are_known(words, models, place, monkeypatch):
    monkeypatch.chdir(place)
    assert words[0] == "rlhf-jax", "name a test in `group`"
    arguments = words[1:]
    arguments = arguments[: min([arguments.index(sign) for sign in "<>" if sign in arguments], default=None)]
    if arguments[0].startswith("--"):
        data = files(place) if "preferences" in arguments[0] else []
        experiment.parse(parse_run_flags([*data, *arguments])[0])
        return

    def parsed(self: Parser, given: list[str]) -> argparse.Namespace:
        raise Parsed(argparse.ArgumentParser.parse_args(self, given))

    monkeypatch.setattr(Parser, "parse_args", parsed)
    monkeypatch.setattr(Parser, "parse_known_args", argparse.ArgumentParser.parse_known_args)
    module, function = VERBS[arguments[0]].split(":")
    harmless = ["--dry-run"] if arguments[0] == "sweep" else []
    try:
        getattr(importlib.import_module(module), function)([*arguments[1:], *harmless])
    except Parsed:
        return
    assert arguments[0] in ("config", "sweep"), "they take the flags of any config"


def run_python(document: str, which: slice) -> list[Any]:
    """Run blocks of a document in one namespace; return the values of their expressions."""
    known: dict[str, Any] = {}
    values = []
    for block in [block for block in BLOCKS if block[:3] == (document, "python", "")][which]:
        for statement in ast.parse(block.body).body:
            value = isinstance(statement, ast.Expr)
            code = compile(ast.unparse(statement), document, "eval" if value else "exec")
            values.append(eval(code, known) if value else exec(code, known))
    return values


PYTHON = dict.fromkeys(block.document for block in BLOCKS if block.language == "python" and not block.title)
del PYTHON["docs/style.md"]  # an excerpt, whose names stand elsewhere


@pytest.mark.parametrize("document", PYTHON)
def test_blocks_of_python(document, place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    run_python(document, slice(1 + NEEDS_A_RUN.get(document, -1), None))


@pytest.mark.parametrize("words", of("make") + [["make", name] for name in ("test", "parity")], ids=" ".join)
def test_make_has_the_targets(words):
    shown = subprocess.run([words[0], "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert "No rule to make target" not in shown.stderr
    named = re.findall(r"requirements-\w+\.txt", shown.stdout)
    assert "DEVICE=tpu" not in words or "requirements-tpu.txt" in named


@pytest.mark.parametrize("words", of("machines"), ids=lambda words: words[0])
def test_commands_of_several_machines_have_known_flags_and_a_layout(words):
    inner = [word.removeprefix("--command=") for word in words if word.startswith("--command=")]
    words = shlex.split(inner[0]) if inner else words
    config, options = parse_run_flags(words[words.index("run") + 1 :])
    assert options.distributed or (options.coordinator, options.processes, options.process) == ("HOST:1234", 2, 0)
    assert experiment.parse(config).runtime.row_devices >= (1 if options.processes else 32)


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
def test_fields(words, models, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    call(words, models, monkeypatch)
    field = "\nclip_ratio *   number > 0\n" if words[2] == "ppo" else "\nmargin = 0.0   number >= 0\n"
    assert field in capsys.readouterr().out


def test_kinds_in_the_text_are_kinds():
    named = re.findall(r"`\"kind\": \"(\S+?)\"`", TEXT)
    assert named
    for name in named:
        place, _, kind = name.rpartition(":")
        assert find_kind(f"{ROOT}/{place}:{kind}", "kind").summary


def test_best_of_n_by_a_function(models, place, monkeypatch, capsys):
    assert "--reward=rewards.py:brevity" in TEXT
    monkeypatch.chdir(place)
    reads(monkeypatch, (place / "prompts.jsonl").read_text())
    flags = [f"--model={models[0]}", "--reward=rewards.py:brevity", "--n=2", "--max-new-tokens=4"]
    rows = [json.loads(line) for line in succeeds(capsys, "best-of-n", *flags).splitlines()]
    assert rows and all(row["score"] == max(row["scores"]) for row in rows)


def test_flags_within_the_text_are_keys_of_the_configs(models, place, monkeypatch):
    monkeypatch.chdir(place)
    assert len(FLAGS) >= 15
    for flags in FLAGS:
        arguments = ["--config=experiments/preferences.py:smoke", "--workdir=x", *files(place)]
        config, _ = parse_run_flags([*arguments, *(flag.replace("=DIR", f"={models[1]}") for flag in flags)])
        experiment.parse(config)


def test_configs_within_the_text_can_be_loaded(models, place, monkeypatch):
    monkeypatch.chdir(place)
    named = set(re.findall(r"--config=(\w[^\s`]*)", TEXT)) - {"FILE[:ARG]", "EXPERIMENT.py"}
    assert len(named) >= 8
    for argument in sorted(named):
        argument = argument.replace("MODEL", str(models[0]))
        data = files(place) if "preferences" in argument else []
        config, _ = parse_run_flags([f"--config={argument}", "--workdir=x", *data])
        experiment.parse(config)


REWARDS = re.findall(r"`\"reward_model\": (\{.*?\})`", TEXT, re.DOTALL)


@pytest.mark.parametrize(
    ("snippet", "function"),
    [*zip(REWARDS, ["rewards.py:brevity", "rlhf_jax.rewards.exact:exact_answer"], strict=True)],
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
    metrics = run_python("docs/how-to/debug.md", slice(1))[2]
    assert len(metrics) == 5 and list(metrics) == ["step", "objective/scores", "objective/kl"]


@pytest.mark.nightly
def test_own_preferences_and_the_functions_of_python(models, place, monkeypatch):
    monkeypatch.chdir(place)
    (words,) = of("own")
    flags = [
        flag for flags in FLAGS for flag in flags if re.match(r"--config\.(sft|dpo|ppo)\.", flag) and "=DIR" not in flag
    ]
    flags = [flag for flag in flags if ".py:" not in flag and "loss_weights" not in flag]
    assert len(flags) >= 6
    flags += ["--config.data.max_prompt_tokens=32"]  # as much as the snippet's prompt needs
    call([*words, *flags], models, monkeypatch)
    shutil.rmtree("exported", ignore_errors=True)  # of another page
    tables = [value for value in run_python("docs/how-to/python.md", slice(1)) if isinstance(value, pd.DataFrame)]
    assert len(tables) == 4 and all(len(table) for table in tables)
    assert (place / "exported" / "model.safetensors").exists()


@pytest.mark.nightly
def test_the_loss_of_the_tutorial_beside_dpo(models, place, monkeypatch):
    monkeypatch.chdir(place)
    (words,) = of("own loss")
    call([word for word in words if "--inputs" not in word], models, monkeypatch)
    results = pd.read_csv(place / "runs" / "own" / "results.csv")
    assert {"dpo", "own", "ppo"} <= set(results["method"])


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
    others = [words for words in of("quickstart") if words != ["make", "quickstart"]]
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
