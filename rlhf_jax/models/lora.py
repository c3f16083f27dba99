"""LoRA (Hu et al. 2021, arXiv:2106.09685): low-rank trainable updates of the linear layers of a frozen base.

An adapter is a separate tree with the base's paths: `{"A", "B"}` takes the place of a layer's `{"kernel", "bias"}`. A
has the shape [*inputs, rank] and B [rank, *outputs], with the axes of the kernel. Layers that read the same input can
share one A: "attention/qkv" and "gate_up" contain `{"A", "B": {one B per layer}}`, as needed for families that store
these layers as one tensor (GPT-2, GPT-NeoX, Phi-3).

The layers do not depend on LoRA: `apply` intercepts their calls. We do not use qwix's LoRA because it stores adapters
among the base's parameters, has no shared A, cannot disable dropout once it is configured, and its quantised layers do
not find their parameters under `nn.remat` (0.1.8, with jax 0.10.2 and flax 0.12.8). A quantised base (QLoRA) has
qwix's arrays in place of its kernels: see `models/quantised.py`.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PRNGKeyArray, PyTree

from rlhf_jax.config import Count, Positive, Range, check_ranges
from rlhf_jax.models.model_config import ModelConfig
from rlhf_jax.models.quantised import BaseDType, dequantise, is_quantised
from rlhf_jax.types import RlhfError

SHARED: dict[str, tuple[str, ...]] = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
"""Layers that can share one A, by the name of the group."""


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Adapted linear layers, and rank, scale and dropout of the adapters.

    A target is a regular expression that must match the name of a layer or the last parts of its path:
    "attention/[qv]", "up|gate|down", "block_0/attention/o", or "attention/qkv" for one A that q, k and v share.
    """

    rank: Count  # rank of the adapters' matrices
    # Scale: the adapter's output is multiplied by alpha / rank, or by alpha / sqrt(rank) with use_rslora.
    alpha: Positive
    targets: tuple[str, ...]  # regular expressions on names of the layers to adapt, such as 'attention/[qv]'
    # Dropout of the adapters' inputs, in losses that support it.
    dropout: Annotated[float, Range(at_least=0, below=1)] = 0.0
    # Rank-stabilised scale (Kalajdzievski 2023, arXiv:2312.03732, theorem 3.2), as in PEFT: with alpha / rank, the
    # adapter's learned output shrinks as the rank grows.
    use_rslora: bool = False
    # Hold the weights of the frozen base's linear layers in 8 or 4 bits (QLoRA, arXiv:2305.14314), with a scale for
    # every 64 inputs of an output; None: as they are. The reference is then the quantised base.
    base_dtype: BaseDType | None = None

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.targets:
            raise ValueError("targets is empty: name the layers to adapt, as in 'attention/[qv]'")
        for target in self.targets:
            try:
                re.compile(target)
            except re.error as error:
                raise ValueError(f"targets: {target!r} is not a regular expression ({error})") from error

    @property
    def scale(self) -> float:
        r"""Scale s of the product A B: $\alpha / r$, or $\alpha / \sqrt{r}$ with use_rslora."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


class Adapted(NamedTuple):
    """Base parameters with an adapter; networks accept it in place of plain parameters."""

    base: PyTree
    adapter: PyTree


class Layer(NamedTuple):
    """The adapter of one linear layer."""

    a: Array  # [*inputs, rank]
    b: Array  # [rank, *outputs]
    group: str  # path of its A: the path of the layer, or of the group that shares A


def required(config: LoraConfig | None) -> LoraConfig:
    """Return a network's LoraConfig. Raises TypeError if it has none."""
    if config is None:
        raise TypeError("this network has no LoraConfig: use dataclasses.replace(network, lora=...)")
    return config


def init_adapter(config: LoraConfig, params: PyTree, key: PRNGKeyArray) -> PyTree:
    r"""Initialise an adapter with $B = 0$, so that the adapted network equals the base, and random A.

    $A \sim U(-n^{-1/2}, n^{-1/2})$ for n inputs, as in the authors' code and in PEFT; section 4.1 of the paper draws A
    from a Gaussian. Adapters are always float32.

    Args: params are the base's parameters or their shapes.
    Raises RlhfError for a target that matches no linear layer, and for a layer matched twice.
    """
    shapes = {
        name.removesuffix("/kernel"): leaf.shape
        for name, leaf in _leaves(params)
        if re.search(r"block_.*/kernel$", name)
    }
    adapter: dict[str, Any] = {}
    for number, (group, parts) in enumerate(sorted(_targeted(config, list(shapes)).items())):
        *parents, last = group.split("/")
        node = adapter
        for name in parents:
            node = node.setdefault(name, {})
        inputs = _inputs(parts[0], shapes[parts[0]])
        bound = math.prod(inputs) ** -0.5
        a = jax.random.uniform(
            jax.random.fold_in(key, number), (*inputs, config.rank), jnp.float32, minval=-bound, maxval=bound
        )
        b = {part.split("/")[-1]: jnp.zeros((config.rank, *shapes[part][len(inputs) :])) for part in parts}
        node[last] = {"A": a, "B": b if last in SHARED else b[last]}
    return adapter


def merge(params: PyTree, adapter: PyTree, config: LoraConfig) -> PyTree:
    r"""Merge an adapter into its base: $W + s A B$ with the config's scale s, in the dtype of W.

    The sum is computed in float32. A quantised base is dequantised, in the dtype of its embedding: the result computes
    what base and adapter compute.

    Raises RlhfError if the adapter belongs to another network.
    """
    layers = layers_of(adapter)
    known = {name for name, _ in _leaves(params)}
    for path in layers:
        if f"{path}/kernel" not in known:
            raise RlhfError(f"the network has no layer {path}: the adapter belongs to another network")

    def merged(path: tuple, leaf: Any) -> Array:
        weights, dtype = (dequantise(leaf), params["embedding"].dtype) if is_quantised(leaf) else (leaf, leaf.dtype)
        layer = layers.get(_name(path).removesuffix("/kernel"))
        if layer is None or not _name(path).endswith("/kernel"):
            return leaf if weights is leaf else weights.astype(dtype)
        product = jnp.tensordot(layer.a, layer.b, axes=1, precision=jax.lax.Precision.HIGHEST)
        return (weights.astype(jnp.float32) + config.scale * product.astype(jnp.float32)).astype(dtype)

    return jax.tree_util.tree_map_with_path(merged, params, is_leaf=is_quantised)


def apply(
    module: nn.Module,
    params: PyTree,
    config: LoraConfig | None,
    *args: Any,
    method: str | None,
    dropout_keys: Key[Array, "B"] | None,
) -> Any:
    r"""Apply a module's method with plain or `Adapted` parameters.

    Each adapted layer computes $y + s \, x A B$ (eq. 3, with our order of axes) with the config's scale s, in the
    layer's compute dtype and without forming the product A B.

    Args: dropout_keys, one per row, enable the adapters' dropout; a row's mask does not depend on other rows.
    """
    if not isinstance(params, Adapted):
        return module.apply({"params": params}, *args, method=method)
    scale, rate, layers = required(config).scale, required(config).dropout, layers_of(params.adapter)
    groups = sorted({layer.group for layer in layers.values()})

    def intercept(call: Any, args: tuple, kwargs: dict[str, Any], context: nn.module.InterceptorContext) -> Any:
        y = call(*args, **kwargs)
        layer = layers.get("/".join(context.module.path))
        if layer is None or context.method_name != "__call__":
            return y
        x, inputs = args[0].astype(y.dtype), layer.a.ndim - 1
        if dropout_keys is not None and rate:
            x = _drop(x, rate, dropout_keys, groups.index(layer.group))
        down = jnp.tensordot(x, layer.a.astype(y.dtype), axes=inputs) * scale
        return y + jnp.tensordot(down, layer.b.astype(y.dtype), axes=1)

    with nn.intercept_methods(intercept):
        return module.apply({"params": params.base}, *args, method=method)


def check_layers(config: ModelConfig, adapter: LoraConfig | None) -> None:
    """Raise ValueError for an adapter of layers in a loop, which it could not tell apart."""
    if adapter is not None and config.scan_layers:
        raise ValueError("scan_layers = True does not support adapters: set it to False, or lora to None")


def layers_of(adapter: PyTree) -> dict[str, Layer]:
    """Map the path of each adapted layer in the base to its A and B."""
    return dict(_layers(adapter, ""))


def _layers(tree: dict[str, Any], path: str) -> Iterator[tuple[str, Layer]]:
    for name, node in tree.items():
        if not isinstance(node, dict):
            continue  # the head of a reward model, which is trained in full
        if "A" not in node:
            yield from _layers(node, f"{path}{name}/")
            continue
        matrices = node["B"] if isinstance(node["B"], dict) else {name: node["B"]}
        for part, b in matrices.items():
            yield path + part, Layer(node["A"], b, path + name)


def _targeted(config: LoraConfig, paths: list[str]) -> dict[str, tuple[str, ...]]:
    """Map each LoRA A matrix to the layers that share it."""
    parents = sorted({path.rpartition("/")[0] for path in paths})
    groups: dict[str, tuple[str, ...]] = {path: (path,) for path in paths}
    for parent in parents:
        for name, parts in SHARED.items():
            members = tuple(f"{parent}/{part}" for part in parts)
            if set(members) <= set(paths):
                groups[f"{parent}/{name}"] = members
    chosen: dict[str, tuple[str, ...]] = {}
    for target in config.targets:
        found = {group: parts for group, parts in groups.items() if _pattern(target).search(group)}
        if not found:
            names = sorted({re.sub(r".*block_\d+/", "", group) for group in groups})
            raise RlhfError(
                f"lora.targets: {target!r} matches no linear layer. block_0 to block_{_blocks(paths) - 1} each have "
                f"{', '.join(names)}"
            )
        chosen |= found
    owners: dict[str, str] = {}
    for group, parts in chosen.items():
        for part in parts:
            if part in owners:
                raise RlhfError(
                    f"lora.targets: {part} is matched twice, by {owners[part]} and by {group} (layers that share one "
                    "A): keep one of the two"
                )
            owners[part] = group
    return chosen


def _pattern(target: str) -> re.Pattern[str]:
    return re.compile(f"(^|/)(?:{target})$")


def _blocks(paths: list[str]) -> int:
    return len({name for path in paths for name in path.split("/") if name.startswith("block_")})


def _drop(x: Array, rate: float, keys: Array, number: int) -> Array:
    def mask(key: Array) -> Array:
        return jax.random.bernoulli(jax.random.fold_in(key, number), 1 - rate, x.shape[1:])

    return jnp.where(jax.vmap(mask)(keys), x / (1 - rate), 0)


def _inputs(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Input axes of a kernel: heads and channels for the attention's output projection, otherwise one axis."""
    return shape[: 2 if path.endswith("attention/o") else 1]


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _leaves(tree: PyTree) -> list[tuple[str, Any]]:
    return [(_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_quantised)]
