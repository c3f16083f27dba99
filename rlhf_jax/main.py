"""The command line: run one command, and report every error as one message.

The module of a command is imported when it is called, so that `--help` and the other commands need not wait for it.
"""

import importlib
import sys
import traceback

import rlhf_jax
from rlhf_jax.runtime.huge_pages import restart_with_huge_pages
from rlhf_jax.runtime.termination import STATUS, Terminated, raise_on_sigterm

USAGE = """\
rlhf-jax: learning from human preferences in JAX

  rlhf-jax [run] --config=FILE[:ARG] --workdir=DIR [--inputs=DIR]
                 [--stage=NAME] [--dry-run] [--config.SECTION.FIELD=VALUE ...]
      Run the stages of an experiment that are not complete, and report. FILE is
      a Python file, or the name of an installed experiment: quickstart:smoke.
      --dry-run says what would run, and estimates time and disk space.
  rlhf-jax fields [KIND]
      List the kinds of stages, or the fields of one kind, with types, defaults
      and descriptions.
  rlhf-jax sweep --config=FILE[:ARG] --workdir=DIR [--inputs=DIR]
                 [--processes=N] [--vmap] [--slurm] [--dry-run]
      Run an experiment at every point of the file's get_sweep().
  rlhf-jax config --config=FILE[:ARG] [--config.SECTION.FIELD=VALUE ...]
      Print the config of an experiment with all defaults.
  rlhf-jax plan --config=FILE[:ARG] --topology=v5e:2x2 [--stage=NAME] [--json]
      Compile an experiment for a machine that need not be at hand, and print
      memory, costs, the smallest mesh that fits, and the least time of the run.
  rlhf-jax doctor [--budget=5m] [--json]
      Check numbers, determinism, resuming and speed on this machine.
  rlhf-jax status DIR
      List the stages of a work directory: complete, running with the time left,
      failed and why, or not started.
  rlhf-jax show DIR/STAGE
      Show a stage's config, inputs, metrics and last samples.
  rlhf-jax report DIR [DIR ...] [--out=FILE]
      Write one HTML file about one or several runs: results, curves, samples.
  rlhf-jax compare DIR DIR
      List the settings in which two runs differ, and where their metrics part.
  rlhf-jax fetch NAME
      Download a data set or a model.
  rlhf-jax reproduce NAME ... | --list | --check
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
  rlhf-jax completion bash|zsh|fish
      Print a script that completes commands and flags in your shell.

To compare policies, with win rates and intervals, run a stage of kind evaluate,
as the experiments do, or rlhf_jax.evaluate in Python.

MODEL is --model=DIR|FILE.gguf|OWNER/NAME, or --workdir=DIR --stage=NAME.
REWARD is --reward-model=DIR, --reward-stage=NAME of --workdir, or
--reward=FILE.py:FUNC. `rlhf-jax VERB --help` lists the flags of a verb. With
--debug, errors show a traceback; --version prints the version.
"""

VERBS = {
    "run": "rlhf_jax.commands:run_verb",
    "sweep": "rlhf_jax.sweep:sweep_verb",
    "fields": "rlhf_jax.cli.fields:fields_verb",
    "config": "rlhf_jax.commands:config_verb",
    "plan": "rlhf_jax.planning.plan_verb:plan_verb",
    "doctor": "rlhf_jax.doctor.doctor_verb:doctor_verb",
    "status": "rlhf_jax.cli.status:status_verb",
    "show": "rlhf_jax.cli.show:show_verb",
    "fetch": "rlhf_jax.commands:fetch_verb",
    "report": "rlhf_jax.cli.report_runs:report_verb",
    "compare": "rlhf_jax.cli.compare_runs:compare_verb",
    "reproduce": "rlhf_jax.papers.verb:reproduce_verb",
    "sample": "rlhf_jax.cli.sample:sample_verb",
    "chat": "rlhf_jax.cli.chat:chat_verb",
    "logprobs": "rlhf_jax.cli.logprobs:logprobs_verb",
    "score": "rlhf_jax.cli.score:score_verb",
    "best-of-n": "rlhf_jax.cli.best_of_n:best_of_n_verb",
    "export": "rlhf_jax.cli.export:export_verb",
    "completion": "rlhf_jax.completion:completion_verb",
}
"""Functions of the command line's arguments, by the names of the commands."""


def entry_point() -> None:
    """Run the command of the console script, and exit with its status."""
    restart_with_huge_pages()
    raise_on_sigterm()
    if "--debug" not in sys.argv:
        # `main` reports every exception. The default hook would print a failed checkpoint again, from the callbacks of
        # the threads that were still writing it.
        sys.unraisablehook = lambda _: None
    sys.exit(main(sys.argv[1:]))


def main(argv: list[str]) -> int:
    """Run one command and return its exit status: 0; 1 after an error, 130 after Ctrl-C, 143 after SIGTERM."""
    debug = "--debug" in argv
    arguments = [argument for argument in argv if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if arguments[0] in ("--version", "version"):
        print(f"rlhf-jax {rlhf_jax.__version__}")
        return 0
    verb = "run" if arguments[0].startswith("-") else arguments.pop(0)
    if verb not in VERBS:
        print(f"Error: there is no verb {verb!r}: give one of {', '.join(VERBS)}, or --help", file=sys.stderr)
        return 1
    try:
        _limit_logging(debug=debug)
        module, function = VERBS[verb].split(":")
        getattr(importlib.import_module(module), function)(arguments)
    except (KeyboardInterrupt, Terminated) as error:
        word, status = ("Terminated", STATUS) if isinstance(error, Terminated) else ("Interrupted", 130)
        otherwise = "" if isinstance(error, Terminated) else ", or starts the stage again if there is none"
        advice = f" The same command continues from the last checkpoint{otherwise}." if verb in ("run", "sweep") else ""
        print(f"\n{word}.{advice}", file=sys.stderr)
        _leave(status)
        return status
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(_message(error), file=sys.stderr)
        _leave(1)
        return 1
    return 0


def _leave(status: int) -> None:
    """End at once if other processes of the experiment wait for this one."""
    from rlhf_jax import processes

    processes.leave(status)


def _limit_logging(*, debug: bool) -> None:
    import absl.logging

    absl.logging.set_verbosity(absl.logging.INFO if debug else absl.logging.FATAL)  # Orbax logs errors that it raises


def _message(error: Exception) -> str:
    from rlhf_jax.types import RlhfError

    if isinstance(error, RlhfError):
        return f"Error: {error}"
    if isinstance(error, OSError):
        place = f" ({error.filename})" if error.filename else ""
        return f"Error: {error.strerror or error}{place}. Complete results are kept: remove the cause and run again."
    return f"Error: {type(error).__name__}: {error}\nThis may be a bug in rlhf_jax: --debug shows the traceback."
