"""Load checkpoints of language models and reward models from Hugging Face directories, GGUF files and the Hub."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from rlhf_jax import processes
from rlhf_jax.config import FunctionSource
from rlhf_jax.interop import hf, peft
from rlhf_jax.interop.families import USER_FAMILY
from rlhf_jax.interop.hub import base_directory, checkpoint_directory, checkpoint_tokenizer
from rlhf_jax.loading.models import NO_CHANGES, Policy, RewardModel, Tuning
from rlhf_jax.models.model_config import DType
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.quantised import quantise
from rlhf_jax.models.sharding import Where
from rlhf_jax.types import RlhfError


def load_policy(source: str | Path, *, dtype: DType = "float32", family: str | None = None) -> Policy:
    """Load a language model with its tokenizer.

        policy = load_policy("smollm2")

    Args:
        source: a directory with a Hugging Face checkpoint, an exported model or a PEFT adapter (merged into its base),
            a GGUF file, OWNER/NAME on the Hub, or `smollm2`. For a stage's policy use `Run.load_policy`.
        dtype: dtype of parameters and computation.
        family: your own model family with which to read the checkpoint, FILE.py:NAME (`examples/family.py`).

    Raises RlhfError if there is no model, its family is not supported, or it is a reward model.
    """
    model = load_checkpoint(str(source), _tuning(dtype, family))
    if not isinstance(model, Policy):
        raise RlhfError(f"{source} is a reward model, not a language model: use load_reward_model")
    return model


def load_reward_model(source: str | Path, *, dtype: DType = "float32", family: str | None = None) -> RewardModel:
    """Load a reward model, a classifier with one label, with its tokenizer.

        reward_model = load_reward_model("path/to/classifier")

    Args: source, dtype and family as for `load_policy`.
    Raises RlhfError if there is no model, its family is not supported, or it is a language model.
    """
    model = load_checkpoint(str(source), _tuning(dtype, family))
    if not isinstance(model, RewardModel):
        raise RlhfError(f"{source} is a language model, not a reward model: use load_policy")
    return model


def load_checkpoint(source: str, tuning: Tuning = NO_CHANGES, *, where: Where | None = None) -> Policy | RewardModel:
    """Load a pretrained model from a Hugging Face directory, a GGUF file, or a Hub id.

    A PEFT adapter is merged into the base that it names. Each parameter is read directly to the devices given by
    `where` (default: the first device), and quantised there if it is of an adapter's base (not if that base is itself
    merged with an adapter).
    Raises RlhfError if there is no model, its family is not supported, or it has no tokenizer.
    """
    directory = checkpoint_directory(source)
    base = base_directory(directory)
    base_dtype = tuning.base_dtype if base == directory else None

    def place(path: str, array: np.ndarray) -> PyTree:
        placed = jax.device_put(array) if where is None else processes.place(array, where(path, array.shape))
        return quantise(path, placed, base_dtype)

    pretrained = hf.load_pretrained(
        str(base),
        param_dtype=tuning.param_dtype,
        compute_dtype=tuning.compute_dtype or "float32",
        remat=tuning.remat or False,
        scan_layers=bool(tuning.scan_layers),
        attention=tuning.attention,
        family=tuning.family,
        place=place,
    )
    tokenizer = checkpoint_tokenizer(directory, base)
    if base != directory:
        pretrained = peft.with_adapter(directory, pretrained, pad_id=tokenizer.pad_id)
    if tokenizer.vocab_size > pretrained.vocab_size:
        raise RlhfError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} tokens, but the model only {pretrained.vocab_size}: "
            "they do not belong to the same checkpoint"
        )
    network = hf.network_of(pretrained)
    if isinstance(network, PolicyNetwork):
        network = dataclasses.replace(network, suppressed=tokenizer.suppressed)
        return Policy(network, pretrained.params, tokenizer, pretrained.hf_config)
    return RewardModel(network, pretrained.params, tokenizer, pretrained.hf_config)


def same_family(hf_config: dict[str, Any] | None) -> Tuning:
    """Return settings for reading another checkpoint of a model's family, which may be user-defined."""
    source = (hf_config or {}).get(USER_FAMILY)
    return NO_CHANGES if source is None else Tuning(family=source)


def _tuning(dtype: DType, family: str | None) -> Tuning:
    return Tuning(param_dtype=dtype, compute_dtype=dtype, family=None if family is None else FunctionSource(family))
