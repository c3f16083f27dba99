"""`rlhf-jax chat`, in a pseudo-terminal as a person has it, and through a pipe."""

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_jax.data import formats
from tests.support import checkpoints, tokenizer_files, xla_flags
from tests.support.commands import fails, reads, succeeds

ROOT = Path(__file__).parents[2]
AT_A_TERMINAL = """
import fcntl, signal, termios
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process started in the background has not
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # whose keys are signals
from rlhf_jax.main import entry_point
entry_point()
"""
CTRL_C, CTRL_D = "\x03", "\x04"
SHOW_CURSOR = r"\x1b\[\?25h"


class Typist:
    """Someone at a terminal."""

    def __init__(self, data: Path, *arguments: str) -> None:
        self.terminal, theirs = pty.openpty()
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "TERM": "xterm",
            "COLUMNS": "120",
            "XLA_FLAGS": xla_flags.XLA_FLAGS,
            "RLHF_JAX_DATA": str(data),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", AT_A_TERMINAL, "chat", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            start_new_session=True,
        )
        os.close(theirs)
        self.seen = b""

    def type(self, keys: str) -> None:
        os.write(self.terminal, keys.encode())

    def reads(self, pattern: str, seconds: float = 120) -> str:
        """Return the output up to and including a pattern; the next call begins after it."""
        deadline = time.monotonic() + seconds
        while True:
            text = self.seen.decode(errors="replace")
            if found := re.search(pattern, text):
                self.seen = text[found.end() :].encode()
                return text[: found.end()]
            assert time.monotonic() < deadline, f"{pattern!r} did not appear in {text!r}"
            if select.select([self.terminal], [], [], 0.1)[0]:
                self.seen += os.read(self.terminal, 2**16)

    def leaves(self) -> int:
        """The exit status."""
        return self.process.wait(60)

    def __enter__(self) -> "Typist":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.terminal)


def test_a_conversation_in_a_terminal(tmp_path):
    # It never ends an answer by itself, and has room for a very long one.
    model = checkpoints.policy(tmp_path / "model", context=2**16, never=(2,))
    judge = checkpoints.reward_model(tmp_path / "judge")
    flags = [f"--model={model}", f"--reward-model={judge}", "--temperature=0", "--max-new-tokens=60000"]
    with Typist(tmp_path, *flags) as person:
        person.reads("/help lists the commands")
        person.reads("> ")
        person.type("Is it good?\r")
        person.reads("reading")
        person.reads(SHOW_CURSOR)  # what says so is taken away when the answer begins
        person.reads("(.|\n){80}")
        person.type(CTRL_C)
        said = person.reads(r"(\d+) tokens, [\d.]+ per second; stopped")
        assert "Traceback" not in said
        person.reads("> ")
        person.type("/score\r")
        person.reads(r"score [+-]\d\.\d{3}")
        person.reads("> ")
        person.type("/temperature 0.5\r")
        person.reads("temperature 0.5\x1b")  # printed, not typed
        person.type("/exi\x7f\x7f\x7fhelp\r")  # lines can be edited
        person.reads("/score  +print the reward of the last answer")
        person.reads("> ")
        person.type(CTRL_D)
        assert person.leaves() == 0
    assert (tmp_path / "chat_history").read_text().splitlines()[-4:] == [
        "Is it good?",
        "/score",
        "/temperature 0.5",
        "/help",
    ]


@pytest.mark.nightly
def test_answers_come_in_pieces_of_whole_characters(tmp_path):
    """A model of noise over bytes writes mostly what is no text, and what a terminal would obey."""
    model = checkpoints.policy(tmp_path / "model", never=(2,))
    with Typist(tmp_path, f"--model={model}", "--max-new-tokens=150") as person:
        person.reads("> ")
        person.type("Is it good?\r")
        person.reads("reading")
        person.reads(SHOW_CURSOR)
        pieces = [person.seen]
        while b"150 tokens" not in person.seen:
            assert select.select([person.terminal], [], [], 60)[0]
            pieces.append(os.read(person.terminal, 2**16))
            person.seen += pieces[-1]
        assert len(pieces) > 5
        answer = person.reads("150 tokens").removesuffix("\x1b[2m150 tokens")  # dim
        assert "\x1b[2m" not in answer
        left = answer.replace("\r\x1b[1A\x1b[2K", "")  # where it said that it was reading
        assert not {character for character in left if ord(character) < 32} - set("\r\n\t")
        assert len(left) > 100
        person.type("/exit\r")
        assert person.leaves() == 0


def chat(capsys, monkeypatch, lines: str, *arguments: str) -> str:
    reads(monkeypatch, lines)
    return succeeds(capsys, "chat", *arguments)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return f"--model={checkpoints.policy(tmp_path_factory.mktemp('checkpoint') / 'model', never=(2,))}"


def test_a_pipe_asks_and_commands(model, capsys, monkeypatch):
    short = [model, "--max-new-tokens=5", "--temperature=0"]
    once = chat(capsys, monkeypatch, "Is it good?\n", *short)
    assert re.search(r"5 tokens, [\d.]+ per second; cut off by --max-new-tokens", once)
    assert ">" not in once.split("\n")[-1]
    answer = once[: once.index("5 tokens")]
    again = chat(capsys, monkeypatch, "Is it good?\n/reset\n\nIs it good?\n/exit\nnever read\n", *short)
    assert again.count(answer) == 2
    assert answer not in chat(capsys, monkeypatch, "Is it good?\n", *short, "--system=Be short.")
    told = chat(capsys, monkeypatch, "/system Be short.\nIs it good?\n", *short)
    assert answer not in told
    assert answer in chat(capsys, monkeypatch, "/system Be short.\n/system\nIs it good?\n", *short)


def test_a_pipe_has_no_control_sequences_under_jupyter(model, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b" not in chat(capsys, monkeypatch, "Is it good?\n", model, "--max-new-tokens=5")


def test_an_answer_is_taken_back_and_given_again(model, tmp_path, capsys, monkeypatch):
    file = tmp_path / "chats.jsonl"
    lines = f"Is it good?\nWhy?\n/undo\n/save {file}\n/regenerate\n/save {file}\n"
    assert "Taken back: Why?" in chat(capsys, monkeypatch, lines, model, "--max-new-tokens=5")
    rows = [row["messages"] for row in formats.read_table(str(file))]
    assert [[message["role"] for message in row] for row in rows] == [["user", "assistant"]] * 2
    assert [row[0]["content"] for row in rows] == ["Is it good?"] * 2


def test_another_model_answers_the_same(model, tmp_path, capsys, monkeypatch):
    other = checkpoints.policy(tmp_path / "other", never=(2,), seed=7)
    short = ["--max-new-tokens=5", "--temperature=0"]
    alone = chat(capsys, monkeypatch, "Is it good?\n", f"--model={other}", *short)
    both = chat(capsys, monkeypatch, f"Is it good?\n/compare {other}\n", model, *short)
    assert f"{other}:\n{alone[: alone.index('5 tokens')]}" in both
    assert "name a stage of --workdir" in chat(capsys, monkeypatch, "Is it good?\n/compare\n", model, *short)


def test_a_conversation_is_saved_as_training_data(model, tmp_path, capsys, monkeypatch):
    file = tmp_path / "chats.jsonl"
    lines = f"Is it good?\n/save {file}\n/save {file}\n/save {tmp_path / 'no' / 'where'}\n"
    said = chat(capsys, monkeypatch, lines, model, "--max-new-tokens=5", "--system=Be short.")
    assert said.count("Saved 3 messages") == 2 and "No such file" in said
    first, second = file.read_text().splitlines()
    rows = formats.read_table(str(file))
    assert first == second and formats.kind_of(rows) == "messages"
    assert [message["role"] for message in rows[0]["messages"]] == ["system", "user", "assistant"]


def test_the_last_answer_is_scored_by_python(model, tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def f(prompts, completions, completion_ids):\n"
        "    assert [m['role'] for m in prompts[0]] == ['system', 'user', 'assistant', 'user']\n"
        "    return [100 * len(completions[0]) + (completions[0][0]['role'] == 'assistant')]\n"
    )
    asked = "Is it good?\nAnd now?\n/score\n"
    flags = [model, "--max-new-tokens=3", "--system=Be short.", f"--reward={tmp_path / 'mine.py'}:f"]
    assert "score +101.000" in chat(capsys, monkeypatch, asked, *flags)
    assert "score +50.500" in chat(capsys, monkeypatch, asked, *flags, "--reward-weights=0.5")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/score", "no reward is loaded: start with --reward-model=DIR, --reward-stage=NAME or"),
        ("/temperature", "temperature 1"),
        ("/temperature hot", "/temperature hot: give a number >= 0"),
        ("/temperature -1", "/temperature -1: give a number >= 0"),
        ("/nonsense", "unknown command /nonsense; /help lists the commands"),
        ("/reset", "Conversation cleared."),
        ("/undo", "there is no message to take back"),
        ("/regenerate", "there is no message to take back"),
        ("/save", "/save: name a file"),
        ("/save chats.jsonl", "there is no conversation yet"),
        ("word " * 200, "tokens, but the context is 256"),
    ],
)
def test_what_is_wrong_is_a_note_and_not_the_end(model, line, words, capsys, monkeypatch):
    assert words in chat(capsys, monkeypatch, f"{line}\n/help\n", model)


def test_flags_that_cannot_be(model, tmp_path, capsys):
    judge = checkpoints.reward_model(tmp_path / "judge", tokenizer_files.gpt2)
    policy = model.removeprefix("--model=")
    assert "is a language model" in fails(capsys, "chat", model, f"--reward-model={policy}")
    assert "--reward-stage needs --workdir" in fails(capsys, "chat", model, "--reward-stage=rm")
    both = [f"--reward-model={judge}", "--reward-stage=rm"]
    assert "name 2 rewards" in fails(capsys, "chat", model, *both)
    plain = checkpoints.policy(tmp_path / "plain", tokenizer_files.gpt2)
    assert "no chat template" in fails(capsys, "chat", f"--model={plain}", "--system=Be short.")
