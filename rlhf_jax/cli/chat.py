"""`rlhf-jax chat`: a conversation in the terminal."""

import argparse
import atexit
import contextlib
import dataclasses
import importlib
import json
import signal
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.markup import escape

from rlhf_jax.cli import flags
from rlhf_jax.cli.conversation import Answer, Conversation
from rlhf_jax.cli.output import WholeWords, until_closed
from rlhf_jax.cli.parser import Parser
from rlhf_jax.data.fetch import data_dir
from rlhf_jax.loading.models import Policy, RewardModel
from rlhf_jax.rewards.sources import Reward
from rlhf_jax.types import RlhfError

DESCRIPTION = """\
Chat with a model in the terminal; answers are printed as they are generated. Ctrl-C stops an answer, Ctrl-D quits.
A model without a chat template continues your text. /help lists the commands.
"""
COMMANDS = """\
/system TEXT     set the system message; /system alone removes it
/temperature X   set the sampling temperature; 0 is greedy decoding
/undo            take back the last message and its answer
/regenerate      answer the last message again, with another random key
/compare MODEL   answer the last message by another stage of --workdir, or by a checkpoint
/score           print the reward of the last answer
/save FILE       append the conversation to FILE as a row of messages, which sft reads
/reset           clear the conversation
/exit            quit (or Ctrl-D); Ctrl-C stops an answer"""
HISTORY_FILE = "chat_history"
"""File in the data directory with the lines of earlier conversations."""
HISTORY_LINES = 1000
INPUT_PROMPT = "\001\033[1;36m\002> \001\033[0m\002"  # \001 and \002 enclose characters of no width, for readline


def chat_verb(arguments: list[str]) -> None:
    """Run a conversation in the terminal until the user ends it."""
    parser = Parser("rlhf-jax chat", DESCRIPTION)
    flags.add_model_flags(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message")
    flags.add_judge_flags(parser)
    flags.add_sampling_flags(parser)
    options = parser.parse_args(arguments)
    # A Jupyter kernel sets FORCE_COLOR, for which rich would draw a spinner in the output of a cell.
    console = Console(highlight=False, force_terminal=None if sys.stdout.isatty() else False)
    with console.status("[dim]loading[/dim]"):
        policy = flags.load_policy(options)
        judge = flags.load_judge(options)
    sampling = flags.sampling(options, policy, 512)
    conversation = Conversation(policy, sampling, jax.random.key(options.seed), options.stop)
    if options.system is not None:
        conversation.set_system(options.system)
    if sys.stdin.isatty():
        with console.status("[dim]compiling[/dim]"):
            conversation.compile()
    Terminal(conversation, judge, lambda name: _load_other(options, name), console).run()


def _load_other(options: argparse.Namespace, name: str) -> Policy:
    """Load the policy that /compare names: a stage of the work directory, or a checkpoint."""
    own = options.workdir is not None and (options.workdir / name).is_dir()
    changed = {"stage": name} if own else {"model": name, "workdir": None, "stage": None, "inputs": None}
    return flags.load_policy(argparse.Namespace(**{**vars(options), "policy_seed": None, "family": None, **changed}))


class Terminal:
    """Terminal loop that reads messages and commands and prints answers."""

    def __init__(
        self,
        conversation: Conversation,
        judge: RewardModel | Reward | None,
        load: Callable[[str], Policy],
        console: Console,
    ) -> None:
        """Store the conversation, the reward behind /score, the loader of /compare's models, and the console."""
        self._conversation, self._judge, self._load, self._console = conversation, judge, load, console
        self._others: dict[str, Policy] = {}

    def run(self) -> None:
        """Read and answer lines until the input ends or /exit."""
        if self._console.is_terminal:
            if not self._conversation.is_chat:
                self._note("This model has no chat template: it continues your text.")
            self._note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D quits.")
        with until_closed():
            for line in _lines():
                if line == "/exit":
                    return
                try:
                    self._command(line) if line.startswith("/") else self._answer(self._conversation, line)
                except RlhfError as error:
                    self._note(f"{error}")

    def _answer(self, conversation: Conversation, line: str) -> None:
        answer = Answer()
        pieces = conversation.reply(line, answer)
        with _until_interrupted() as interrupted:
            with self._console.status("[dim]reading[/dim]"):
                first = next(pieces, "")
            lines = WholeWords(self._console.width if self._console.is_terminal else None)
            self._print(lines.add(first))
            while not interrupted.is_set() and (piece := next(pieces, None)) is not None:
                self._print(lines.add(piece))
            pieces.close()
            self._print(lines.finish())
        self._console.print()
        self._console.print(f"[dim]{_statistics(answer, interrupted.is_set())}[/dim]\n")

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        rest, conversation = rest.strip(), self._conversation
        if name == "/help":
            self._note(COMMANDS)
        elif name == "/reset":
            conversation.reset()
            self._note("Conversation cleared.")
        elif name == "/system":
            conversation.set_system(rest or None)
            self._note("System message set." if rest else "System message removed.")
        elif name == "/temperature":
            self._set_temperature(rest)
        elif name == "/undo":
            self._note(f"Taken back: {conversation.undo()}")
        elif name == "/regenerate":
            self._answer(conversation, conversation.undo())
        elif name == "/compare":
            self._compare(rest)
        elif name == "/save":
            self._save(rest)
        elif name == "/score":
            if self._judge is None:
                raise RlhfError(
                    "no reward is loaded: start with --reward-model=DIR, --reward-stage=NAME or --reward=FILE.py:FUNC"
                )
            self._note(f"score {conversation.score(self._judge):+.3f}")
        else:
            raise RlhfError(f"unknown command {name}; /help lists the commands")

    def _compare(self, name: str) -> None:
        """Answer the last message by another model; the conversation keeps its own answer."""
        if not name:
            raise RlhfError("/compare: name a stage of --workdir, or a checkpoint")
        before = self._conversation.messages
        if name not in self._others:
            with self._console.status("[dim]loading[/dim]"):
                self._others[name] = self._load(name)
        other = self._conversation.with_policy(self._others[name])
        self._note(f"{name}:")
        self._answer(other, before[-2]["content"])
        if self._judge is not None:
            own, others = (each.score(self._judge) for each in (self._conversation, other))
            self._note(f"score {others:+.3f}; of the answer in the conversation {own:+.3f}")

    def _save(self, name: str) -> None:
        """Append the conversation to a file."""
        if not name:
            raise RlhfError("/save: name a file, such as chats.jsonl")
        row = self._conversation.as_row()
        try:
            with Path(name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            raise RlhfError(f"/save {name}: {error.strerror}") from error
        self._note(f"Saved {len(row['messages'])} messages in {name}.")

    def _set_temperature(self, text: str) -> None:
        sampling = self._conversation.sampling
        if text:
            try:
                self._conversation.sampling = dataclasses.replace(sampling, temperature=float(text))
            except ValueError as error:
                raise RlhfError(f"/temperature {text}: give a number >= 0") from error
        self._note(f"temperature {self._conversation.sampling.temperature:g}")

    def _note(self, text: str) -> None:
        self._console.print(f"[dim]{escape(text)}[/dim]")

    def _print(self, piece: str) -> None:
        # Drop control characters: the model may generate terminal escape sequences.
        safe = "".join(c for c in piece if c in "\n\t" or unicodedata.category(c) != "Cc")
        self._console.out(safe, end="", highlight=False)


@contextlib.contextmanager
def _until_interrupted() -> Iterator[threading.Event]:
    """Yield an event that Ctrl-C sets instead of raising KeyboardInterrupt.

    An exception raised while JAX calls back into Python can be lost.
    """
    interrupted = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _lines() -> Iterator[str]:
    """Yield the non-empty input lines, prompting for each if the input is a terminal."""
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):  # where the platform has readline
            _edit_lines(importlib.import_module("readline"), data_dir() / HISTORY_FILE)
    while True:
        try:
            line = input(INPUT_PROMPT if terminal else "").strip()
        except KeyboardInterrupt:  # no answer to stop: discard the line
            print()
            continue
        except EOFError:
            if terminal:
                print()
            return
        if line:
            yield line


def _edit_lines(readline: Any, history: Path) -> None:
    """Edit lines with readline, with the history of earlier conversations; Tab completes commands."""
    names = [line.split()[0] for line in COMMANDS.splitlines()]

    def complete(text: str, number: int) -> str | None:
        found = [name for name in names if text and name.startswith(text)]
        return found[number] if number < len(found) else None

    readline.set_completer_delims(" ")
    readline.set_completer(complete)
    readline.parse_and_bind("tab: complete")
    readline.set_history_length(HISTORY_LINES)
    with contextlib.suppress(OSError):  # a history that cannot be read or written is no reason to stop
        readline.read_history_file(history)

    def keep() -> None:
        with contextlib.suppress(OSError):
            history.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(history)

    atexit.register(keep)


def _statistics(answer: Answer, stopped: bool) -> str:
    speed = f", {(answer.tokens - 1) / answer.seconds:.1f} per second" if answer.seconds else ""
    end = "; stopped" if stopped else "; cut off by --max-new-tokens or the context length" if answer.cut else ""
    return f"{answer.tokens} tokens{speed}{end}"
