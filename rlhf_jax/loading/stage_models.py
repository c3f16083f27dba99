"""Save the description of a stage's model, and load the model in later stages."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from rlhf_jax import config as configs
from rlhf_jax import processes
from rlhf_jax.interop.hub import MODELS
from rlhf_jax.loading.models import Policy, RewardModel, body_of, cast, merged
from rlhf_jax.loading.pretrained import load_checkpoint, same_family
from rlhf_jax.models.lora import Adapted, LoraConfig
from rlhf_jax.models.model_config import ModelConfig
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.quantised import quantised
from rlhf_jax.models.reward_ensemble import EnsembleConfig
from rlhf_jax.models.scalars import ScalarNetwork, normalised_head
from rlhf_jax.models.sharding import Where
from rlhf_jax.runtime.checkpoints import load_params
from rlhf_jax.runtime.files import read_json, write_json
from rlhf_jax.text.tokenizer import load_tokenizer
from rlhf_jax.types import RlhfError


class Base(NamedTuple):
    """Base model of an adapter: an earlier stage's model, or a checkpoint."""

    name: str
    is_stage: bool


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
        params = Adapted(quantised(cast(base.params, config.param_dtype), lora.base_dtype), params)
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
        body = quantised(cast(body_of(base), config.param_dtype), lora.base_dtype)
        if ensemble is None:
            params = Adapted({"body": body, "head": params["head"]}, params)
        else:
            params = jax.vmap(lambda member: network.merge(Adapted({"body": body}, member)))(params)
            network = dataclasses.replace(network, lora=None)
    network = dataclasses.replace(network, ensemble=ensemble)
    return RewardModel(network, params, load_tokenizer(directory / "tokenizer"), spec["hf_config"])


def base_of(directory: Path) -> Base | None:
    """Base model of a stage's adapter; None if the stage trained the full model."""
    spec = _read_spec(directory)
    name, is_stage = spec["base"], spec.get("base_is_stage")
    if name is None or spec["lora"] is None:
        return None
    if is_stage is None:  # missing in workdirs of earlier versions
        is_stage = not (name in MODELS or "/" in name or name.endswith(".gguf"))
    return Base(name, is_stage)


def _save_spec(directory: Path, model: Policy | RewardModel, more: dict[str, Any], base: Base | None) -> None:
    if processes.is_first():
        model.tokenizer.save(directory / "tokenizer")
    network = model.network
    lora = None if network.lora is None else dataclasses.asdict(network.lora)
    config = dataclasses.replace(network.config, attention="xla")  # the model may be loaded on other hardware
    spec = {"config": dataclasses.asdict(config), "vocab_size": network.vocab_size, "lora": lora}
    of_base = {"base": None} if base is None else {"base": base.name, "base_is_stage": base.is_stage}
    write_json(directory / "model.json", {**spec, "hf_config": model.hf_config, **more, **of_base})


def _read_spec(directory: Path) -> dict[str, Any]:
    if not (directory / "model.json").exists():
        raise RlhfError(f"stage {directory.name!r} in {directory.parent} trains no model: name a stage that does")
    earlier = {"lora": None, "hf_config": None, "base": None, "ensemble": None, "moments": None}  # not in older files
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
    if base is None:
        raise RlhfError(f"{directory / 'model.json'} does not name the base of its adapter")
    if not base.is_stage:
        return load_checkpoint(base.name, same_family(_read_spec(directory)["hf_config"]), where=where)
    sibling = directory.parent / base.name  # preferred, because a stage of that name may have been rerun elsewhere
    source = sibling if find is None or (sibling / "complete.json").exists() else find(base.name)
    return merged(load_stage(source, seed=_read_spec(source).get("seeds", [0])[0], find=find, where=where))


def _model_config(spec: dict[str, Any], directory: Path) -> ModelConfig:
    return configs.build(ModelConfig, spec["config"], f"{directory / 'model.json'}: config")
