"""The commands `run` and `fetch`; those that use a trained model are in `rlhf_jax.cli`."""

import argparse
import re
import sys
from pathlib import Path

from ml_collections import ConfigDict

from rlhf_jax.api import fetch, load_config, run
from rlhf_jax.cli.parser import Parser
from rlhf_jax.config import override
from rlhf_jax.data.fetch import DATASETS
from rlhf_jax.interop.hf import read_config
from rlhf_jax.interop.hub import MODELS, quantisation_note
from rlhf_jax.types import RlhfError

RUN = """\
Run the stages of an experiment that are not complete, and report.

--config.SECTION.FIELD=VALUE sets a field of any section, whether or not the
file has it; `rlhf-jax fields` lists them. VALUE is a Python literal, a string,
or names separated by commas:
  --config.seeds=4  --config.stages=sft,ppo  --config.ppo.optimizer.b1=0.8"""


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
