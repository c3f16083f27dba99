"""Import and export of Hugging Face transformers checkpoints: config.json and safetensors, one tensor at a time."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from rlhf_jax.interop import mean_pooled
from rlhf_jax.interop.families import USER_FAMILY, family_of, pack, tensor_shape, tensors_of, unpack
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
from rlhf_jax.models.model_config import AttentionBy, DType, ModelConfig, Remat
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.scalars import Pooling, ScalarNetwork
from rlhf_jax.text.hf_tokenizer import quieten_transformers
from rlhf_jax.types import RlhfError

Place = Callable[[str, np.ndarray], PyTree]
"""Function that places a parameter on its devices, given its path and its value in host memory; it may quantise it."""

Role = Literal["policy", "reward"]

# Buffers that some old checkpoints contain and that follow from the config.
_BUFFERS = re.compile(r"(\.attn\.(masked_)?bias|\.attention\.(masked_bias|bias)|rotary_emb\.inv_freq)$")
_WEIGHTS = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "tokenizer.model"]
OUTLINE = ["config.json", "adapter_config.json", "tokenizer.json"]
"""Files of a checkpoint that `read_outline` and a comparison of tokenizers need."""


class Checkpoint(NamedTuple):
    """Model loaded from a transformers checkpoint, with its original config."""

    kind: Role
    config: ModelConfig
    vocab_size: int
    params: PyTree
    hf_config: dict[str, Any]


def find_checkpoint(source: str, *, files: Sequence[str] = _WEIGHTS) -> Path:
    """Directory of a checkpoint: the source itself, or the downloaded Hub repository with that name.

    Args: files are the patterns of the files to download.
    """
    if Path(source).is_dir():
        return Path(source)
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or Path(source).exists():
        raise RlhfError(f"{source} is not a directory: give the directory of a Hugging Face checkpoint, or a hub id")
    import huggingface_hub  # takes a second; only needed for downloads
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=[*files]))
    except errors.GatedRepoError as error:
        raise RlhfError(
            f"{source} is gated: request access on its hub page, and set HF_TOKEN to a token of that account"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise RlhfError(
            f"{source} is neither a directory nor a public model on the hub: check the name, or set HF_TOKEN to a "
            "token that may read it"
        ) from error
    except Exception as error:  # from httpx, the hub client or the file system
        offline = isinstance(error.__cause__, errors.OfflineModeIsEnabled)
        reason = "HF_HUB_OFFLINE is set" if offline else str(error.__cause__ or error).strip().partition("\n")[0]
        raise RlhfError(
            f"{source} is not a directory, has not been downloaded before, and could not be downloaded from the hub "
            f"({reason}): check the name and the connection, or download it elsewhere and give its directory"
        ) from error


def load_pretrained(
    source: str,
    *,
    param_dtype: DType | None = None,
    compute_dtype: DType = "float32",
    remat: Remat = False,
    scan_layers: bool = False,
    attention: AttentionBy = "xla",
    place: Place | None = None,
    family: str | None = None,
) -> Checkpoint:
    """Load a causal language model, or a sequence classifier with one label as a reward model.

    Tensors are read and placed one at a time, so that no second copy of the model exists.

    Args: source is a directory or a hub id; param_dtype None keeps the stored dtypes; place puts a parameter on its
    devices (default: the first device); family names a user-defined family, as file.py:NAME.
    Raises RlhfError naming a tensor that is missing or unknown, or has an unsupported dtype or the wrong shape.
    """
    directory = find_checkpoint(source)
    hf_config = read_config(directory, family)
    kind = _kind(hf_config, directory)
    how = {"remat": remat, "scan_layers": scan_layers, "attention": attention, "compute_dtype": compute_dtype}
    config, vocab_size = _read_shape(hf_config, directory, **how, param_dtype=param_dtype or "float32")
    shapes = parameter_shapes(kind, config, vocab_size, pooling=pooling_of(hf_config))
    stored = find_tensors(directory)
    table = family_of(hf_config, str(directory))
    place = place or (lambda path, array: jax.device_put(array))
    params: dict[str, PyTree] = {}
    known = set()
    for tensor in tensors_of(table, config.n_layers, shapes):
        wanted = [shapes[part] for part in tensor.parts]
        spellings = (tensor.name, tensor.name.removeprefix(table.prefix))  # saved from the full model or its body
        name = next((spelling for spelling in spellings if spelling in stored), None)
        if name is None:
            raise RlhfError(f"{directory} has no tensor {tensor.name}, which its config.json requires")
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
    return Checkpoint(kind, config, vocab_size, _nested(params, kind), hf_config)


def read_outline(
    directory: Path,
    *,
    param_dtype: DType | None,
    compute_dtype: DType,
    remat: Remat,
    scan_layers: bool,
    attention: AttentionBy,
    family: str | None,
) -> Checkpoint:
    """Read a checkpoint's config.json alone: `load_pretrained` with the shapes of the parameters in their place.

    Args: as of `load_pretrained`. A stored dtype is the one that config.json names.
    """
    hf_config = read_config(directory, family)
    stored = hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32"
    how = {"compute_dtype": compute_dtype, "remat": remat, "scan_layers": scan_layers, "attention": attention}
    config, vocab_size = _read_shape(hf_config, directory, param_dtype=param_dtype or stored, **how)
    kind = _kind(hf_config, directory)
    params = jax.eval_shape(lambda: _network(kind, config, vocab_size, pooling_of(hf_config)).init(jax.random.key(0)))
    return Checkpoint(kind, config, vocab_size, params, hf_config)


def save_pretrained(directory: Path, kind: Role, params: PyTree, hf_config: dict[str, Any]) -> None:
    """Write `config.json` and `model.safetensors` for transformers; the tokenizer writes its own files.

    Tensors keep the dtypes of the parameters. Raises RlhfError if the directory exists and is not empty.
    """
    flat = {_path(path, kind): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    if kind == "reward" and pooling_of(hf_config) == "last":
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
    unsaved = ("torch_dtype", USER_FAMILY)
    hf_config = {name: value for name, value in hf_config.items() if name not in unsaved} | {"dtype": dtype}
    with new_directory(directory) as partial:
        (partial / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n")
        if pooling_of(hf_config) == "mean":
            mean_pooled.write_class(partial, hf_config)
        write_tensors(partial / "model.safetensors", header, fetch)


def classifier_config(hf_config: dict[str, Any], *, pad_id: int) -> dict[str, Any]:
    """Convert a language model's config.json to the config.json of a classifier with one label."""
    name = (hf_config.get("architectures") or ["ForCausalLM"])[0]
    base = name.removesuffix("LMHeadModel").removesuffix("ForCausalLM")
    return hf_config | {
        "architectures": [f"{base}ForSequenceClassification"],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "pad_token_id": pad_id,
    }


def refuse_bias(bias: Any | None) -> None:
    """Raise RlhfError for a non-zero bias of a reward model's head, which transformers' classifiers do not have."""
    if bias is not None and np.any(np.asarray(bias)):
        raise RlhfError(
            "the reward model's head has a bias, but transformers' classifiers have none: scores would change by "
            f"{float(np.asarray(bias)[0]):+.4g}. Train it from a checkpoint (model.init), whose head has no bias, with "
            "normalise = None"
        )


def read_config(directory: Path, family: str | None = None) -> dict[str, Any]:
    """Read a checkpoint's config.json. Raises RlhfError if it is missing or malformed, or its family is unknown."""
    config = read_json_config(directory)
    config.pop(USER_FAMILY, None)  # a checkpoint from elsewhere must not choose code that runs here
    if family is not None:
        config[USER_FAMILY] = family
    family_of(config, str(directory / "config.json"))
    return config


def read_json_config(directory: Path) -> dict[str, Any]:
    """Read a checkpoint's config.json, of any family. Raises RlhfError if it is missing or malformed."""
    file = directory / "config.json"
    try:
        config = json.loads(file.read_bytes())
    except OSError as error:
        raise RlhfError(f"{file} cannot be read ({error.strerror}): give a Hugging Face checkpoint") from error
    except ValueError as error:
        raise RlhfError(f"{file} is not JSON ({error}): download it again") from error
    if not isinstance(config, dict):
        raise RlhfError(f"{file} is not a JSON object: download it again")
    return config


def checkpoint_hash(directory: Path) -> str:
    """Hash names, sizes and first megabytes of a checkpoint's JSON and weight files, to detect changes."""
    digest = hashlib.sha256()
    for file in sorted([*directory.glob("*.json"), *directory.glob("*.safetensors")]):
        with open(file, "rb") as content:
            digest.update(f"{file.name} {file.stat().st_size} ".encode() + content.read(2**20))
    return digest.hexdigest()


def network_of(pretrained: Checkpoint) -> PolicyNetwork | ScalarNetwork:
    """Make the network of a loaded checkpoint."""
    return _network(pretrained.kind, pretrained.config, pretrained.vocab_size, pooling_of(pretrained.hf_config))


def _network(kind: Role, config: ModelConfig, vocab_size: int, pooling: Pooling) -> PolicyNetwork | ScalarNetwork:
    if kind == "policy":
        return PolicyNetwork(config, vocab_size, ())
    return ScalarNetwork(config, vocab_size, pooling, bias=pooling == "mean")


def pooling_of(hf_config: dict[str, Any]) -> Pooling:
    """Tokens that a classifier's score is read from."""
    return "mean" if mean_pooled.is_mean_pooled(hf_config) else "last"


def _read_shape(hf_config: dict[str, Any], directory: Path, **how: Any) -> tuple[ModelConfig, int]:
    try:
        return read_shape(hf_config, **how)
    except RlhfError as error:
        raise RlhfError(f"{directory / 'config.json'}: {error}") from error


def read_shape(hf_config: dict[str, Any], **how: Any) -> tuple[ModelConfig, int]:
    """Read architecture and vocabulary size from a config.json; missing fields get transformers' defaults.

    Args: how are the fields of ModelConfig that config.json does not have: dtypes, remat, scan_layers, attention.
    Raises RlhfError if the config is invalid or not supported.
    """
    quieten_transformers()
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig  # takes two seconds

    try:
        # Adds fields missing in older checkpoints and converts them to the current form.
        known = hf_config["model_type"] in CONFIG_MAPPING
        completed = AutoConfig.for_model(**hf_config) if known else PreTrainedConfig(**hf_config)
        fields = family_of(hf_config, "config.json").fields(completed)
        return ModelConfig(**fields, **how), completed.vocab_size
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise RlhfError(str(error)) from error


def _aligned(array: np.ndarray, dtype: Any) -> np.ndarray:
    """Convert an array to a dtype and an aligned address, so that JAX can use it without a copy on CPUs."""
    if array.dtype == dtype and array.flags.c_contiguous and array.ctypes.data % ALIGNMENT == 0:
        return array
    copy = empty(array.shape, np.dtype(dtype))
    copy[...] = array
    return copy


def _kind(hf_config: dict[str, Any], directory: Path) -> Role:
    architecture = (hf_config.get("architectures") or ["ForCausalLM"])[0]
    if architecture.endswith("ForSequenceClassification"):
        labels = len(hf_config.get("id2label") or {"LABEL_0": 0, "LABEL_1": 1})
        if labels != 1:
            raise RlhfError(f"{directory} is a classifier with {labels} labels: a reward model has one")
        return "reward"
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "policy"
    raise RlhfError(f"{directory} is a {architecture}: give a ...ForCausalLM, or a ...ForSequenceClassification")


def parameter_shapes(
    kind: Role, config: ModelConfig, vocab_size: int, *, pooling: Pooling = "last"
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of a network, by its path."""
    key = jax.eval_shape(lambda: jax.random.key(0))  # only its shape, to avoid compiling a program
    tree = jax.eval_shape(_network(kind, config, vocab_size, pooling).init, key)
    return {_path(path, kind): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _path(path: tuple, kind: Role) -> str:
    """Path of a parameter within the transformer; those of a reward model's head stay `head/kernel`, `head/bias`."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removeprefix("body/" if kind == "reward" else "")


def _nested(params: dict[str, PyTree], kind: Role) -> PyTree:
    tree: dict[str, Any] = {}
    for path, leaf in params.items():
        *names, last = path.split("/")
        node = tree
        if kind == "reward" and names != ["head"]:
            node = tree.setdefault("body", {})
        for name in names:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree


def _check(entry: StoredTensor, name: str, shape: tuple[int, ...]) -> None:
    if entry.dtype not in DTYPES:
        raise RlhfError(f"{entry.file}: tensor {name} is of type {entry.dtype}, not one of {', '.join(DTYPES)}")
    if entry.shape != shape:
        raise RlhfError(f"{entry.file}: tensor {name} has the shape {entry.shape}, but config.json requires {shape}")


def _refuse_unknown(names: set[str], config: ModelConfig, directory: Path) -> None:
    """Raise RlhfError for an unused tensor, which means that the model does not match its config."""
    unread = {name for name in names if not _BUFFERS.search(name)}
    if config.tied:
        unread -= {"lm_head.weight", "embed_out.weight"}  # a copy of the embedding
    if unread:
        raise RlhfError(f"{directory} has tensors that its family does not know: {', '.join(sorted(unread)[:3])}")
