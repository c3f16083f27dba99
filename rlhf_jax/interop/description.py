"""Describe a model trained from scratch as a transformers config.json of a family that supports its architecture."""

import dataclasses
from typing import Any

from rlhf_jax.interop.families import FAMILIES
from rlhf_jax.interop.hf import read_shape
from rlhf_jax.models.model_config import ModelConfig, Rope
from rlhf_jax.types import RlhfError


def describe(config: ModelConfig, vocab_size: int, **tokens: int) -> dict[str, Any]:
    """Make the config.json of the first family that expresses exactly this architecture, checked by reading it back.

    Args: tokens are the ids of special tokens, by their names in config.json.
    Raises RlhfError if no family does, naming the nearest one and the fields that differ.
    """
    differing = {}
    for family, row in FAMILIES.items():
        if row.to_config is None:
            continue
        hf_config = {"model_type": family, "architectures": [row.architecture], "vocab_size": vocab_size} | tokens
        hf_config |= row.to_config(config)
        try:
            parsed, _ = read_shape(hf_config, param_dtype=config.param_dtype, compute_dtype=config.compute_dtype)
        except RlhfError:  # the family cannot express this architecture at all
            continue
        differing[family] = _differences(
            config,
            dataclasses.replace(parsed, remat=config.remat, scan_layers=config.scan_layers, attention=config.attention),
        )
        if not differing[family]:
            return hf_config
    nearest = min(differing, key=lambda family: len(differing[family]))
    raise RlhfError(
        "no transformers family supports the architecture of this model, which was trained from scratch; the nearest "
        f"is {nearest}, with {', '.join(differing[nearest])}. To export a model, train one with that architecture"
    )


def _differences(config: ModelConfig, parsed: ModelConfig) -> list[str]:
    own, other = _filled(config), _filled(parsed)
    if config.positions == "rotary" and config.context is None:  # unlimited; ignore the default of the family
        other["context"] = None
    return [f"{name} = {other[name]!r} instead of {own[name]!r}" for name in own if own[name] != other[name]]


def _filled(config: ModelConfig) -> dict[str, Any]:
    """Return the fields, with None replaced by explicit values."""
    filled = dataclasses.replace(config, n_kv_heads=config.kv_heads, head_dim=config.head_width)
    return vars(filled) | ({"rope": Rope()} if config.positions == "learned" else {})
