"""The command line: run an experiment or another verb, and report every error as one message."""

import argparse
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import absl.logging
from ml_collections import ConfigDict

from rlhf_jax.api import fetch, load_config, run
from rlhf_jax.cli.best_of_n import best_of_n_verb
from rlhf_jax.cli.chat import chat_verb
from rlhf_jax.cli.export import export_verb
from rlhf_jax.cli.fields import fields_verb
from rlhf_jax.cli.flags import Parser
from rlhf_jax.cli.logprobs import logprobs_verb
from rlhf_jax.cli.sample import sample_verb
from rlhf_jax.cli.score import score_verb
from rlhf_jax.config import override
from rlhf_jax.data.fetch import DATASETS
from rlhf_jax.interop.hf import read_config
from rlhf_jax.interop.hub import MODELS, quantisation_note
from rlhf_jax.papers.verb import reproduce_verb
from rlhf_jax.types import RlhfError

USAGE = """\
rlhf-jax: learning from human preferences in JAX

  rlhf-jax [run] --config=FILE[:ARG] --workdir=DIR [--inputs=DIR]
                 [--stage=NAME] [--config.SECTION.FIELD=VALUE ...]
      Run the stages of an experiment that are not complete, and report. FILE is
      a Python file, or the name of an installed experiment: quickstart:smoke.
  rlhf-jax fields [KIND]
      List the kinds of stages, or the fields of one kind, with types, defaults
      and descriptions.
  rlhf-jax fetch NAME
      Download a data set or a model.
  rlhf-jax reproduce NAME | --list | --check
      Reproduce a paper's figure, and give verdicts on its claims.
  rlhf-jax sample MODEL --prompt=TEXT [--chat] [--n=4] [--temperature=1.0]
      Sample responses to a prompt, with scores if there is a reward model.
  rlhf-jax chat MODEL [--system=TEXT] [REWARD]
      Talk to a model in the terminal.
  rlhf-jax logprobs MODEL < ROWS.jsonl > OUT.jsonl
      Add log-probabilities to rows with a prompt and a completion.
  rlhf-jax score REWARD < ROWS.jsonl > OUT.jsonl
      Add scores to rows with a prompt and a completion.
  rlhf-jax best-of-n MODEL REWARD [--n=16] [--out=FILE] < PROMPTS.jsonl
      Sample N responses to each prompt, and add the one with the highest score.
  rlhf-jax export MODEL --out=DIR
      Write a model as a directory that transformers loads.

To compare policies, with win rates and intervals, run a stage of kind evaluate,
as the experiments do, or rlhf_jax.evaluate in Python.

MODEL is --model=DIR|FILE.gguf|OWNER/NAME, or --workdir=DIR --stage=NAME.
REWARD is --reward-model=DIR, --reward-stage=NAME of --workdir, or
--reward=FILE.py:FUNC. `rlhf-jax VERB --help` lists the flags of a verb. With
--debug, errors show a traceback.
"""

RUN = """\
Run the stages of an experiment that are not complete, and report.

--config.SECTION.FIELD=VALUE sets a field of any section, whether or not the
file has it; `rlhf-jax fields` lists them. VALUE is a Python literal, a string,
or names separated by commas:
  --config.seeds=4  --config.stages=sft,ppo  --config.ppo.optimizer.b1=0.8"""


def entry_point() -> None:
    """Run the command of the console script, and exit with its status."""
    if "--debug" not in sys.argv:
        # `main` reports every exception. The default hook would print a failed checkpoint again, from the callbacks of
        # the threads that were still writing it.
        sys.unraisablehook = lambda _: None
    sys.exit(main(sys.argv[1:]))


def main(argv: list[str]) -> int:
    """Run one command and return its exit status: 0, or 1 (130 if interrupted) with a message on stderr."""
    debug = "--debug" in argv
    arguments = [argument for argument in argv if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    absl.logging.set_verbosity(absl.logging.INFO if debug else absl.logging.FATAL)  # Orbax logs errors that it raises
    verb = "run" if arguments[0].startswith("-") else arguments.pop(0)
    try:
        if verb not in VERBS:
            raise RlhfError(f"there is no verb {verb!r}: give one of {', '.join(VERBS)}, or --help")
        VERBS[verb](arguments)
    except KeyboardInterrupt:
        advice = " The same command continues from the last checkpoint." if verb == "run" else ""
        print(f"\nInterrupted.{advice}", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(_message(error), file=sys.stderr)
        return 1
    return 0


def run_verb(arguments: list[str]) -> None:
    """Run an experiment and report on it."""
    config, options = parse_run_flags(arguments)
    run(config, options.workdir, stage=options.stage, inputs=options.inputs)


def fetch_verb(arguments: list[str]) -> None:
    """Download a data set or a model."""
    parser = Parser("rlhf-jax fetch", "Download a data set or a model.")
    parser.add_argument("name", choices=[*DATASETS, *MODELS], help="data set or model")
    name = parser.parse_args(arguments).name
    place = fetch(name)
    print(place)
    if name not in MODELS:
        return
    if note := quantisation_note(name, read_config(place)):
        print(note, file=sys.stderr)


VERBS: dict[str, Callable[[list[str]], None]] = {
    "run": run_verb,
    "fields": fields_verb,
    "fetch": fetch_verb,
    "reproduce": reproduce_verb,
    "sample": sample_verb,
    "chat": chat_verb,
    "logprobs": logprobs_verb,
    "score": score_verb,
    "best-of-n": best_of_n_verb,
    "export": export_verb,
}


def parse_run_flags(arguments: list[str]) -> tuple[ConfigDict, argparse.Namespace]:
    """Return the config with its overrides, and the other flags. Raises RlhfError for a bad flag or file."""
    parser = Parser("rlhf-jax run", RUN)
    parser.add_argument(
        "--config", required=True, metavar="FILE[:ARG]", help="Python file with get_config(ARG), or an experiment"
    )
    parser.add_argument("--workdir", type=Path, required=True, metavar="DIR", help="directory for all results")
    parser.add_argument(
        "--inputs", type=Path, metavar="DIR", help="earlier work directory to read unchanged stages from"
    )
    parser.add_argument("--stage", metavar="NAME", help="run this stage only")
    options, overrides = parser.parse_known_args(arguments)
    config = load_config(options.config)
    rest = iter(overrides)
    for argument in rest:
        flag, equals, text = argument.partition("=")
        if not re.fullmatch(r"--config(\.\w+)+", flag):
            raise RlhfError(f"{argument!r} is not a flag of run: write --config.SECTION.FIELD=VALUE, or see run --help")
        value = text if equals else next(rest, None)
        if value is None or (not equals and value.startswith("--")):
            raise RlhfError(f"{flag} has no value: write {flag}=VALUE")
        override(config, flag.removeprefix("--config."), value)
    return config, options


def _message(error: Exception) -> str:
    if isinstance(error, RlhfError):
        return f"Error: {error}"
    if isinstance(error, OSError):
        place = f" ({error.filename})" if error.filename else ""
        return f"Error: {error.strerror or error}{place}. Complete results are kept: remove the cause and run again."
    return f"Error: {type(error).__name__}: {error}\nThis may be a bug in rlhf_jax: --debug shows the traceback."
