"""Import and export of adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

PEFT adapts the linear layers of a family's own implementation, so that a fused layer (q, k and v in GPT-2) has one A
for all its parts. Adapters are loaded as float32, as PEFT does even for files in half precision.
"""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from rlhf_jax.interop.families import Layout, Tensor, family_of, pack, tensors_of, unpack
from rlhf_jax.interop.hf import Checkpoint, Role, classifier_config, find_checkpoint, network_of, refuse_bias
from rlhf_jax.interop.tensor_files import (
    DTYPES,
    MODEL_FILES,
    StoredTensor,
    new_directory,
    read_header,
    read_tensor,
    write_tensors,
)
from rlhf_jax.models.lora import SHARED, Adapted, LoraConfig, layers_of
from rlhf_jax.models.quantised import is_quantised
from rlhf_jax.types import RlhfError

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

_PREFIX = "base_model.model."
_HEAD = f"{_PREFIX}score.weight"
# Fields that we read, and fields without effect on a trained adapter. Any other non-empty field is not supported.
_READ = {
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "target_modules",
    "init_lora_weights",
    "modules_to_save",
    "bias",
}
_IDLE = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "fan_in_fan_out", "megatron_core", "qalora_group_size", "ensure_weight_tying"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "loftq_config", "runtime_config"),
}


class Loaded(NamedTuple):
    """Adapter loaded from PEFT files, and the equivalent LoraConfig."""

    config: LoraConfig
    adapter: PyTree


def base_of(directory: Path) -> str | None:
    """Return the base named by the adapter in a directory; None without an adapter, or with a full model's weights.

    Raises RlhfError if the adapter's config is malformed or does not name a base.
    """
    file = directory / CONFIG_FILE
    if not file.exists() or any((directory / name).exists() for name in MODEL_FILES):
        return None
    base = _parse_config(file).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise RlhfError(
            f"{file} has no base_model_name_or_path: set it to the directory or hub id of the model that the adapter "
            "was trained on"
        )
    return base


def with_adapter(directory: Path, base: Checkpoint, *, pad_id: int) -> Checkpoint:
    """Merge the adapter in a directory into its base, as PEFT's merge_and_unload does.

    A classifier's adapter (task_type SEQ_CLS) on a language model gives a reward model with the adapter's head.
    Raises RlhfError as `load_adapter` does, and if base and adapter have different tasks.
    """
    file = directory / CONFIG_FILE
    task = _parse_config(file).get("task_type")
    if task == "SEQ_CLS" and base.kind == "policy":
        if _HEAD not in read_header(directory / WEIGHTS_FILE):
            raise RlhfError(
                f"{directory / WEIGHTS_FILE} has no tensor {_HEAD} (the head of a reward model), and its base is a "
                "language model without one: train the adapter with modules_to_save = ['score']"
            )
        body = {name: leaf for name, leaf in base.params.items() if name != "head"}
        head = {"kernel": np.zeros((base.config.d_model, 1), body["embedding"].dtype)}
        hf_config = classifier_config(base.hf_config, pad_id=pad_id)
        base = base._replace(kind="reward", params={"body": body, "head": head}, hf_config=hf_config)
    if task not in (None, {"policy": "CAUSAL_LM", "reward": "SEQ_CLS"}[base.kind]):
        raise RlhfError(f"{file}: task_type = {task!r}, but its base is a {base.kind} model: name another base")
    loaded = load_adapter(str(directory), base)
    network = dataclasses.replace(network_of(base), lora=loaded.config)
    return base._replace(params=network.merge(Adapted(base.params, loaded.adapter)))


def load_adapter(source: str, pretrained: Checkpoint) -> Loaded:
    """Load an adapter that PEFT saved, for the base that it was trained on.

    A reward model's adapter includes a head: the one saved with the adapter, if any, otherwise the base's.

    Args: source is a directory or a hub id.
    Raises RlhfError for an unsupported feature of PEFT, and for a tensor that is missing, unknown, or of the wrong
    shape.
    """
    directory = find_checkpoint(source)
    peft_config = _read_config(directory, pretrained.kind)
    params = pretrained.params["body"] if pretrained.kind == "reward" else pretrained.params
    shapes = _shapes(params)
    file = directory / WEIGHTS_FILE
    stored = read_header(file)
    body: dict[str, Any] = {}
    found: list[str] = []
    rank = peft_config["r"]
    for module, tensor in _modules(pretrained.hf_config, shapes).items():
        names = [f"{_PREFIX}{module}.lora_{which}.weight" for which in "AB"]
        missing = [name for name in names if name not in stored]
        if missing == names and not _is_target(module, peft_config):
            continue
        if missing:
            raise RlhfError(f"{file} is incomplete: it has no tensor {missing[0]}. Save the adapter again")
        kernels = [shapes[part] for part in tensor.parts]
        inputs = kernels[0][: 2 if tensor.parts[0].endswith("attention/o/kernel") else 1]
        outputs = [shape[len(inputs) :] for shape in kernels]
        a = _read(stored.pop(names[0]), names[0], (rank, math.prod(inputs))).T.reshape(*inputs, rank)
        b = _read(stored.pop(names[1]), names[1], (sum(map(math.prod, outputs)), rank))
        parts = unpack(b, Tensor(module, _B * len(outputs), _layout(tensor)), [(rank, *shape) for shape in outputs])
        group = _group(tensor)
        found.append(group)
        *parents, last = group.split("/")
        node = body
        for name in parents:
            node = node.setdefault(name, {})
        each = {part.split("/")[-2]: _placed(b) for part, b in zip(tensor.parts, parts, strict=True)}
        node[last] = {"A": _placed(a), "B": each if last in SHARED else each[last]}
    adapter: PyTree = body
    if pretrained.kind == "reward":
        head = pretrained.params["head"]
        if _HEAD in stored:
            shape = head["kernel"].shape[::-1]
            head = {"kernel": _placed(_read(stored.pop(_HEAD), _HEAD, shape).T, head["kernel"].dtype)}
        adapter = {"body": body, "head": head}
    if stored:
        raise RlhfError(f"{file} adapts layers that are not supported: {', '.join(sorted(stored)[:3])}")
    if not found:
        raise RlhfError(
            f"{file} adapts no linear layer of {pretrained.hf_config['model_type']}: target_modules = "
            f"{json.dumps(peft_config['target_modules'])} matches none. Is it the adapter of another model?"
        )
    try:
        config = LoraConfig(
            rank,
            float(peft_config["lora_alpha"]),
            _targets(found, shapes),
            peft_config["lora_dropout"],
            use_rslora=bool(peft_config.get("use_rslora")),
        )
    except ValueError as error:
        raise RlhfError(f"{directory / CONFIG_FILE}: {error}") from error
    return Loaded(config, adapter)


def save_adapter(
    directory: Path, kind: Role, params: Adapted, config: LoraConfig, hf_config: dict[str, Any], *, base: str | None
) -> None:
    """Write an adapter and its config for PEFT. Only the shapes of the base's parameters are used.

    Args: base is the directory or hub id from which PEFT loads the base.
    Raises RlhfError if the directory exists and is not empty, if q, k and v have separate adapters in a family that
    stores them as one tensor, or if a reward model's head has a bias.
    """
    tree, adapter = params.base, params.adapter
    tensors: dict[str, np.ndarray] = {}
    if kind == "reward":
        refuse_bias(adapter["head"].get("bias"))
        tensors[_HEAD] = np.asarray(adapter["head"]["kernel"]).T
        tree, adapter = tree["body"], adapter["body"]
    shapes, layers, adapted = _shapes(tree), layers_of(adapter), {}
    modules = _modules(hf_config, shapes)
    for module, tensor in modules.items():
        parts = [part.removesuffix("/kernel") for part in tensor.parts]
        own = [layers[part] for part in parts if part in layers]
        if not own:
            continue
        if len(own) < len(parts) or len({layer.group for layer in own}) > 1:
            raise RlhfError(
                f"{hf_config['model_type']} stores {', '.join(parts)} as one layer {module}, for which PEFT needs one "
                f"adapter: train with {_group(tensor).split('/', 1)[1]!r} in lora.targets, or export the merged model"
            )
        a = pack([np.asarray(own[0].a)], Tensor(module, tensor.parts[:1], "out_in"))
        b = pack([np.asarray(layer.b) for layer in own], Tensor(module, _B * len(own), _layout(tensor)))
        tensors |= {f"{_PREFIX}{module}.lora_A.weight": a, f"{_PREFIX}{module}.lora_B.weight": b}
        adapted[module] = tensor
    peft_config = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": any(tensor.layout == "in_out" for tensor in adapted.values()),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        "modules_to_save": ["score"] if kind == "reward" else None,
        "peft_type": "LORA",
        "r": config.rank,
        "target_modules": _target_modules(list(adapted), list(modules)),
        "task_type": "SEQ_CLS" if kind == "reward" else "CAUSAL_LM",
        "use_rslora": config.use_rslora,
    }
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # as the safetensors package does
    with new_directory(directory) as partial:
        (partial / CONFIG_FILE).write_text(json.dumps(peft_config, indent=2) + "\n")
        header = [(name, tensors[name].shape, tensors[name].dtype) for name in names]
        write_tensors(partial / WEIGHTS_FILE, header, tensors.__getitem__)


# ---- configs -------------------------------------------------------------------------------------------------------


def _parse_config(file: Path) -> dict[str, Any]:
    try:
        return {} | json.loads(file.read_bytes())
    except OSError as error:
        raise RlhfError(f"{file} cannot be read ({error.strerror}): give a directory that PEFT saved") from error
    except (ValueError, TypeError) as error:
        raise RlhfError(f"{file} is not a PEFT config ({error}): save the adapter again") from error


def _read_config(directory: Path, kind: Role) -> dict[str, Any]:
    file = directory / CONFIG_FILE
    config: dict[str, Any] = {"lora_dropout": 0.0} | _parse_config(file)
    missing = {"r", "lora_alpha", "target_modules"} - config.keys()
    if config.get("peft_type") != "LORA":
        raise RlhfError(f"{file}: peft_type = {config.get('peft_type')!r} is not supported: it should be 'LORA'")
    if missing:
        raise RlhfError(f"{file} has no {', '.join(sorted(missing))}: save the adapter again")
    saved = set(config.get("modules_to_save") or ())
    unsupported = [name for name, value in config.items() if value and name not in _READ | _IDLE]
    if config.get("bias", "none") != "none":
        unsupported.append("bias")
    if config.get("init_lora_weights", True) not in (True, False, None, "gaussian", "orthogonal", "eva"):
        unsupported.append("init_lora_weights")  # pissa, olora and others also change the base
    if saved and (kind == "policy" or saved - {"score", "classifier"}):
        unsupported.append("modules_to_save")
    if unsupported:
        values = ", ".join(f"{name} = {json.dumps(config[name])}" for name in unsupported)
        raise RlhfError(f"{file}: {values} is not supported: merge the adapter with PEFT, and load the merged model")
    return config


def _is_target(module: str, config: dict[str, Any]) -> bool:
    """Return whether a config certainly targets a layer; False if patterns or exclusions make that unclear."""
    targets = config["target_modules"]
    if isinstance(targets, str) or config.get("exclude_modules") or config.get("layers_to_transform") is not None:
        return False
    return any(f".{module}".endswith(f".{target}") for target in targets)


def _target_modules(adapted: list[str], modules: list[str]) -> list[str]:
    """Find the shortest names that match exactly these layers in PEFT."""
    chosen = set()
    for module in adapted:
        names = module.split(".")
        endings = [".".join(names[i:]) for i in range(len(names) - 1, -1, -1)]
        matches = ({other for other in modules if f".{other}".endswith(f".{ending}")} for ending in endings)
        chosen.add(next(e for e, found in zip(endings, matches, strict=True) if found <= set(adapted)))
    return sorted(chosen)


def _targets(groups: list[str], shapes: dict[str, tuple[int, ...]]) -> tuple[str, ...]:
    """Find the targets of a LoraConfig that match exactly these layers."""
    blocks = {path.split("/")[0] for path in shapes if path.startswith("block_")}
    kinds = {group.split("/", 1)[1] for group in groups}
    everywhere = {kind for kind in kinds if {f"{block}/{kind}" for block in blocks} <= set(groups)}
    return tuple(sorted(everywhere | {group for group in groups if group.split("/", 1)[1] not in everywhere}))


# ---- tensors -------------------------------------------------------------------------------------------------------

_B = ("B",)  # a part with a single input axis, the rank


def _modules(hf_config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return the family's linear layers by name."""
    blocks = len({path.split("/")[0] for path in shapes if path.startswith("block_")})
    return {
        tensor.name.removesuffix(".weight"): tensor
        for tensor in tensors_of(family_of(hf_config, "config.json"), blocks, shapes)
        if re.fullmatch(r"block_\d+/.*kernel", tensor.parts[0])
    }


def _layout(tensor: Tensor) -> Layout:
    """Layout of B: PEFT's matrices are torch Linear layers, even for a Conv1D base layer."""
    return "heads_qkv" if tensor.layout == "heads_qkv" else "out_in"


def _group(tensor: Tensor) -> str:
    """Return the path in our adapter of the A matrix for one of the family's layers."""
    parts = [part.removesuffix("/kernel") for part in tensor.parts]
    if len(parts) == 1:
        return parts[0]
    parent, names = parts[0].rpartition("/")[0], tuple(part.rpartition("/")[2] for part in parts)
    return f"{parent}/{next(name for name, members in SHARED.items() if members == names)}"


def _read(entry: StoredTensor, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if entry.dtype not in DTYPES:
        raise RlhfError(f"{entry.file}: tensor {name} is of type {entry.dtype}, not one of {', '.join(DTYPES)}")
    if entry.shape != shape:
        raise RlhfError(
            f"{entry.file}: tensor {name} has the shape {entry.shape}, but the base and r require {shape}: is it the "
            "adapter of another model?"
        )
    return read_tensor(entry)


def _placed(array: np.ndarray, dtype: Any = np.float32) -> jax.Array:
    return jax.device_put(np.array(array, dtype))


def _shapes(params: PyTree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_quantised)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}
