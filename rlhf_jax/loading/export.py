"""Write models as directories that transformers and PEFT load."""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.interop import hf, peft
from rlhf_jax.interop.description import describe
from rlhf_jax.interop.hub import MODELS, checkpoint_directory
from rlhf_jax.loading import models
from rlhf_jax.loading.models import Policy, RewardModel
from rlhf_jax.models.lora import Adapted
from rlhf_jax.text.hf_tokenizer import GENERATION_FILE, as_pretrained, suppression
from rlhf_jax.types import RlhfError


def export(model: Policy | RewardModel, directory: str | Path) -> Path:
    """Write a model with its tokenizer and chat template as a Hugging Face directory, whole or not at all.

        export(policy, "mine")
        load_policy("mine")  # or transformers' AutoModelForCausalLM and AutoTokenizer

    A model trained from scratch is written as the family that has its shape; an adapter is merged into its base. The
    directory may stand wherever a config names a checkpoint, such as `evaluate.policies`.

    Returns: the directory, as a path.

    Raises RlhfError where the directory exists, for a shape that no family has, and for a reward model that
    transformers would read otherwise.
    """
    out = new_directory(directory)
    _refuse_other_readings(model)
    model, hf_config = described(models.merged(model))
    with _whole(out) as partial:
        hf.save_pretrained(partial, _kind(model), model.params, hf_config)
        model.tokenizer.save(partial)
        if isinstance(model, Policy):
            _write_generation_config(model, partial)
    return out


def export_adapter(model: Policy | RewardModel, directory: str | Path, *, base: str) -> Path:
    """Write a model's adapter alone as PEFT loads it, with the tokenizer; whole or not at all.

    Args: base is the path or the hub id by which PEFT finds the base: `adapter_base` of the stage, or `checked_base`.

    Raises RlhfError as `export` does, and where the model has no adapter.
    """
    out = new_directory(directory)
    _refuse_other_readings(model)
    lora = model.network.lora
    if lora is None or not isinstance(model.params, Adapted):
        raise RlhfError("the model has no adapter: export it whole")
    model, hf_config = described(model)
    with _whole(out) as partial:
        peft.save_adapter(partial, _kind(model), model.params, lora, hf_config, base=base)
        model.tokenizer.save(partial)
    return out


def new_directory(directory: str | Path) -> Path:
    """Return the path of a directory that is to be written. Raises RlhfError where it exists."""
    if Path(directory).exists():
        raise RlhfError(f"{directory} is there already: name a new directory, or remove it")
    return Path(directory)


def adapter_base(directory: Path) -> str:
    """Return the path or hub id by which PEFT finds the base of a stage's adapter.

    Raises RlhfError where the stage trained no adapter, and where PEFT cannot load the base.
    """
    base = models.base_of(directory)
    if base is None:
        raise RlhfError(f"stage {directory.name!r} trained no adapter: export its model whole")
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


def checked_base(source: str, model: Policy | RewardModel) -> str:
    """Return the path or hub id of a base that was named.

    Raises RlhfError unless its weights are those that the adapter was trained beside.
    """
    found = models.load_checkpoint(source)
    named, own = models.body_of(found), models.body_of(model._replace(params=model.params.base))
    shapes = jax.tree.map(jnp.shape, named) == jax.tree.map(jnp.shape, own)
    if not shapes or not jax.tree.all(jax.tree.map(lambda a, b: jnp.array_equal(a, b.astype(a.dtype)), named, own)):
        raise RlhfError(f"--base={source} is not what the adapter was trained beside: its weights are others")
    return str(Path(source).resolve()) if Path(source).is_dir() else source


def _kind(model: Policy | RewardModel) -> hf.Kind:
    return "policy" if isinstance(model, Policy) else "reward"


@contextlib.contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """Give a temporary directory that becomes `out` once all of it is written."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
            partial = Path(temporary) / out.name
            yield partial
            partial.rename(out)
    except OSError as error:
        raise RlhfError(f"{out} cannot be written: {error.strerror or error}. Nothing was left there") from error


def _refuse_other_readings(model: Policy | RewardModel) -> None:
    """Raise RlhfError for a reward model that transformers would read otherwise."""
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


def described(model: Policy | RewardModel) -> tuple[Policy | RewardModel, dict[str, Any]]:
    """Return a model with the config of its checkpoint, which is made for a model trained from scratch.

    Raises RlhfError where no family has the model's shape.
    """
    if model.hf_config is not None:
        return model, model.hf_config
    tokenizer = as_pretrained(model.tokenizer)
    ids = {"bos_token_id": tokenizer.start_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    hf_config = describe(model.network.config, model.network.vocab_size, **ids)
    if isinstance(model, RewardModel):
        hf_config = hf.classifier_config(hf_config, pad_id=tokenizer.pad_id)
    return model._replace(tokenizer=tokenizer, hf_config=hf_config), hf_config


def _write_generation_config(policy: Policy, directory: Path) -> None:
    """Write the tokens that end a response (chats may end otherwise than by EOS), and those never in one."""
    stops, start = policy.tokenizer.stop_ids, (policy.hf_config or {}).get("bos_token_id")
    content = {"eos_token_id": list(stops) if len(stops) > 1 else stops[0], "pad_token_id": policy.tokenizer.pad_id}
    content |= {} if start is None else {"bos_token_id": start}
    content |= suppression(policy.network.suppressed)
    (directory / GENERATION_FILE).write_text(json.dumps(content, indent=2) + "\n")
