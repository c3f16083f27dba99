"""`rlhf-jax chat`: a conversation in the terminal."""

import contextlib
import dataclasses
import importlib
import signal
import sys
import threading
import unicodedata
from collections.abc import Iterator

import jax
from rich.console import Console
from rich.markup import escape

from rlhf_jax.cli import flags
from rlhf_jax.cli.conversation import Answer, Conversation
from rlhf_jax.cli.output import WholeWords, until_closed
from rlhf_jax.cli.parser import Parser
from rlhf_jax.loading.models import RewardModel
from rlhf_jax.rewards.sources import Reward
from rlhf_jax.types import RlhfError

DESCRIPTION = """\
Chat with a model in the terminal; answers are printed as they are generated. Ctrl-C stops an answer, Ctrl-D quits.
A model without a chat template continues your text. /help lists the commands.
"""
COMMANDS = """\
/system TEXT     set the system message; /system alone removes it
/temperature X   set the sampling temperature; 0 is greedy decoding
/reset           clear the conversation
/score           print the reward of the last answer
/exit            quit (or Ctrl-D); Ctrl-C stops an answer"""
INPUT_PROMPT = "\001\033[1;36m\002> \001\033[0m\002"  # \001 and \002 enclose characters of no width, for readline


def chat_verb(arguments: list[str]) -> None:
    """Run a conversation in the terminal until the user ends it."""
    parser = Parser("rlhf-jax chat", DESCRIPTION)
    flags.add_model_flags(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message")
    flags.add_judge_flags(parser)
    flags.add_sampling_flags(parser)
    options = parser.parse_args(arguments)
    console = Console(highlight=False)
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
    Terminal(conversation, judge, console).run()


class Terminal:
    """Terminal loop that reads messages and commands and prints answers."""

    def __init__(self, conversation: Conversation, judge: RewardModel | Reward | None, console: Console) -> None:
        """Store the conversation, the reward behind /score, and the console."""
        self._conversation, self._judge, self._console = conversation, judge, console

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
                    self._command(line) if line.startswith("/") else self._answer(line)
                except RlhfError as error:
                    self._note(f"{error}")

    def _answer(self, line: str) -> None:
        answer = Answer()
        pieces = self._conversation.reply(line, answer)
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
        elif name == "/score":
            if self._judge is None:
                raise RlhfError(
                    "no reward is loaded: start with --reward-model=DIR, --reward-stage=NAME or --reward=FILE.py:FUNC"
                )
            self._note(f"score {conversation.score(self._judge):+.3f}")
        else:
            raise RlhfError(f"unknown command {name}; /help lists the commands")

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
        with contextlib.suppress(ImportError):  # line editing and history, where the platform has readline
            importlib.import_module("readline")
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


def _statistics(answer: Answer, stopped: bool) -> str:
    speed = f", {(answer.tokens - 1) / answer.seconds:.1f} per second" if answer.seconds else ""
    end = "; stopped" if stopped else "; cut off by --max-new-tokens or the context length" if answer.cut else ""
    return f"{answer.tokens} tokens{speed}{end}"
