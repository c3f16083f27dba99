"""Checkpoints of Hugging Face transformers, in and out: config.json and safetensors, one tensor at a time."""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from rlhf_jax.interop.families import family_of, model_config, pack, tensor_shape, tensors_of, unpack
from rlhf_jax.interop.tensor_files import (
    ALIGNMENT,
    DTYPES,
    StoredTensor,
    empty,
    find_tensors,
    new_directory,
    read_tensor,
    write_tensors,
)
from rlhf_jax.models.model_config import AttentionBy, DType, ModelConfig
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.scalars import ScalarNetwork
from rlhf_jax.types import RlhfError

Place = Callable[[str, np.ndarray], jax.Array]
"""Where a parameter goes: its path, and its value in the memory of the host -> the parameter on its devices."""

Kind = Literal["policy", "reward"]

# Tables that some old checkpoints carry, and that follow from their configs.
_BUFFERS = re.compile(r"(\.attn\.(masked_)?bias|\.attention\.(masked_bias|bias)|rotary_emb\.inv_freq)$")
_WEIGHTS = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "tokenizer.model"]


class Pretrained(NamedTuple):
    """A checkpoint of transformers in our terms, with the config it came with."""

    kind: Kind
    config: ModelConfig
    vocab_size: int
    params: PyTree
    hf_config: dict[str, Any]


def find_checkpoint(source: str) -> Path:
    """The directory of a checkpoint: the source itself, or what the hub has under that name, downloaded."""
    if Path(source).is_dir():
        return Path(source)
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or Path(source).exists():
        raise RlhfError(
            f"{source} is not a directory: give that of a Hugging Face checkpoint, or the id of one on the hub"
        )
    import huggingface_hub  # takes a second, and only those who download need it
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=_WEIGHTS))
    except errors.GatedRepoError as error:
        raise RlhfError(
            f"{source} is gated: ask for access on its page on the hub, and set HF_TOKEN to a token of that account"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise RlhfError(
            f"{source} is no directory here, and the hub has no such model, or keeps it private: check the name, or "
            "set HF_TOKEN to a token that may read it"
        ) from error
    except Exception as error:  # of httpx, of the hub, and of the file system
        offline = isinstance(error.__cause__, errors.OfflineModeIsEnabled)
        reason = "HF_HUB_OFFLINE is set" if offline else str(error.__cause__ or error).strip().partition("\n")[0]
        raise RlhfError(
            f"{source} is no directory here, has not been downloaded before, and could not be had from the hub "
            f"({reason}): check the name and the connection, or download it elsewhere and give its directory"
        ) from error


def load_pretrained(
    source: str,
    *,
    param_dtype: DType | None = None,
    compute_dtype: DType = "float32",
    remat: bool = False,
    attention: AttentionBy = "xla",
    place: Place | None = None,
) -> Pretrained:
    """A causal language model, or a sequence classifier with one label, which is a reward model.

    One tensor after the other goes from its file to its place, so that no second copy of the model exists.

    Args: source is a directory or a hub id; param_dtype None keeps every tensor as it is stored; place puts a parameter
    on its devices (by default the first one).
    Raises RlhfError naming the tensor that is missing, of an unknown type, or of a shape that does not fit the config.
    """
    directory = find_checkpoint(source)
    hf_config = read_config(directory)
    kind = _kind(hf_config, directory)
    how = {"param_dtype": param_dtype or "float32", "compute_dtype": compute_dtype, "remat": remat}
    config, vocab_size = _read_shape(hf_config, directory, **how, attention=attention)
    shapes = parameter_shapes(kind, config, vocab_size)
    stored = find_tensors(directory)
    family = family_of(hf_config, str(directory))
    place = place or (lambda path, array: jax.device_put(array))
    params: dict[str, jax.Array] = {}
    known = set()
    for tensor in tensors_of(family, config.n_layers, shapes):
        wanted = [shapes[part] for part in tensor.parts]
        spellings = (tensor.name, tensor.name.removeprefix(family.prefix))  # of the whole model, or of its body alone
        name = next((spelling for spelling in spellings if spelling in stored), None)
        if name is None:
            raise RlhfError(f"{directory} has no tensor {tensor.name}, which its config.json asks for")
        known.add(name)
        entry = stored[name]
        _check(entry, name, tensor_shape(tensor, wanted))
        dtype = DTYPES[entry.dtype] if param_dtype is None else jnp.dtype(param_dtype)
        values = [_aligned(value, dtype) for value in unpack(read_tensor(entry), tensor, wanted)]
        for part in tensor.parts:
            params[part] = place(part, values.pop(0))
    _refuse_unknown(set(stored) - known, config, directory)
    if param_dtype is None:
        dtype: Any = params[next(path for path in params if path.endswith("embedding"))].dtype.name
        config = dataclasses.replace(config, param_dtype=dtype)
    return Pretrained(kind, config, vocab_size, _nested(params, kind), hf_config)


def save_pretrained(directory: Path, kind: Kind, params: PyTree, hf_config: dict[str, Any]) -> None:
    """Writes `config.json` and `model.safetensors`, which transformers loads; the tokenizer writes its own files.

    Tensors have their parameters' dtypes. Raises RlhfError where the directory exists and is not empty.
    """
    flat = {_path(path, kind): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    if kind == "reward":
        refuse_bias(flat.pop("head/bias", None))
    family = family_of(hf_config, "config.json")
    layers = len({path.split("/")[0] for path in flat if path.startswith("block_")})
    tensors = {tensor.name: tensor for tensor in tensors_of(family, layers, flat)}

    def fetch(name: str) -> np.ndarray:
        return pack([np.asarray(flat[part]) for part in tensors[name].parts], tensors[name])

    header = [
        (name, tensor_shape(tensor, [flat[part].shape for part in tensor.parts]), np.dtype(flat[tensor.parts[0]].dtype))
        for name, tensor in tensors.items()
    ]
    dtype = np.dtype(next(leaf.dtype for path, leaf in flat.items() if path.endswith("embedding"))).name
    hf_config = {name: value for name, value in hf_config.items() if name != "torch_dtype"} | {"dtype": dtype}
    with new_directory(directory) as partial:
        (partial / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n")
        write_tensors(partial / "model.safetensors", header, fetch)


def classifier_config(hf_config: dict[str, Any], *, pad_id: int) -> dict[str, Any]:
    """The config.json of a reward model, a classifier with one label, which has a language model's body."""
    name = (hf_config.get("architectures") or ["ForCausalLM"])[0]
    base = name.removesuffix("LMHeadModel").removesuffix("ForCausalLM")
    return hf_config | {
        "architectures": [f"{base}ForSequenceClassification"],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "pad_token_id": pad_id,
    }


def refuse_bias(bias: Any | None) -> None:
    """Raises RlhfError for a reward model's head whose bias says something, because theirs have none."""
    if bias is not None and np.any(np.asarray(bias)):
        raise RlhfError(
            "the reward model's head has a bias, which transformers' classifiers have not: scores would move by "
            f"{float(np.asarray(bias)[0]):+.4g}. Train it with model.init set to a checkpoint, which has none, and "
            "with normalise = None"
        )


def read_config(directory: Path) -> dict[str, Any]:
    """A checkpoint's config.json. Raises RlhfError where there is none, or where it is of an unknown family."""
    file = directory / "config.json"
    try:
        config = json.loads(file.read_bytes())
    except OSError as error:
        raise RlhfError(f"{file} cannot be read ({error.strerror}): give a Hugging Face checkpoint") from error
    except ValueError as error:
        raise RlhfError(f"{file} is not JSON ({error}): download it again") from error
    if not isinstance(config, dict):
        raise RlhfError(f"{file} is not a JSON object: download it again")
    family_of(config, str(file))
    return config


def checkpoint_hash(directory: Path) -> str:
    """A hash that notices a changed checkpoint: of its configs, and of the beginnings and sizes of its weights."""
    digest = hashlib.sha256()
    for file in sorted([*directory.glob("*.json"), *directory.glob("*.safetensors")]):
        with open(file, "rb") as content:
            digest.update(f"{file.name} {file.stat().st_size} ".encode() + content.read(2**20))
    return digest.hexdigest()


def network_of(pretrained: Pretrained) -> PolicyNetwork | ScalarNetwork:
    """The functions of a checkpoint's parameters."""
    return _network(pretrained.kind, pretrained.config, pretrained.vocab_size)


def _network(kind: Kind, config: ModelConfig, vocab_size: int) -> PolicyNetwork | ScalarNetwork:
    if kind == "policy":
        return PolicyNetwork(config, vocab_size, ())
    return ScalarNetwork(config, vocab_size, "last", bias=False)


def _read_shape(hf_config: dict[str, Any], directory: Path, **how: Any) -> tuple[ModelConfig, int]:
    try:
        return read_shape(hf_config, **how)
    except RlhfError as error:
        raise RlhfError(f"{directory / 'config.json'}: {error}") from error


def read_shape(hf_config: dict[str, Any], **how: Any) -> tuple[ModelConfig, int]:
    """The shape that a config.json describes, and the size of its vocabulary.

    Args: how are the fields that no config.json has: dtypes, remat, attention.

    What it leaves out is as transformers has it by default. Raises RlhfError where it cannot be, or is not supported.
    """
    # transformers says that it found no PyTorch, which nobody here misses.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig  # takes two seconds, and only those who bring a model need it

    try:
        # Completes what older checkpoints leave out, and says it as newer ones do.
        completed = AutoConfig.for_model(**hf_config)
        return model_config(completed, **how), completed.vocab_size
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise RlhfError(str(error)) from error


def _aligned(array: np.ndarray, dtype: Any) -> np.ndarray:
    """The array at an address that is a multiple of ALIGNMENT: on CPUs it is then the parameter, uncopied."""
    if array.dtype == dtype and array.flags.c_contiguous and array.ctypes.data % ALIGNMENT == 0:
        return array
    copy = empty(array.shape, np.dtype(dtype))
    copy[...] = array
    return copy


def _kind(hf_config: dict[str, Any], directory: Path) -> Kind:
    architecture = (hf_config.get("architectures") or ["ForCausalLM"])[0]
    if architecture.endswith("ForSequenceClassification"):
        labels = len(hf_config.get("id2label") or {"LABEL_0": 0, "LABEL_1": 1})
        if labels != 1:
            raise RlhfError(f"{directory} is a classifier with {labels} labels: a reward model has one")
        return "reward"
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "policy"
    raise RlhfError(f"{directory} is a {architecture}: give a ...ForCausalLM, or a ...ForSequenceClassification")


def parameter_shapes(kind: Kind, config: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of a network, by its path."""
    key = jax.eval_shape(lambda: jax.random.key(0))  # a key's shape: to make one would compile a program
    tree = jax.eval_shape(_network(kind, config, vocab_size).init, key)
    return {_path(path, kind): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _path(path: tuple, kind: Kind) -> str:
    """A parameter's path within the transformer; the reward model's own head stays `head/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removeprefix("body/" if kind == "reward" else "")


def _nested(params: dict[str, jax.Array], kind: Kind) -> PyTree:
    tree: dict[str, Any] = {}
    for path, leaf in params.items():
        *names, last = path.split("/")
        node = tree
        if kind == "reward" and path != "head/kernel":
            node = tree.setdefault("body", {})
        for name in names:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree


def _check(entry: StoredTensor, name: str, shape: tuple[int, ...]) -> None:
    if entry.dtype not in DTYPES:
        raise RlhfError(f"{entry.file}: tensor {name} is of type {entry.dtype}, not one of {', '.join(DTYPES)}")
    if entry.shape != shape:
        raise RlhfError(f"{entry.file}: tensor {name} has the shape {entry.shape}, and config.json says {shape}")


def _refuse_unknown(names: set[str], config: ModelConfig, directory: Path) -> None:
    """A tensor that nothing reads means that the model is another one than its config says."""
    unread = {name for name in names if not _BUFFERS.search(name)}
    if config.tied:
        unread -= {"lm_head.weight", "embed_out.weight"}  # a copy of the embedding
    if unread:
        raise RlhfError(f"{directory} has tensors that its family does not know: {', '.join(sorted(unread)[:3])}")
