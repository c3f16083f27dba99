"""Policies and reward models in memory, and functions that change their dtype, adapter or head."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from rlhf_jax.config import FunctionSource, ModelSource
from rlhf_jax.interop import hf
from rlhf_jax.models.lora import Adapted, LoraConfig
from rlhf_jax.models.model_config import AttentionBy, DType, ModelConfig, Remat
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.quantised import BaseDType, is_quantised
from rlhf_jax.models.scalars import ScalarNetwork
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.types import RlhfError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """Dtypes, memory options and adapter for fine-tuning an existing model. None keeps the setting of its source.

    Trained parameters, including a value function's, are float32 by default, whatever the dtype of the source; frozen
    ones (the reference, an adapter's base) keep their dtype, unless `lora.base_dtype` quantises them. 'bfloat16' saves
    memory or speeds up sampling: `optimizer.low_precision` determines how small updates are preserved; see
    `runtime/rounding.py`.
    """

    # Dtype of trained parameters, or of the base of an adapter; None: float32, or the base's own.
    param_dtype: DType | None = None
    # Dtype of the matrix products; None: as the source stage, float32 for a checkpoint.
    compute_dtype: DType | None = None
    # Recompute activations in the backward pass, and store only the inputs of blocks (True), or also the products with
    # weights ('dots'); None: as the source.
    remat: Remat | None = None
    # Run the blocks as a loop over their stacked weights: the compile time does not depend on the depth; None: as the
    # source.
    scan_layers: bool | None = None
    attention: AttentionBy = "xla"  # implementation of attention: XLA's, cuDNN's on GPUs, or splash attention on TPUs
    # User-defined family of a checkpoint, file.py:NAME (examples/family.py); None: built-in, found by config.json.
    family: FunctionSource | None = None
    lora: LoraConfig | None = None  # train this adapter and freeze the model; None: train the model

    @property
    def base_dtype(self) -> BaseDType | None:
        """Dtype in which the frozen base of an adapter is quantised; None: it is not."""
        return None if self.lora is None else self.lora.base_dtype


NO_CHANGES = Tuning()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained(Tuning):
    """Config section of a model that starts from a stage or a checkpoint."""

    init: ModelSource  # stage or checkpoint to start from


class Policy(NamedTuple):
    """Loaded language model: network, parameters and tokenizer."""

    network: PolicyNetwork
    params: PyTree
    tokenizer: Tokenizer
    hf_config: dict[str, Any] | None = None  # config.json of the original checkpoint


class RewardModel(NamedTuple):
    """Loaded reward model: network, parameters and tokenizer."""

    network: ScalarNetwork
    params: PyTree
    tokenizer: Tokenizer
    hf_config: dict[str, Any] | None = None

    def members(self) -> list["RewardModel"]:
        """List the members of an ensemble, or the model itself."""
        ensemble = self.network.ensemble
        if ensemble is None:
            return [self]
        each = [jax.tree.map(lambda leaf, k=k: leaf[k], self.params) for k in range(ensemble.members)]
        return [self._replace(network=self.network.alone, params=params) for params in each]


def merged(model: Policy | RewardModel) -> Policy | RewardModel:
    """Merge a model's adapter, if any, into its base."""
    if not isinstance(model.params, Adapted):
        return model
    params = model.network.merge(model.params)
    if isinstance(model, Policy):
        return model._replace(network=dataclasses.replace(model.network, lora=None), params=params)
    return model._replace(network=dataclasses.replace(model.network, lora=None), params=params)


def tuned(model: Policy | RewardModel, tuning: Tuning) -> Policy | RewardModel:
    """Apply the dtypes and options of `tuning` to a model. Raises RlhfError for an unsupported combination."""
    old = model.network.config
    try:
        config = dataclasses.replace(
            old,
            param_dtype=tuning.param_dtype or old.param_dtype,
            compute_dtype=tuning.compute_dtype or old.compute_dtype,
            remat=old.remat if tuning.remat is None else tuning.remat,
            scan_layers=old.scan_layers if tuning.scan_layers is None else tuning.scan_layers,
            attention=tuning.attention,
        )
    except ValueError as error:
        raise RlhfError(str(error)) from error
    params = cast(model.params, tuning.param_dtype)
    if isinstance(model, Policy):
        return model._replace(network=dataclasses.replace(model.network, config=config), params=params)
    return model._replace(network=dataclasses.replace(model.network, config=config), params=params)


def cast(params: PyTree, dtype: DType | None) -> PyTree:
    """Cast parameters to a dtype; None leaves them unchanged, as are quantised ones."""

    def one(leaf: Any) -> Any:
        return leaf if is_quantised(leaf) else leaf.astype(jnp.dtype(dtype))

    return params if dtype is None else jax.tree.map(one, params, is_leaf=is_quantised)


def body_of(model: Policy | RewardModel) -> PyTree:
    """Plain parameters of a model without its head."""
    if isinstance(model, RewardModel):
        return model.params["body"]
    return {name: leaf for name, leaf in model.params.items() if name != "head"}


def as_reward_model(policy: Policy, key: jax.Array) -> RewardModel:
    """Initialise a reward model from a policy's body and a new head (Stiennon et al. 2020) on the last token.

    The head has no bias, so that transformers can load the model as a classifier with one label.
    """
    network = ScalarNetwork(policy.network.config, policy.network.vocab_size, "last", bias=False)
    head = jax.jit(lambda key: network.init(key)["head"])(key)  # jit removes the unused body
    hf_config = policy.hf_config
    if hf_config is not None:
        hf_config = hf.classifier_config(hf_config, pad_id=policy.tokenizer.pad_id)
    return RewardModel(network, {"body": body_of(policy), "head": head}, policy.tokenizer, hf_config)


def refuse_float16(config: Tuning | ModelConfig, *, adapter: bool) -> None:
    """Raise ValueError if parameters would be trained, or gradients computed, in float16.

    Gradients below 6e-8 underflow in float16, and loss scaling is not implemented. The frozen base of an adapter may
    be float16.
    """
    for name in ("compute_dtype",) if adapter else ("param_dtype", "compute_dtype"):
        if getattr(config, name) == "float16":
            raise ValueError(
                f"{name} = 'float16' is for inference only, because small gradients underflow without loss scaling "
                "(which is not implemented): set it to 'bfloat16' or 'float32' to train"
            )
