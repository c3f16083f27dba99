"""Choice of a command's model: a checkpoint or a stage, and errors for invalid choices."""

import shutil

import pytest

from tests.support import checkpoints
from tests.support.commands import fails, succeeds

VERBS = {
    "sample": ["--prompt=The film"],
    "chat": [],
    "export": ["--out=/nonexistent/out"],
    "logprobs": [],
    "best-of-n": [],
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return checkpoints.policy(tmp_path_factory.mktemp("checkpoint") / "policy")


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "no model given: use --model=DIR, or --workdir=DIR --stage=NAME"),
        (["--workdir=somewhere"], "no model given"),
        (["--model=a", "--stage=b"], "--model and --stage name two models"),
        (["--model=a", "--policy-seed=1"], "--model and --policy-seed name two models"),
        (["--workdir=/nonexistent", "--stage=sft"], "work directory /nonexistent does not exist"),
        (["--model=/nonexistent/model"], "/nonexistent/model is not a directory"),
        (["--model=a", "--dtype=float8"], "invalid choice: 'float8'"),
        (["--mod=a"], "--mod=a"),
    ],
)
def test_models_that_cannot_be(verb, flags, words, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    assert words in fails(capsys, verb, *VERBS[verb], *flags)


@pytest.mark.parametrize("verb", ["sample", "chat", "logprobs", "best-of-n"])
def test_a_reward_model_writes_nothing(verb, tmp_path, capsys):
    judge = checkpoints.reward_model(tmp_path / "judge")
    assert "is a reward model, which cannot generate" in fails(capsys, verb, *VERBS[verb], f"--model={judge}")


def test_a_damaged_checkpoint_is_named(directory, tmp_path, capsys):
    broken = shutil.copytree(directory, tmp_path / "broken")
    (broken / "tokenizer.json").unlink()
    assert "broken" in fails(capsys, "sample", "--prompt=x", f"--model={broken}")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5000])
    assert "model.safetensors" in fails(capsys, "sample", "--prompt=x", f"--model={broken}")


@pytest.mark.parametrize("verb", ["run", "fetch", *VERBS])
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as end:
        succeeds(capsys, verb, "--help")
    assert end.value.code == 0
    assert f"usage: rlhf-jax {verb}" in capsys.readouterr().out
