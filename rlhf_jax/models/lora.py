"""LoRA (Hu et al. 2021, arXiv:2106.09685): a frozen base, and beside its linear layers two small matrices that learn.

An adapter is a tree of its own, with the base's paths and nothing of the base in it: `{"A", "B"}` in the place of a
layer's `{"kernel", "bias"}`. A layer's A is [*inputs, rank] and its B [rank, *outputs], axes as in the kernel. Several
layers that read the same input can have one A: "attention/qkv" and "gate_up" hold `{"A", "B": {a B for each layer}}`.
This is what an adapter is where a family stores these layers as one tensor (GPT-2, GPT-NeoX, Phi-3).

The layers themselves know nothing of it: `apply` intercepts their calls. qwix's LoRA was tried first and does not fit:
it keeps adapters among the base's parameters, knows no shared A, cannot run without dropout once it has some, and its
quantised layers do not find their parameters under `nn.remat` (0.1.8, with jax 0.10.2 and flax 0.12.8).
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
from rlhf_jax.types import RlhfError

SHARED: dict[str, tuple[str, ...]] = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
"""Layers that can have one A, by the name that stands for them together."""


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which linear layers are adapted, and how.

    A target is a regular expression for the whole name of a layer, or for as many of the last parts of its path:
    "attention/[qv]", "up|gate|down", "block_0/attention/o", or "attention/qkv" for one A that q, k and v share.
    """

    rank: Count  # rank of the adapters' matrices
    # Scale: the adapter's output is multiplied by alpha / rank, or by alpha / sqrt(rank) with use_rslora.
    alpha: Positive
    targets: tuple[str, ...]  # regular expressions on names of the layers to adapt, such as 'attention/[qv]'
    # Dropout of the adapters' inputs, in losses that support it.
    dropout: Annotated[float, Range(at_least=0, below=1)] = 0.0
    # Rank-stabilised scale (Kalajdzievski 2023, arXiv:2312.03732, theorem 3.2), as in PEFT: with alpha / rank, what an
    # adapter learns shrinks as the rank grows.
    use_rslora: bool = False

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.targets:
            raise ValueError("targets is empty: name the layers to adapt, as in 'attention/[qv]'")
        for target in self.targets:
            try:
                re.compile(target)
            except re.error as error:
                raise ValueError(f"targets: {target!r} is no regular expression ({error})") from error

    @property
    def scale(self) -> float:
        r"""Factor of the product of A and B: $\alpha / r$, or $\alpha / \sqrt{r}$ with use_rslora."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


class Adapted(NamedTuple):
    """Parameters of a network with its adapter on: they stand wherever plain parameters, the adapter off, can stand."""

    base: PyTree
    adapter: PyTree


class Layer(NamedTuple):
    """The adapter of one linear layer."""

    a: Array  # [*inputs, rank]
    b: Array  # [rank, *outputs]
    group: str  # where its A lies: the layer's own path, or that of several layers together


def required(config: LoraConfig | None) -> LoraConfig:
    """A network's LoraConfig, where it must have one."""
    if config is None:
        raise TypeError("this network has no LoraConfig, and so no adapter: dataclasses.replace(network, lora=...)")
    return config


def init_adapter(config: LoraConfig, params: PyTree, key: PRNGKeyArray) -> PyTree:
    r"""A new adapter: $B = 0$, so that the adapted network starts as the base, and A uniform.

    $A \sim U(-n^{-1/2}, n^{-1/2})$ for n inputs, as in the authors' code and in PEFT; section 4.1 of the paper draws A
    from a Gaussian. Adapters are float32, whatever the base's dtype.

    Args: params are the base's parameters, or their shapes.
    Raises RlhfError for a target that matches no linear layer, and for a layer that would have two adapters.
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
    r"""Plain parameters that compute what the adapted ones do: $W + s A B$, in the dtype of W.

    s is the config's scale. The sum is taken in float32, and rounded where W has less. Raises RlhfError where the
    adapter is of another network.
    """
    layers = layers_of(adapter)
    known = {name for name, _ in _leaves(params)}
    for path in layers:
        if f"{path}/kernel" not in known:
            raise RlhfError(f"the adapter has a layer {path}, which the network has not: it is of another network")

    def merged(path: tuple, leaf: Array) -> Array:
        layer = layers.get(_name(path).removesuffix("/kernel"))
        if layer is None or not _name(path).endswith("/kernel"):
            return leaf
        product = jnp.tensordot(layer.a, layer.b, axes=1, precision=jax.lax.Precision.HIGHEST)
        return (leaf.astype(jnp.float32) + config.scale * product.astype(jnp.float32)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(merged, params)


def apply(
    module: nn.Module,
    params: PyTree,
    config: LoraConfig | None,
    *args: Any,
    method: str | None,
    dropout_keys: Key[Array, "B"] | None,
) -> Any:
    r"""A module's method with plain or with `Adapted` parameters.

    Each adapted layer gives $y + s B A x$ (eq. 3), s being the config's scale, computed in the layer's compute dtype
    from left to right, so that the product of A and B never exists.

    Args: dropout_keys, one a row, switch the adapters' dropout on: a row's mask does not depend on the other rows.
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


def layers_of(adapter: PyTree) -> dict[str, Layer]:
    """Every layer that an adapter adapts, by its path in the base; layers with one A each have it."""
    return dict(_layers(adapter, ""))


def _layers(tree: dict[str, Any], path: str) -> Iterator[tuple[str, Layer]]:
    for name, node in tree.items():
        if not isinstance(node, dict):
            continue  # what an adapter holds beside LoRA: the head of a reward model
        if "A" not in node:
            yield from _layers(node, f"{path}{name}/")
            continue
        of_parts = node["B"] if isinstance(node["B"], dict) else {name: node["B"]}
        for part, b in of_parts.items():
            yield path + part, Layer(node["A"], b, path + name)


def _targeted(config: LoraConfig, paths: list[str]) -> dict[str, tuple[str, ...]]:
    """What has an A of its own -> the layers that it serves."""
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
                f"lora.targets: {target!r} matches no linear layer. Of block_0 to block_{_blocks(paths) - 1}, each has "
                f"{', '.join(names)}"
            )
        chosen |= found
    owners: dict[str, str] = {}
    for group, parts in chosen.items():
        for part in parts:
            if part in owners:
                raise RlhfError(
                    f"lora.targets: {part} would be adapted twice, as {owners[part]} and as {group} (several layers "
                    "with one A): name one of the two"
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
    """The axes of a kernel's input: heads and their channels for the attention's output, else one."""
    return shape[: 2 if path.endswith("attention/o") else 1]


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _leaves(tree: PyTree) -> list[tuple[str, Any]]:
    return [(_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
