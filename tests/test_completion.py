"""Completion of commands and flags, by the shells that are installed."""

import shutil
import subprocess

import pytest

from rlhf_jax import completion
from rlhf_jax.main import VERBS
from tests.support.commands import fails, succeeds


@pytest.fixture(scope="module")
def flags() -> dict[str, list[str]]:
    return completion.flags_of_verbs()


def test_every_verb_has_its_flags(flags):
    assert set(flags) == set(VERBS)
    assert {"--config=", "--workdir=", "--dry-run"} <= set(flags["run"])
    assert {"--prompt=", "--chat", "--top-p="} <= set(flags["sample"])
    assert "ppo" in flags["fields"] and flags["completion"] == ["bash", "zsh", "fish"]


@pytest.fixture(scope="module")
def script(tmp_path_factory, flags):
    file = tmp_path_factory.mktemp("completion") / "rlhf-jax"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(completion, "flags_of_verbs", lambda: flags)
        import contextlib

        with file.open("w") as output, contextlib.redirect_stdout(output):
            completion.completion_verb(["bash"])
    return file


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["rlhf-jax", "sam"], ["sample"]),
        (["rlhf-jax", "sample", "--top"], ["--top-k=", "--top-p="]),
        (["rlhf-jax", "fields", "online"], ["online_dpo"]),
        (["rlhf-jax", "run", "--config", "=", "quick"], ["quickstart", "quickstart:smoke"]),
        (["rlhf-jax", "--config", "=", "arith"], ["arithmetic", "arithmetic:smoke"]),
        (["rlhf-jax", "--wo"], ["--workdir="]),
        (["rlhf-jax", "completion", "f"], ["fish"]),
    ],
)
def test_bash_completes(words, expected, script):
    listed = " ".join(f"'{word}'" for word in words)
    program = (
        f"source '{script}'; COMP_WORDS=({listed}); COMP_CWORD={len(words) - 1}; _rlhf_jax; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    ran = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == expected


def test_the_script_for_zsh_is_that_for_bash_with_its_beginning(capsys, flags, monkeypatch, tmp_path):
    monkeypatch.setattr(completion, "flags_of_verbs", lambda: flags)
    bash, zsh = (succeeds(capsys, "completion", shell) for shell in ("bash", "zsh"))
    assert zsh.startswith("#compdef rlhf-jax\n") and zsh.endswith(bash)
    if shutil.which("zsh"):
        (tmp_path / "zsh").write_text(zsh)
        subprocess.run(["zsh", "-n", tmp_path / "zsh"], check=True)


def test_the_script_for_fish_has_a_line_for_each_flag(capsys, flags, monkeypatch):
    monkeypatch.setattr(completion, "flags_of_verbs", lambda: flags)
    lines = succeeds(capsys, "completion", "fish").splitlines()
    assert "complete -c rlhf-jax -n '__fish_seen_subcommand_from sample' -l top-p -r" in lines
    assert "complete -c rlhf-jax -n '__fish_seen_subcommand_from fields' -f -a ppo" in lines


def test_another_shell_is_an_error(capsys):
    assert "invalid choice: 'tcsh'" in fails(capsys, "completion", "tcsh")
