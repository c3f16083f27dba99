"""What the verbs' command lines have in common: which model, how it is sampled, and how errors are told."""

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from rlhf_jax.config import FunctionSource
from rlhf_jax.interop.hub import quantisation_note
from rlhf_jax.loading import models
from rlhf_jax.loading.models import Policy, RewardModel, Tuning
from rlhf_jax.reports.run import Run
from rlhf_jax.rewards.sources import Reward, RewardConfig, load_reward
from rlhf_jax.sampling.choice import Sampling
from rlhf_jax.sampling.options import SamplingOptions
from rlhf_jax.types import RlhfError

EXACT = Tuning(param_dtype="float32", compute_dtype="float32")
"""What a checkpoint's numbers are computed in, unless told otherwise. Anything less depends on the device too."""


class Parser(argparse.ArgumentParser):
    """Raises RlhfError where argparse would print a usage and exit."""

    def __init__(self, prog: str, description: str) -> None:
        """Knows every flag by its whole name only."""
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description, formatter_class=form, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raises RlhfError with the message and the usage."""
        raise RlhfError(f"{message}\n{self.format_usage().strip()}")


def add_model_flags(parser: Parser) -> None:
    """The flags that `load_model` reads."""
    which = parser.add_argument_group("which model", "--model, or --workdir and --stage")
    which.add_argument(
        "--model",
        metavar="DIR",
        help="a Hugging Face directory or a PEFT adapter's, a GGUF file, or OWNER/NAME on the hub",
    )
    which.add_argument("--workdir", type=Path, metavar="DIR", help="where an experiment was run")
    which.add_argument("--stage", metavar="NAME", help="the stage of it whose model is meant")
    which.add_argument("--inputs", type=Path, metavar="DIR", help="where stages are that the experiment only read")
    which.add_argument("--policy-seed", type=int, metavar="N", help="of a stage that trained several (the first)")
    which.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="of parameters and computing; otherwise float32, or as the stage trained it",
    )


def load_model(options: argparse.Namespace, tuning: Tuning) -> Policy | RewardModel:
    """The model that the flags name; a checkpoint is held as `tuning` says, where --dtype says nothing.

    An adapter is merged into its base. What was quantised once is said on standard error.
    Raises RlhfError where the flags name no model, or two.
    """
    if options.dtype is not None:
        tuning = Tuning(param_dtype=options.dtype, compute_dtype=options.dtype)
    if options.model is not None:
        clashing = [
            name for name in ("workdir", "stage", "inputs", "policy_seed") if getattr(options, name) is not None
        ]
        if clashing:
            raise RlhfError(f"--model and --{clashing[0].replace('_', '-')} name two models: leave one of them out")
        model = models.load_checkpoint(options.model, tuning)
        if note := quantisation_note(options.model, model.hf_config):
            print(note, file=sys.stderr)
        return model
    model = models.merged(stage_run(options).load_model(options.stage, options.policy_seed))
    return model if options.dtype is None else models.tuned(model, tuning)


def stage_run(options: argparse.Namespace) -> Run:
    """The run whose stage the flags name. Raises RlhfError where they name none."""
    if options.workdir is None or options.stage is None:
        raise RlhfError("no model is named: give --model=DIR, or --workdir=DIR --stage=NAME")
    return Run(options.workdir, options.inputs)


def load_policy(options: argparse.Namespace) -> Policy:
    """The language model that the flags name. Raises RlhfError where it is a reward model."""
    model = load_model(options, EXACT)
    if not isinstance(model, Policy):
        raise RlhfError(f"{options.model or options.stage} is a reward model, which writes nothing: name a policy")
    return model


def add_judge_flags(parser: Parser) -> None:
    """The flags that `load_judge` reads."""
    which = parser.add_argument_group("who scores answers", "--reward-model, or --reward-stage, or --reward")
    which.add_argument("--reward-model", metavar="DIR", help="a reward model: named as --model is")
    which.add_argument("--reward-stage", metavar="NAME", help="a reward model: a stage of --workdir")
    which.add_argument(
        "--reward",
        action="append",
        metavar="FILE.py:FUNC",
        help="a function (prompts, completions, **columns) -> list[float | None], of a file or of package.module; may "
        "be given again, for a sum",
    )
    which.add_argument("--reward-weights", type=_numbers, metavar="W,W", help="one for each --reward (1 each)")


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(map(float, text.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} should be numbers, with commas between them") from error


def load_judge(options: argparse.Namespace) -> RewardModel | Reward | None:
    """The reward that the flags name, or None. Raises RlhfError where they name two, or a language model."""
    flags = [
        f"--{name.replace('_', '-')}" for name in ("reward_model", "reward_stage", "reward") if getattr(options, name)
    ]
    if len(flags) > 1:
        raise RlhfError(f"{' and '.join(flags)} name {len(flags)} rewards: leave all but one of them out")
    if options.reward is not None:
        try:
            config = RewardConfig(tuple(map(FunctionSource, options.reward)), weights=options.reward_weights)
        except ValueError as error:
            raise RlhfError(f"--reward-{error}") from error
        return load_reward(config, None)
    if options.reward_weights is not None:
        raise RlhfError("--reward-weights weigh what --reward names, and there is none: leave them out")
    if options.reward_stage is not None:
        if options.workdir is None:
            raise RlhfError("--reward-stage needs the --workdir that has it: or give --reward-model=DIR")
        return Run(options.workdir, options.inputs).load_reward_model(options.reward_stage)
    if options.reward_model is None:
        return None
    judge = models.load_checkpoint(options.reward_model, EXACT)
    if not isinstance(judge, RewardModel):
        raise RlhfError(f"--reward-model={options.reward_model} is a language model: give a classifier with one label")
    return judge


def add_sampling_flags(parser: Parser) -> None:
    """A flag for each of the sampling options, and --seed."""
    how = parser.add_argument_group("how it answers")
    for field in dataclasses.fields(SamplingOptions):
        given: dict[str, Any] = {"default": field.default, **field.metadata}
        if field.default == ():
            given |= {"action": "append", "default": []}
        how.add_argument(f"--{field.name.replace('_', '-')}", **given)
    how.add_argument("--seed", type=int, default=0, help="of the random numbers (default 0)")


def sampling_options(options: argparse.Namespace) -> SamplingOptions:
    """Return the sampling options that the flags give. Raises RlhfError naming the flag that cannot be."""
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(SamplingOptions)}
    with naming_flags():
        return SamplingOptions(**values | {"stop": tuple(options.stop)})


def sampling(options: argparse.Namespace, policy: Policy, max_new_tokens: int) -> Sampling:
    """Return the distribution that the flags give. Raises RlhfError naming the flag that cannot be."""
    return sampling_options(options).sampling(policy.tokenizer.stop_ids, max_new_tokens)


@contextlib.contextmanager
def naming_flags() -> Iterator[None]:
    """Name the flag in an error that begins with an argument's name: `n = 0 must ...` becomes `--n = 0 must ...`."""
    try:
        yield
    except (RlhfError, ValueError) as error:
        name, _, rest = str(error).partition(" ")
        raise RlhfError(f"--{name.replace('_', '-')} {rest}") from error


@contextlib.contextmanager
def until_closed() -> Iterator[None]:
    """Ends quietly when nobody reads what is printed any more, as `head` does not."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it exits
