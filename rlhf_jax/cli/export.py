"""`rlhf-jax export`: write a model as a directory that transformers loads."""

import argparse
from pathlib import Path

from rlhf_jax.cli import flags
from rlhf_jax.cli.parser import Parser
from rlhf_jax.interop.hub_upload import upload_directory
from rlhf_jax.loading.export import adapter_base, checked_base, export, export_adapter, new_directory
from rlhf_jax.loading.models import NO_CHANGES
from rlhf_jax.reports.model_card import CARD, model_card
from rlhf_jax.types import RlhfError

DESCRIPTION = """\
Write a policy or reward model, with its tokenizer and chat template, for transformers' AutoModelForCausalLM (or
AutoModelForSequenceClassification) and AutoTokenizer. The directory is created atomically. Weights keep their dtype
unless --dtype is given. The README.md of a stage's export has the record of its run: results with intervals, where and
how it was trained, and its config. --push uploads the directory to the Hugging Face Hub.
"""


def export_verb(arguments: list[str]) -> None:
    """Export the model that the arguments name."""
    parser = Parser("rlhf-jax export", DESCRIPTION)
    flags.add_model_flags(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to create")
    parser.add_argument("--adapter", action="store_true", help="write only the stage's LoRA adapter, in PEFT's format")
    parser.add_argument(
        "--base", metavar="DIR", help="with --adapter: base checkpoint on which PEFT will load the adapter"
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload the directory to this repository on the Hub")
    parser.add_argument("--private", action="store_true", help="with --push: a new repository is private")
    options = parser.parse_args(arguments)
    if options.private and options.push is None:
        raise RlhfError("--private is only used with --push: add --push=OWNER/NAME or leave --private out")
    if options.adapter:
        _export_adapter(options)
    elif options.base is not None:
        raise RlhfError("--base is only used with --adapter: add --adapter or leave --base out")
    else:
        new_directory(options.out)
        export(flags.load_model(options, NO_CHANGES), options.out)
    if options.stage is not None:
        name = options.out.name if options.push is None else options.push.rpartition("/")[2]
        (options.out / CARD).write_text(model_card(flags.stage_run(options), options.stage, name), encoding="utf-8")
    print(options.out)
    if options.push is not None:
        print(upload_directory(options.out, options.push, private=options.private))


def _export_adapter(options: argparse.Namespace) -> None:
    """Write a stage's adapter and the tokenizer."""
    if options.model is not None:
        raise RlhfError("--adapter exports the adapter of a stage: use --workdir and --stage instead of --model")
    if options.dtype is not None:
        raise RlhfError("--adapter always writes float32, as PEFT does: leave --dtype out")
    new_directory(options.out)
    run = flags.stage_run(options)
    model = run.load_model(options.stage, options.policy_seed)
    if model.network.lora is None:
        raise RlhfError(f"stage {options.stage!r} trained no adapter: leave --adapter out to export the full model")
    base = adapter_base(run.directory(options.stage)) if options.base is None else checked_base(options.base, model)
    export_adapter(model, options.out, base=base)
