"""`rlhf-jax export`: a model as a directory that transformers loads."""

import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

from rlhf_jax.cli import flags
from rlhf_jax.interop import hf, peft
from rlhf_jax.interop.description import describe
from rlhf_jax.interop.hub import MODELS, checkpoint_directory
from rlhf_jax.loading import models
from rlhf_jax.loading.models import NO_CHANGES, Policy, RewardModel
from rlhf_jax.models.lora import Adapted
from rlhf_jax.text.hf_tokenizer import GENERATION_FILE, as_pretrained, suppression
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
    if options.out.exists():
        raise RlhfError(f"--out={options.out} is there already: name a new directory, or remove it")
    if options.adapter:
        _export_adapter(options)
    elif options.base is not None:
        raise RlhfError("--base says where an adapter finds its base: give --adapter too, or leave it out")
    else:
        export(flags.load_model(options, NO_CHANGES), options.out)
    print(options.out)


def export(model: Policy | RewardModel, out: Path) -> None:
    """Writes a model, one from scratch as a checkpoint of a family that has its shape; whole or not at all.

    Raises RlhfError for a shape that no family has, and for a reward model that transformers would read otherwise.
    """
    _refuse_other_readings(model)
    model = described(model)
    assert model.hf_config is not None
    with _whole(out) as partial:
        hf.save_pretrained(partial, _kind(model), model.params, model.hf_config)
        model.tokenizer.save(partial)
        if isinstance(model, Policy):
            _write_generation_config(model, partial)


def _export_adapter(options: argparse.Namespace) -> None:
    """Writes what a stage trained beside its base, and the tokenizer."""
    if options.model is not None:
        raise RlhfError(
            "--adapter asks for what a stage trained beside its base, and --model is a whole model: name a stage"
        )
    if options.dtype is not None:
        raise RlhfError("--adapter writes float32, as PEFT does: leave --dtype out")
    run = flags.stage_run(options)
    model = run.load_model(options.stage, options.policy_seed)
    _refuse_other_readings(model)
    lora = model.network.lora
    if lora is None or not isinstance(model.params, Adapted):
        raise RlhfError(f"stage {options.stage!r} trained no adapter: leave --adapter out, and its model is written")
    base = _named_base(run.directory(options.stage)) if options.base is None else _checked_base(options.base, model)
    model = described(model)
    assert model.hf_config is not None
    with _whole(options.out) as partial:
        peft.save_adapter(partial, _kind(model), model.params, lora, model.hf_config, base=base)
        model.tokenizer.save(partial)


def _named_base(directory: Path) -> str:
    """What PEFT finds the base of a stage's adapter by. Raises RlhfError where it cannot."""
    base = models.base_of(directory)
    assert base is not None, directory
    if base.is_stage:
        raise RlhfError(
            f"stage {directory.name!r} trained its adapter beside stage {base.name!r}, which PEFT cannot load: export "
            f"that one first (--stage={base.name} --out=BASE), then say --base=BASE"
        )
    place = checkpoint_directory(base.name)
    if peft.base_of(place) is not None:
        raise RlhfError(
            f"stage {directory.name!r} began with {base.name}, an adapter itself, beside which PEFT loads no other: "
            f"merge it first (rlhf-jax export --model={base.name} --out=BASE), then say --base=BASE"
        )
    on_the_hub = not (Path(base.name).is_dir() or base.name.endswith(".gguf") or base.name in MODELS)
    return base.name if on_the_hub else str(place.resolve())


def _checked_base(source: str, model: Policy | RewardModel) -> str:
    """The same, as it was given. Raises RlhfError where it is another model than the one trained beside."""
    found = models.load_checkpoint(source)
    theirs, ours = models.body_of(found), models.body_of(model._replace(params=model.params.base))
    shapes = jax.tree.map(jnp.shape, theirs) == jax.tree.map(jnp.shape, ours)
    if not shapes or not jax.tree.all(jax.tree.map(lambda a, b: jnp.array_equal(a, b.astype(a.dtype)), theirs, ours)):
        raise RlhfError(f"--base={source} is not what the adapter was trained beside: its weights are others")
    return str(Path(source).resolve()) if Path(source).is_dir() else source


def _kind(model: Policy | RewardModel) -> hf.Kind:
    return "policy" if isinstance(model, Policy) else "reward"


@contextlib.contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """Where to write what shall be found at `out` once all of it is written."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
            partial = Path(temporary) / out.name
            yield partial
            partial.rename(out)
    except OSError as error:
        raise RlhfError(f"{out} cannot be written: {error.strerror or error}. Nothing was left there") from error


def _refuse_other_readings(model: Policy | RewardModel) -> None:
    """Raises RlhfError for a reward model that transformers would read otherwise."""
    if isinstance(model, RewardModel) and model.network.ensemble is not None:
        raise RlhfError(
            f"the reward model is an ensemble of {model.network.ensemble.members}, and a checkpoint holds one model: "
            "export a stage that trained one"
        )
    if isinstance(model, RewardModel) and model.network.pooling != "last":
        raise RlhfError(
            f"the reward model reads its score with pooling = {model.network.pooling!r}, and transformers' classifiers "
            "read the last token: its scores would be others there. Train it with pooling = 'last'"
        )


def described(model: Policy | RewardModel) -> Policy | RewardModel:
    """A model from scratch as a checkpoint would be; others are given back. Raises RlhfError where no family has it."""
    if model.hf_config is not None:
        return model
    tokenizer = as_pretrained(model.tokenizer)
    ids = {"bos_token_id": tokenizer.start_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    hf_config = describe(model.network.config, model.network.vocab_size, **ids)
    if isinstance(model, RewardModel):
        hf_config = hf.classifier_config(hf_config, pad_id=tokenizer.pad_id)
    return model._replace(tokenizer=tokenizer, hf_config=hf_config)


def _write_generation_config(policy: Policy, directory: Path) -> None:
    """What ends a response (more than the tokenizer's own EOS, where chats end otherwise), and what is never in one."""
    stops, start = policy.tokenizer.stop_ids, (policy.hf_config or {}).get("bos_token_id")
    content = {"eos_token_id": list(stops) if len(stops) > 1 else stops[0], "pad_token_id": policy.tokenizer.pad_id}
    content |= {} if start is None else {"bos_token_id": start}
    content |= suppression(policy.network.suppressed)
    (directory / GENERATION_FILE).write_text(json.dumps(content, indent=2) + "\n")
