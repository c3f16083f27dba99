"""`rlhf-jax export`: a model as a directory that transformers loads."""

import argparse
from pathlib import Path

from rlhf_jax.cli import flags
from rlhf_jax.loading.export import adapter_base, checked_base, export, export_adapter, new_directory
from rlhf_jax.loading.models import NO_CHANGES
from rlhf_jax.types import RlhfError

DESCRIPTION = """\
Writes a policy or a reward model, with its tokenizer and chat template, as transformers loads them:
AutoModelForCausalLM (or AutoModelForSequenceClassification) and AutoTokenizer. The directory appears whole or not at
all. Weights keep the type they have, or are written in that of --dtype.
"""


def export_verb(arguments: list[str]) -> None:
    """Writes a model for others to load."""
    parser = flags.Parser("rlhf-jax export", DESCRIPTION)
    flags.add_model_flags(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a directory that is not there yet")
    parser.add_argument("--adapter", action="store_true", help="of a stage that trained one: it alone, as PEFT's")
    parser.add_argument(
        "--base", metavar="DIR", help="with --adapter: the base as PEFT finds it (the checkpoint that it was)"
    )
    options = parser.parse_args(arguments)
    if options.adapter:
        _export_adapter(options)
    elif options.base is not None:
        raise RlhfError("--base says where an adapter finds its base: give --adapter too, or leave it out")
    else:
        new_directory(options.out)
        export(flags.load_model(options, NO_CHANGES), options.out)
    print(options.out)


def _export_adapter(options: argparse.Namespace) -> None:
    """Write a stage's adapter and the tokenizer."""
    if options.model is not None:
        raise RlhfError(
            "--adapter asks for what a stage trained beside its base, and --model is a whole model: name a stage"
        )
    if options.dtype is not None:
        raise RlhfError("--adapter writes float32, as PEFT does: leave --dtype out")
    new_directory(options.out)
    run = flags.stage_run(options)
    model = run.load_model(options.stage, options.policy_seed)
    if model.network.lora is None:
        raise RlhfError(f"stage {options.stage!r} trained no adapter: leave --adapter out, and its model is written")
    base = adapter_base(run.directory(options.stage)) if options.base is None else checked_base(options.base, model)
    export_adapter(model, options.out, base=base)
