"""Models that stages exchange: save and load them, or load pretrained checkpoints."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from rlhf_jax import config as configs
from rlhf_jax.config import FunctionSource, ModelSource
from rlhf_jax.interop import hf, peft
from rlhf_jax.interop.families import USER_FAMILY
from rlhf_jax.interop.hub import MODELS, base_directory, checkpoint_directory, checkpoint_tokenizer
from rlhf_jax.models.lora import Adapted, LoraConfig
from rlhf_jax.models.model_config import AttentionBy, DType, ModelConfig
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.reward_ensemble import EnsembleConfig
from rlhf_jax.models.scalars import ScalarNetwork, normalised_head
from rlhf_jax.models.sharding import Where
from rlhf_jax.runtime.checkpoints import load_params
from rlhf_jax.runtime.files import read_json, write_json
from rlhf_jax.text.tokenizer import Tokenizer, load_tokenizer
from rlhf_jax.types import RlhfError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """Dtypes, memory options and adapter for fine-tuning an existing model. None keeps the setting of its source.

    Trained parameters, including a value function's, are float32 by default, whatever the dtype of the source; frozen
    ones (the reference, an adapter's base) keep their dtype. 'bfloat16' saves memory or speeds up sampling:
    `optimizer.low_precision` determines how small updates are preserved; see `runtime/rounding.py`.
    """

    # Dtype of trained parameters, or of the base of an adapter; None: float32, or the base's own.
    param_dtype: DType | None = None
    # Dtype of the matrix products; None: as the source stage, float32 for a checkpoint.
    compute_dtype: DType | None = None
    remat: bool | None = None  # recompute activations in the backward pass; None: as the source
    attention: AttentionBy = "xla"  # implementation of attention: XLA's, or cuDNN's on GPUs
    # Family of a checkpoint that none here covers, as file.py:NAME (examples/family.py); None: by its config.json.
    family: FunctionSource | None = None
    lora: LoraConfig | None = None  # adapter to train, while the model itself stays as it is; None: train the model


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


class Base(NamedTuple):
    """Base model of an adapter: an earlier stage's model, or a checkpoint."""

    name: str
    is_stage: bool


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


Find = Callable[[str], Path]
"""Function from a stage's name to its directory."""


def save_policy_spec(directory: Path, policy: Policy, seeds: range, *, base: Base | None = None) -> None:
    """Write `model.json` and `tokenizer/`, which are needed to load a policy from its checkpoints.

    Args: base is the base model if only an adapter is trained.
    """
    _save_spec(directory, policy, {"network": "policy", "seeds": [seeds.start, seeds.stop]}, base)


def save_reward_spec(
    directory: Path, model: RewardModel, *, base: Base | None = None, moments: list[tuple[float, float]] | None = None
) -> None:
    """Write `model.json` and `tokenizer/`, which are needed to load a reward model from its checkpoints.

    Args: moments are the mean and standard deviation by which scores are normalised, for every ensemble member.
    """
    network = model.network
    more = {"network": "reward", "pooling": network.pooling, "bias": network.bias}
    ensemble = None if network.ensemble is None else dataclasses.asdict(network.ensemble)
    _save_spec(directory, model, {**more, "ensemble": ensemble, "moments": moments}, base)


def load_stage(
    directory: Path, *, seed: int, find: Find | None = None, where: Where | None = None
) -> Policy | RewardModel:
    """Load the model that a stage trained. Raises RlhfError if it trained none."""
    if _read_spec(directory)["network"] == "policy":
        return load_stage_policy(directory, seed=seed, step=None, find=find, where=where)
    return load_stage_reward_model(directory, find=find, where=where)


def load_stage_policy(
    directory: Path, *, seed: int, step: int | None, find: Find | None = None, where: Where | None = None
) -> Policy:
    """Load a stage's policy, with `Adapted` parameters if the stage trained an adapter.

    Args: find locates the stage of an adapter's base (default: next to this stage); where gives the sharding of each
    parameter (default: the first device).
    Raises RlhfError if the stage trains no policy, or has no such seed or checkpoint.
    """
    spec = _spec_of(directory, "policy")
    tokenizer = load_tokenizer(directory / "tokenizer")
    config, lora = _model_config(spec, directory), _lora(spec, directory)
    network = PolicyNetwork(config, spec["vocab_size"], tokenizer.suppressed, lora)
    first, stop = spec["seeds"]
    if not first <= seed < stop:
        raise RlhfError(f"{directory} has seeds {first} to {stop - 1}, not {seed}")
    like = jax.eval_shape(network.init, jax.random.key(0))
    if lora is not None:
        like = jax.eval_shape(network.init_adapter, like, jax.random.key(0))
    if stop - first > 1:
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((stop - first, *leaf.shape), leaf.dtype), like)
    params = load_params(directory / "checkpoints", "policy", like, step=step, where=where)
    if stop - first > 1:
        params = jax.tree.map(lambda leaf: leaf[seed - first], params)
    if lora is not None:
        base = _load_base(directory, find, where)
        assert isinstance(base, Policy)
        params = Adapted(cast(base.params, config.param_dtype), params)
    return Policy(network, params, tokenizer, spec["hf_config"])


def load_stage_reward_model(directory: Path, *, find: Find | None = None, where: Where | None = None) -> RewardModel:
    """Load a stage's reward model; arguments as for `load_stage_policy`. Raises RlhfError if the stage trains none.

    The normalisation of scores is folded into the head. An ensemble's adapters are merged.
    """
    spec = _spec_of(directory, "reward")
    config, lora = _model_config(spec, directory), _lora(spec, directory)
    network = ScalarNetwork(config, spec["vocab_size"], spec["pooling"], spec["bias"], lora)
    ensemble = None
    if spec["ensemble"] is not None:
        ensemble = configs.build(EnsembleConfig, spec["ensemble"], f"{directory / 'model.json'}: ensemble")
    like = jax.eval_shape(network.init, jax.random.key(0))
    if lora is not None:
        like = jax.eval_shape(network.init_adapter, like, jax.random.key(0))
    if ensemble is not None:
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((ensemble.members, *leaf.shape), leaf.dtype), like)
    params = load_params(directory / "checkpoints", "reward", like, step=None, where=where)
    if spec["moments"] is not None:
        params = params | {"head": normalised_head(params["head"], spec["moments"], stacked=ensemble is not None)}
        network = dataclasses.replace(network, bias=True)
    if lora is not None:
        base = _load_base(directory, find, where)
        body = cast(body_of(base), config.param_dtype)
        if ensemble is None:
            params = Adapted({"body": body, "head": params["head"]}, params)
        else:
            params = jax.vmap(lambda member: network.merge(Adapted({"body": body}, member)))(params)
            network = dataclasses.replace(network, lora=None)
    network = dataclasses.replace(network, ensemble=ensemble)
    return RewardModel(network, params, load_tokenizer(directory / "tokenizer"), spec["hf_config"])


def merged(model: Policy | RewardModel) -> Policy | RewardModel:
    """Merge a model's adapter, if any, into its base."""
    if not isinstance(model.params, Adapted):
        return model
    params = model.network.merge(model.params)
    if isinstance(model, Policy):
        return model._replace(network=dataclasses.replace(model.network, lora=None), params=params)
    return model._replace(network=dataclasses.replace(model.network, lora=None), params=params)


def load_checkpoint(source: str, tuning: Tuning = NO_CHANGES, *, where: Where | None = None) -> Policy | RewardModel:
    """Load a pretrained model from a Hugging Face directory, a GGUF file, or a Hub id.

    A PEFT adapter is merged into the base that it names. Each parameter is read directly to the devices given by
    `where` (default: the first device).
    Raises RlhfError if there is no model, its family is not supported, or it has no tokenizer.
    """
    directory = checkpoint_directory(source)
    base = base_directory(directory)
    pretrained = hf.load_pretrained(
        str(base),
        param_dtype=tuning.param_dtype,
        compute_dtype=tuning.compute_dtype or "float32",
        remat=bool(tuning.remat),
        attention=tuning.attention,
        family=tuning.family,
        place=None if where is None else lambda path, array: jax.device_put(array, where(path, array.shape)),
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
    """Return how to read another checkpoint of a model's family, which may be a user's own."""
    source = (hf_config or {}).get(USER_FAMILY)
    return NO_CHANGES if source is None else Tuning(family=source)


def tuned(model: Policy | RewardModel, tuning: Tuning) -> Policy | RewardModel:
    """Apply the dtypes and options of `tuning` to a model. Raises RlhfError for an unsupported combination."""
    old = model.network.config
    try:
        config = dataclasses.replace(
            old,
            param_dtype=tuning.param_dtype or old.param_dtype,
            compute_dtype=tuning.compute_dtype or old.compute_dtype,
            remat=old.remat if tuning.remat is None else tuning.remat,
            attention=tuning.attention,
        )
    except ValueError as error:
        raise RlhfError(str(error)) from error
    params = cast(model.params, tuning.param_dtype)
    if isinstance(model, Policy):
        return model._replace(network=dataclasses.replace(model.network, config=config), params=params)
    return model._replace(network=dataclasses.replace(model.network, config=config), params=params)


def refuse_float16(config: Tuning | ModelConfig, *, adapter: bool) -> None:
    """Raise ValueError if parameters would be trained, or gradients computed, in float16.

    Gradients below 6e-8 underflow in float16, and loss scaling is not implemented. The frozen base of an adapter may
    be float16.
    """
    for name in ("compute_dtype",) if adapter else ("param_dtype", "compute_dtype"):
        if getattr(config, name) == "float16":
            raise ValueError(
                f"{name} = 'float16' is for inference alone, because small gradients underflow without loss scaling "
                "(which is not implemented): set it to 'bfloat16' or 'float32' to train"
            )


def cast(params: PyTree, dtype: DType | None) -> PyTree:
    """Cast parameters to a dtype; None leaves them unchanged."""
    return params if dtype is None else jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), params)


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


def base_of(directory: Path) -> Base | None:
    """Base model of a stage's adapter; None if the stage trained the full model."""
    spec = _read_spec(directory)
    name, is_stage = spec["base"], spec.get("base_is_stage")
    if name is None or spec["lora"] is None:
        return None
    if is_stage is None:  # workdirs of earlier versions do not say
        is_stage = not (name in MODELS or "/" in name or name.endswith(".gguf"))
    return Base(name, is_stage)


def _save_spec(directory: Path, model: Policy | RewardModel, more: dict[str, Any], base: Base | None) -> None:
    model.tokenizer.save(directory / "tokenizer")
    network = model.network
    lora = None if network.lora is None else dataclasses.asdict(network.lora)
    config = dataclasses.replace(network.config, attention="xla")  # others read the model on other machines
    spec = {"config": dataclasses.asdict(config), "vocab_size": network.vocab_size, "lora": lora}
    of_base = {"base": None} if base is None else {"base": base.name, "base_is_stage": base.is_stage}
    write_json(directory / "model.json", {**spec, "hf_config": model.hf_config, **more, **of_base})


def _read_spec(directory: Path) -> dict[str, Any]:
    if not (directory / "model.json").exists():
        raise RlhfError(f"stage {directory.name!r} in {directory.parent} trains no model: name one that does")
    earlier = {"lora": None, "hf_config": None, "base": None, "ensemble": None, "moments": None}  # versions have none
    return earlier | read_json(directory / "model.json")


def _spec_of(directory: Path, network: str) -> dict[str, Any]:
    spec = _read_spec(directory)
    if spec["network"] != network:
        raise RlhfError(f"stage {directory.name!r} in {directory.parent} trains a {spec['network']}, not a {network}")
    return spec


def _lora(spec: dict[str, Any], directory: Path) -> LoraConfig | None:
    if spec["lora"] is None:
        return None
    return configs.build(LoraConfig, spec["lora"], f"{directory / 'model.json'}: lora")


def _load_base(directory: Path, find: Find | None, where: Where | None) -> Policy | RewardModel:
    """Load the base of a stage's adapter (of its first seed, if the base stage has several)."""
    base = base_of(directory)
    assert base is not None, directory
    if not base.is_stage:
        return load_checkpoint(base.name, same_family(_read_spec(directory)["hf_config"]), where=where)
    sibling = directory.parent / base.name  # preferred: elsewhere, a stage of that name may have been rerun
    source = sibling if find is None or (sibling / "complete.json").exists() else find(base.name)
    return merged(load_stage(source, seed=_read_spec(source).get("seeds", [0])[0], find=find, where=where))


def _model_config(spec: dict[str, Any], directory: Path) -> ModelConfig:
    return configs.build(ModelConfig, spec["config"], f"{directory / 'model.json'}: config")
