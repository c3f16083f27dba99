"""Command-line flags shared by the commands: model, reward and sampling options, and error reporting."""

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_jax.cli.parser import Parser
from rlhf_jax.config import FunctionSource
from rlhf_jax.interop.hub import quantisation_note
from rlhf_jax.loading import models, pretrained
from rlhf_jax.loading.models import Policy, RewardModel, Tuning
from rlhf_jax.reports.run import Run
from rlhf_jax.rewards.sources import Reward, RewardConfig, load_reward
from rlhf_jax.runtime import compilation_cache
from rlhf_jax.sampling.choice import Sampling
from rlhf_jax.sampling.options import SamplingOptions
from rlhf_jax.types import RlhfError

EXACT = Tuning(param_dtype="float32", compute_dtype="float32")
"""Default dtypes for checkpoints. Results in lower precision would also depend on the device."""


def add_model_flags(parser: Parser) -> None:
    """Add the flags that `load_model` reads."""
    group = parser.add_argument_group("model", "--model, or --workdir and --stage")
    group.add_argument(
        "--model",
        metavar="DIR",
        help="a directory with a Hugging Face checkpoint or a PEFT adapter, a GGUF file, or OWNER/NAME on the Hub",
    )
    group.add_argument("--family", metavar="FILE:NAME", help="your own model family with which to read --model")
    group.add_argument("--workdir", type=Path, metavar="DIR", help="work directory of an experiment")
    group.add_argument("--stage", metavar="NAME", help="stage whose model to load")
    group.add_argument("--inputs", type=Path, metavar="DIR", help="work directory given to the experiment as --inputs")
    group.add_argument(
        "--policy-seed", type=int, metavar="N", help="seed to load if the stage trained several (default: the first)"
    )
    group.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="dtype of parameters and computation (default: float32 for a checkpoint, the stage's own for a stage)",
    )


def load_model(options: argparse.Namespace, tuning: Tuning) -> Policy | RewardModel:
    """Load the model that the flags name. Without --dtype a checkpoint gets the dtypes of `tuning`.

    An adapter is merged into its base. A note on standard error says if the weights were dequantised. Programs that
    are compiled for the model are kept in the compilation cache.
    Raises RlhfError if the flags name no model, or two.
    """
    compilation_cache.enable()
    if options.dtype is not None:
        tuning = Tuning(param_dtype=options.dtype, compute_dtype=options.dtype)
    if options.family is not None:
        if options.model is None:
            raise RlhfError("--family says how to read --model, and there is none: leave it out")
        tuning = dataclasses.replace(tuning, family=FunctionSource(options.family))
    if options.model is not None:
        clashing = [
            name for name in ("workdir", "stage", "inputs", "policy_seed") if getattr(options, name) is not None
        ]
        if clashing:
            raise RlhfError(f"--model and --{clashing[0].replace('_', '-')} name two models: leave one out")
        model = pretrained.load_checkpoint(options.model, tuning)
        if note := quantisation_note(options.model, model.hf_config):
            print(note, file=sys.stderr)
        return model
    model = models.merged(stage_run(options).load_model(options.stage, options.policy_seed))
    return model if options.dtype is None else models.tuned(model, tuning)


def stage_run(options: argparse.Namespace) -> Run:
    """Open the run of the stage that the flags name. Raises RlhfError if they name none."""
    if options.workdir is None or options.stage is None:
        raise RlhfError("no model given: use --model=DIR, or --workdir=DIR --stage=NAME")
    return Run(options.workdir, options.inputs)


def load_policy(options: argparse.Namespace) -> Policy:
    """Load the language model that the flags name. Raises RlhfError if it is a reward model."""
    model = load_model(options, EXACT)
    if not isinstance(model, Policy):
        raise RlhfError(f"{options.model or options.stage} is a reward model, which cannot generate: give a policy")
    return model


def add_judge_flags(parser: Parser) -> None:
    """Add the flags that `load_judge` reads."""
    group = parser.add_argument_group("reward", "--reward-model, or --reward-stage, or --reward")
    group.add_argument("--reward-model", metavar="DIR", help="a reward model; same forms as --model")
    group.add_argument("--reward-stage", metavar="NAME", help="the reward model of a stage of --workdir")
    group.add_argument(
        "--reward",
        action="append",
        metavar="FILE.py:FUNC",
        help="a function (prompts, completions, **columns) -> list[float | None] in a file or package.module; repeat "
        "the flag to sum several",
    )
    group.add_argument("--reward-weights", type=_numbers, metavar="W,W", help="one weight per --reward (default 1)")


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(map(float, text.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} should be comma-separated numbers") from error


def load_judge(options: argparse.Namespace) -> RewardModel | Reward | None:
    """Load the reward that the flags name, or return None. Raises RlhfError for two rewards or a language model."""
    compilation_cache.enable()
    flags = [
        f"--{name.replace('_', '-')}" for name in ("reward_model", "reward_stage", "reward") if getattr(options, name)
    ]
    if len(flags) > 1:
        raise RlhfError(f"{' and '.join(flags)} name {len(flags)} rewards: keep one of them")
    if options.reward is not None:
        try:
            config = RewardConfig(tuple(map(FunctionSource, options.reward)), weights=options.reward_weights)
        except ValueError as error:
            raise RlhfError(f"--reward-{error}") from error
        return load_reward(config, None)
    if options.reward_weights is not None:
        raise RlhfError("--reward-weights are only used with --reward: leave them out or add --reward")
    if options.reward_stage is not None:
        if options.workdir is None:
            raise RlhfError("--reward-stage needs --workdir; otherwise use --reward-model=DIR")
        return Run(options.workdir, options.inputs).load_reward_model(options.reward_stage)
    if options.reward_model is None:
        return None
    judge = pretrained.load_checkpoint(options.reward_model, EXACT)
    if not isinstance(judge, RewardModel):
        raise RlhfError(f"--reward-model={options.reward_model} is a language model: use a classifier with one label")
    return judge


def require_judge(options: argparse.Namespace) -> RewardModel | Reward:
    """Load the reward that the flags name. Raises RlhfError as `load_judge` does, and if they name none."""
    judge = load_judge(options)
    if judge is None:
        raise RlhfError(
            "no reward given: use --reward-model=DIR, --workdir=DIR --reward-stage=NAME, or --reward=FILE.py:FUNC"
        )
    return judge


def add_sampling_flags(parser: Parser) -> None:
    """Add a flag for each sampling option, and --seed."""
    group = parser.add_argument_group("sampling")
    for field in dataclasses.fields(SamplingOptions):
        keywords: dict[str, Any] = {"default": field.default, **field.metadata}
        if field.default == ():
            keywords |= {"action": "append", "default": []}
        group.add_argument(f"--{field.name.replace('_', '-')}", **keywords)
    group.add_argument("--seed", type=int, default=0, help="random seed (default 0)")


def sampling_options(options: argparse.Namespace) -> SamplingOptions:
    """Read the sampling options from the flags. Raises RlhfError naming the flag with an invalid value."""
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(SamplingOptions)}
    with naming_flags():
        return SamplingOptions(**values | {"stop": tuple(options.stop)})


def sampling(options: argparse.Namespace, policy: Policy, max_new_tokens: int) -> Sampling:
    """Build the sampling settings from the flags. Raises RlhfError naming the flag with an invalid value."""
    return sampling_options(options).sampling(policy.tokenizer.stop_ids, max_new_tokens)


@contextlib.contextmanager
def naming_flags() -> Iterator[None]:
    """Turn the argument's name at the start of an error into its flag: `n = 0 must` becomes `--n = 0 must`."""
    try:
        yield
    except (RlhfError, ValueError) as error:
        name, _, rest = str(error).partition(" ")
        raise RlhfError(f"--{name.replace('_', '-')} {rest}") from error
