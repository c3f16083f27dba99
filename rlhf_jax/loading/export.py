"""Write models as directories that transformers and PEFT load."""

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.interop import hf, mean_pooled, peft
from rlhf_jax.interop.description import describe
from rlhf_jax.interop.hub import MODELS, checkpoint_directory
from rlhf_jax.loading import models, pretrained, stage_models
from rlhf_jax.loading.models import Policy, RewardModel
from rlhf_jax.models.lora import Adapted
from rlhf_jax.models.quantised import quantised
from rlhf_jax.text.hf_tokenizer import GENERATION_FILE, as_pretrained, suppression
from rlhf_jax.types import RlhfError


def export(model: Policy | RewardModel, directory: str | Path) -> Path:
    """Write a model with its tokenizer and chat template as a Hugging Face directory, atomically.

        export(policy, "mine")
        load_policy("mine")  # or transformers' AutoModelForCausalLM and AutoTokenizer

    A model trained from scratch is written in a family that supports its architecture; an adapter is merged into its
    base. Configs accept the directory wherever they name a checkpoint, such as in `evaluate.policies`.

    Returns: the directory, as a path.

    A mean-pooled reward model is written with a class of its own, which transformers loads with
    `trust_remote_code=True`.

    Raises RlhfError if the directory exists, if no family supports the architecture, or if transformers would compute
    different scores with a reward model.
    """
    out = new_directory(directory)
    _check_exportable(model)
    model, hf_config = with_hf_config(models.merged(model))
    if isinstance(model, RewardModel):
        model, hf_config = _with_pooling(model, hf_config)
    with _atomic_directory(out) as partial:
        hf.save_pretrained(partial, _kind(model), model.params, hf_config)
        model.tokenizer.save(partial)
        if isinstance(model, Policy):
            _write_generation_config(model, partial)
    return out


def export_adapter(model: Policy | RewardModel, directory: str | Path, *, base: str) -> Path:
    """Write only a model's adapter, in PEFT's format, and the tokenizer, atomically.

    Args: base is the path or hub id from which PEFT loads the base: `adapter_base` of the stage, or `checked_base`.

    Raises RlhfError as `export` does, and if the model has no adapter.
    """
    out = new_directory(directory)
    _check_exportable(model)
    if isinstance(model, RewardModel) and model.network.pooling != "last":
        raise RlhfError(
            f"the reward model has pooling = {model.network.pooling!r}, which PEFT's classifiers do not have: leave "
            "--adapter out to export the full model with a class of its own"
        )
    lora = model.network.lora
    if lora is None or not isinstance(model.params, Adapted):
        raise RlhfError("the model has no adapter: use export")
    model, hf_config = with_hf_config(model)
    with _atomic_directory(out) as partial:
        peft.save_adapter(partial, _kind(model), model.params, lora, hf_config, base=base)
        model.tokenizer.save(partial)
    return out


def new_directory(directory: str | Path) -> Path:
    """Return the path of a directory to create. Raises RlhfError if it exists."""
    if Path(directory).exists():
        raise RlhfError(f"{directory} already exists: choose a new directory or remove it")
    return Path(directory)


def adapter_base(directory: Path) -> str:
    """Return the path or hub id from which PEFT loads the base of a stage's adapter.

    Raises RlhfError if the stage trained no adapter, or if PEFT cannot load the base.
    """
    base = stage_models.base_of(directory)
    if base is None:
        raise RlhfError(f"stage {directory.name!r} trained no adapter: export the full model")
    if base.is_stage:
        raise RlhfError(
            f"stage {directory.name!r} trained its adapter on stage {base.name!r}, which PEFT cannot load: export that "
            f"stage first (--stage={base.name} --out=BASE), then pass --base=BASE"
        )
    local = checkpoint_directory(base.name)
    if peft.base_of(local) is not None:
        raise RlhfError(
            f"stage {directory.name!r} started from {base.name}, which is itself an adapter, and PEFT cannot stack "
            f"adapters: merge it first (rlhf-jax export --model={base.name} --out=BASE), then pass --base=BASE"
        )
    on_the_hub = not (Path(base.name).is_dir() or base.name.endswith(".gguf") or base.name in MODELS)
    return base.name if on_the_hub else str(local.resolve())


def checked_base(source: str, model: Policy | RewardModel) -> str:
    """Return the path or hub id of a base, after checking that the adapter was trained on its weights.

    Weights are compared in the dtype of the base's checkpoint. Raises RlhfError if they differ.
    """
    given = models.body_of(pretrained.load_checkpoint(source, pretrained.same_family(model.hf_config)))
    trained = models.body_of(model._replace(params=model.params.base))
    if model.network.lora is not None:
        given = quantised(given, model.network.lora.base_dtype)
    shapes = jax.tree.map(jnp.shape, given) == jax.tree.map(jnp.shape, trained)
    if not shapes or not jax.tree.all(jax.tree.map(lambda a, b: jnp.array_equal(a, b.astype(a.dtype)), given, trained)):
        raise RlhfError(f"--base={source} is not the base that the adapter was trained on: the weights differ")
    return str(Path(source).resolve()) if Path(source).is_dir() else source


def _kind(model: Policy | RewardModel) -> hf.Role:
    return "policy" if isinstance(model, Policy) else "reward"


@contextlib.contextmanager
def _atomic_directory(out: Path) -> Iterator[Path]:
    """Yield a temporary directory that is renamed to `out` on success."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
            partial = Path(temporary) / out.name
            yield partial
            partial.rename(out)
    except OSError as error:
        raise RlhfError(f"{out} cannot be written: {error.strerror or error}. Nothing was written") from error


def _check_exportable(model: Policy | RewardModel) -> None:
    """Raise RlhfError for a reward model that a checkpoint cannot hold."""
    if isinstance(model, RewardModel) and model.network.ensemble is not None:
        raise RlhfError(
            f"the reward model is an ensemble of {model.network.ensemble.members}, but a checkpoint holds one model: "
            "export a stage that trained a single model"
        )


def _with_pooling(model: RewardModel, hf_config: dict[str, Any]) -> tuple[RewardModel, dict[str, Any]]:
    """Return the model with its config for its pooling; a mean-pooled model gets a bias if it has none."""
    head = model.params["head"]
    if model.network.pooling == "mean" and "bias" not in head:
        head = head | {"bias": jnp.zeros(1, head["kernel"].dtype)}
        network = dataclasses.replace(model.network, bias=True)
        model = model._replace(network=network, params=model.params | {"head": head})
    return model, mean_pooled.with_pooling(hf_config, model.network.pooling)


def with_hf_config(model: Policy | RewardModel) -> tuple[Policy | RewardModel, dict[str, Any]]:
    """Return a model with its Hugging Face config, which is created for a model trained from scratch.

    Raises RlhfError if no family supports the architecture.
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
    """Write the stop tokens (chats may end with a token other than EOS) and the tokens that are never sampled."""
    stops, start = policy.tokenizer.stop_ids, (policy.hf_config or {}).get("bos_token_id")
    content = {"eos_token_id": list(stops) if len(stops) > 1 else stops[0], "pad_token_id": policy.tokenizer.pad_id}
    content |= {} if start is None else {"bos_token_id": start}
    content |= suppression(policy.network.suppressed)
    (directory / GENERATION_FILE).write_text(json.dumps(content, indent=2) + "\n")
