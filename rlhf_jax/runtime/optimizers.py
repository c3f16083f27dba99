"""Optimisers from optax: config, learning-rate schedule, weight decay, gradient accumulation, and one update.

Defaults are those of the implementation that papers used: torch's for `adamw`, `adam`, `rmsprop` and `sgd`, the
authors' for `lion` (Chen et al. 2023, arXiv:2302.06675), transformers' for `adafactor` (Shazeer & Stern 2018,
arXiv:1804.04235). The global gradient norm is clipped before the optimiser, as in torch's training loops.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray, PyTree

from rlhf_jax.config import Count, CountOrZero, NonNegative, Positive, Range
from rlhf_jax.core.metrics import Metric, combine
from rlhf_jax.core.slices import slice_count, strided
from rlhf_jax.runtime import rounding
from rlhf_jax.runtime.rounding import LowPrecision
from rlhf_jax.types import RlhfError

Schedule = Literal["constant", "linear", "cosine"]
Decay = Annotated[float, Range(at_least=0, below=1)]
OptimizerName = Literal["adamw", "adam", "rmsprop", "adafactor", "lion", "sgd"]
Rows = TypeVar("Rows")
"""A batch: a pytree whose leaves have rows as their first axis."""
LossAndMetrics = tuple[Array, dict[str, Metric]]
GradientFunction = Callable[[PyTree, Rows], tuple[LossAndMetrics, PyTree]]
"""Function of parameters and a batch, as `jax.value_and_grad(loss_fn, has_aux=True)` returns it."""

NORMS_AND_BIASES = r"(^|/)(scale|bias)$"
"""Pattern for the paths of norm scales and of all biases."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimiser settings. The learning rate rises linearly over `warmup_steps` updates, then follows the schedule.

    Raises ValueError naming a field that the chosen optimiser or schedule does not use.
    """

    learning_rate: Positive  # peak learning rate, reached at the end of the warm-up
    schedule: Schedule  # after the warm-up: constant, or decaying to min_learning_rate at the last update
    warmup_steps: CountOrZero  # updates over which the learning rate rises linearly from 0
    # Decoupled for adamw, lion and adafactor: each update subtracts learning_rate x weight_decay x weight. For adam,
    # rmsprop and sgd an L2 penalty as in torch: weight_decay x weight is added to the gradient.
    weight_decay: NonNegative
    max_grad_norm: Positive  # maximum global gradient norm; larger gradients are scaled down to it
    epsilon: Positive = 1e-8  # constant added to the square root of the second moment (adamw, adam, rmsprop)
    # Rows per micro-batch, over which gradients are accumulated; None: the whole batch at once.
    micro_batch: Count | None = None
    # Regular expressions on parameter paths (policy/block_0/attention/q/kernel); matching parameters are not trained.
    freeze: tuple[str, ...] = ()
    name: OptimizerName = "adamw"  # optimiser
    b1: Decay | None = None  # decay of the first moment; None: 0.9 (adamw, adam, lion)
    b2: Decay | None = None  # decay of the second moment; None: 0.999 (adamw, adam), 0.99 (rmsprop's alpha, lion)
    momentum: Decay = 0.0  # momentum of rmsprop and sgd, as in torch (no dampening, no Nesterov)
    min_learning_rate: NonNegative = 0.0  # learning rate at the end of the linear and the cosine schedule
    # Regular expressions on parameter paths; matching parameters have no weight decay. The default excludes norms and
    # biases, as transformers does (Trainer.get_decay_parameter_names); embeddings, heads and LoRA matrices decay.
    no_decay: tuple[str, ...] = (NORMS_AND_BIASES,)
    # How to update bfloat16 weights, whose precision may be coarser than an update: keep float32 master weights, round
    # stochastically, or round to nearest, which loses small updates.
    low_precision: LowPrecision = "masters"
    # Dtype in which the optimiser's moments are stored; bfloat16 halves their memory and rounds them stochastically.
    moments: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        for field in ("freeze", "no_decay"):
            for pattern in getattr(self, field):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(f"{field}: {pattern!r} is not a regular expression ({error})") from error
        spec = ALGORITHMS[self.name]
        for field in ("epsilon", "b1", "b2", "momentum"):
            value, default = getattr(self, field), self.__dataclass_fields__[field].default
            if value != default and field not in spec.reads:
                raise ValueError(
                    f"{field} = {value} has no effect with name = {self.name!r}, which reads "
                    f"{', '.join(spec.reads) or 'none of these'}: leave it at {default}"
                )
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate = {self.min_learning_rate} must be at most learning_rate = {self.learning_rate}"
            )
        if self.min_learning_rate and self.schedule == "constant":
            raise ValueError(
                f"min_learning_rate = {self.min_learning_rate} has no effect with schedule = 'constant': leave it at "
                "0, or set schedule to 'linear' or 'cosine'"
            )


def warmup_warning(config: OptimizerConfig, updates: int) -> str | None:
    """Warning if the warm-up lasts for all updates of a run."""
    if config.warmup_steps < updates:
        return None
    return (
        f"the learning rate still rises at the last update: there are {updates} updates, and optimizer.warmup_steps = "
        f"{config.warmup_steps}. Train longer, or lower warmup_steps"
    )


class Algorithm(NamedTuple):
    """One optimiser: its transformation of the clipped gradient, without the learning rate, and the fields it uses."""

    scale: Callable[[OptimizerConfig], optax.GradientTransformation]
    decoupled: bool  # True: weight decay is added to the transformed update; False: to the gradient
    reads: tuple[str, ...]


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=_or(config.b1, 0.9), b2=_or(config.b2, 0.999), eps=config.epsilon)


def _rmsprop(config: OptimizerConfig) -> optax.GradientTransformation:
    """torch.optim.RMSprop, which Rafailov et al. 2023 (arXiv:2305.18290) use: epsilon is outside the square root."""
    scale = optax.scale_by_rms(decay=_or(config.b2, 0.99), eps=config.epsilon, eps_in_sqrt=False)
    return optax.chain(scale, _momentum(config))


def _lion(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.scale_by_lion(b1=_or(config.b1, 0.9), b2=_or(config.b2, 0.99))


def _adafactor(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adafactor without scaling by the parameter's size, so that learning rates are comparable with other optimisers.

    Like transformers' `adafactor`, which sets scale_parameter = False. Matrices below 128 x 128 are not factored.
    """
    del config
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))


def _momentum(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.trace(decay=config.momentum) if config.momentum else optax.identity()


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


ALGORITHMS: dict[str, Algorithm] = {
    "adamw": Algorithm(_adam, decoupled=True, reads=("epsilon", "b1", "b2")),
    "adam": Algorithm(_adam, decoupled=False, reads=("epsilon", "b1", "b2")),
    "rmsprop": Algorithm(_rmsprop, decoupled=False, reads=("epsilon", "b2", "momentum")),
    "adafactor": Algorithm(_adafactor, decoupled=True, reads=()),
    "lion": Algorithm(_lion, decoupled=True, reads=("b1", "b2")),
    "sgd": Algorithm(_momentum, decoupled=False, reads=("momentum",)),
}


def learning_rate(config: OptimizerConfig, updates: int) -> optax.Schedule:
    """Make the learning-rate schedule of a run of `updates` updates."""
    decay_steps = max(1, updates - config.warmup_steps)
    top, bottom = config.learning_rate, config.min_learning_rate
    after_warmup = {
        "constant": lambda: optax.constant_schedule(top),
        "linear": lambda: optax.linear_schedule(top, bottom, decay_steps),
        "cosine": lambda: optax.cosine_decay_schedule(top, decay_steps, alpha=bottom / top),
    }[config.schedule]()
    warmup = optax.linear_schedule(0.0, top, max(1, config.warmup_steps))
    return optax.join_schedules([warmup, after_warmup], [config.warmup_steps])


class Optimizer(NamedTuple):
    """An optax transformation, the way in which its updates are added to low-precision weights, and its storage."""

    transformation: optax.GradientTransformation
    low_precision: LowPrecision
    moments: Literal["float32", "bfloat16"] = "float32"

    def init(self, params: PyTree) -> rounding.State:
        """Initialise the state; its moments have the same dtype for parameters of any dtype."""
        masters = rounding.init_masters(self.low_precision, params)
        inner = self.transformation.init(rounding.float32(params))
        return rounding.State(rounding.bfloat16_moments(inner) if self.moments == "bfloat16" else inner, masters)


def make_optimizer(config: OptimizerConfig, updates: int) -> Optimizer:
    """Create the optimiser for a run of `updates` updates."""
    return with_freezing(config, optax.chain(clip_gradients(config), algorithm(config, updates)))


def clip_gradients(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clip gradients by their global norm.

    A gradient is multiplied by one factor: XLA fuses this into the moments' updates, but computes the quotients of
    `optax.clip_by_global_norm` in passes of their own.
    """

    def clip(grads: PyTree, params: PyTree | None) -> PyTree:
        del params
        norm = optax.tree.norm(grads)
        factor = jnp.where(norm < config.max_grad_norm, 1, config.max_grad_norm / norm)
        return jax.tree.map(lambda grad: grad * factor, grads)

    return optax.stateless(clip)


def algorithm(config: OptimizerConfig, updates: int) -> optax.GradientTransformation:
    """Make the config's optimiser with weight decay and learning rate, without gradient clipping."""
    chosen = ALGORITHMS[config.name]
    decay = optax.add_decayed_weights(config.weight_decay, functools.partial(decayed, config.no_decay))
    parts = [decay] if config.weight_decay else []
    scaled = [chosen.scale(config)]
    ordered = [*scaled, *parts] if chosen.decoupled else [*parts, *scaled]
    return optax.chain(*ordered, optax.scale_by_learning_rate(learning_rate(config, updates)))


def with_freezing(config: OptimizerConfig, transformation: optax.GradientTransformation) -> Optimizer:
    """Make an optimiser of a transformation that leaves frozen parameters unchanged, without state for them."""
    if config.freeze:
        labels = functools.partial(_frozen, config.freeze)
        transformation = optax.multi_transform({False: transformation, True: optax.set_to_zero()}, labels)
    return Optimizer(transformation, config.low_precision, config.moments)


def gradients(
    config: OptimizerConfig,
    loss_fn: Callable[[PyTree, Rows], LossAndMetrics],
    params: PyTree,
    batch: Rows,
    weight: Callable[[Rows], Array],
    axes: tuple[str, ...],
) -> tuple[Array, dict[str, Metric], PyTree]:
    """Compute loss, metrics and gradient of a batch, at once or accumulated over micro-batches of its rows.

    Gradients are computed and accumulated in float32; low-precision parameters are cast to float32 before the loss.

    Args: loss_fn returns a mean over its rows, and metrics; weight returns the denominator of that mean, as in
    `accumulated`. Raises RlhfError unless the rows divide into micro-batches.
    """

    def with_frozen(params: PyTree, rows: Rows) -> LossAndMetrics:
        return loss_fn(stop_frozen(config, params), rows)

    grad_fn = jax.value_and_grad(with_frozen, has_aux=True)
    if config.micro_batch is not None:
        grad_fn = accumulated(grad_fn, config.micro_batch, weight, axes)
    (loss, metrics), grads = grad_fn(rounding.float32(params), batch)
    return loss, metrics, grads


def stop_frozen(config: OptimizerConfig, params: PyTree) -> PyTree:
    """Stop the gradients of the parameters that `config.freeze` names. Raises RlhfError if a pattern names none."""
    if not config.freeze:
        return params
    return jax.tree.map(
        lambda leaf, frozen: jax.lax.stop_gradient(leaf) if frozen else leaf, params, _frozen(config.freeze, params)
    )


def accumulated(
    grad_fn: GradientFunction[Rows], rows: int, weight: Callable[[Rows], Array], axes: tuple[str, ...]
) -> GradientFunction[Rows]:
    """Accumulate a gradient over micro-batches of `rows` rows, counted over all devices.

    Args: grad_fn is `jax.value_and_grad(loss_fn, has_aux=True)` of a loss that is a mean over its rows, with metrics;
    weight returns the denominator of that mean, the number of tokens or rows on all devices. Micro-batches are weighted
    by it, so that accumulation only changes rounding.
    """

    def accumulated_grad_fn(params: PyTree, batch: Rows) -> tuple[LossAndMetrics, PyTree]:
        devices = jax.lax.axis_size(axes) if axes else 1
        count = micro_batches(len(jax.tree.leaves(batch)[0]) * devices, rows, devices)
        parts = strided(batch, count)
        shares = _shares(weight, parts)

        def accumulate(sums: PyTree, part: tuple[Rows, Array]) -> tuple[PyTree, LossAndMetrics]:
            batch, share = part
            (loss, metrics), grads = grad_fn(params, batch)
            sums = jax.tree.map(lambda total, grad: total + share * grad, sums, grads)
            return sums, (loss, metrics)

        grads, (losses, metrics) = jax.lax.scan(accumulate, jax.tree.map(jnp.zeros_like, params), (parts, shares))
        return (jnp.sum(losses * shares), combine(metrics)), grads

    return accumulated_grad_fn


def update(
    optimizer: Optimizer,
    grads: PyTree,
    params: dict[str, PyTree],
    opt_state: rounding.State,
    axes: tuple[str, ...],
    *,
    key: PRNGKeyArray,
) -> tuple[PyTree, rounding.State, dict[str, Array]]:
    """Take one optimiser step: return new parameters, new optimiser state, and metrics.

    Gradients are averaged over mapped axes: losses reduce with `psum`, whose derivative sums the devices' cotangents,
    so that each device's gradient is its share of the total times the number of devices.

    Args: key is the random key of stochastic rounding, from `rounding.update_key`, and equal on all devices.
    Returns: the metrics are `grad_norm` before clipping, in total and per network if there are several, and
    `update_survived`.
    """
    if axes:
        grads = jax.lax.pmean(grads, axes)
    updates, moments = optimizer.transformation.update(
        grads, rounding.float32_moments(opt_state.inner), rounding.trained_values(params, opt_state.masters)
    )
    inner = rounding.stored_moments(moments, opt_state.inner, key)
    params, masters, kept = rounding.apply(optimizer.low_precision, params, opt_state.masters, updates, key)
    each = {f"grad_norm/{name}": optax.tree.norm(grads[name]) for name in grads} if len(grads) > 1 else {}
    norms = {"grad_norm": optax.tree.norm(grads), **each}
    return params, rounding.State(inner, masters), {**norms, "update_survived": kept}


def micro_batches(batch: int, rows: int | None, devices: int) -> int:
    """Return the number of micro-batches of `rows` rows in a batch over some devices, as in `slice_count`."""
    return slice_count(batch, rows, devices, field="optimizer.micro_batch")


def _shares(weight: Callable[[Rows], Array], parts: Rows) -> Array:
    weights = jax.lax.map(weight, parts).astype(jnp.float32)
    return weights / jnp.maximum(jnp.sum(weights), 1)


def _frozen(patterns: tuple[str, ...], params: PyTree) -> PyTree:
    """Mask of frozen parameters. Raises RlhfError naming a pattern that matches no path."""
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    for pattern in patterns:
        if not any(re.search(pattern, path) for path in paths):
            raise RlhfError(f"optimizer.freeze: {pattern!r} matches no parameter; a parameter is {paths[0]!r}")
    if all(any(re.search(pattern, path) for pattern in patterns) for path in paths):
        raise RlhfError(f"optimizer.freeze = {patterns} leaves nothing to train")
    still = [any(re.search(pattern, path) for pattern in patterns) for path in paths]
    return jax.tree.unflatten(jax.tree.structure(params), still)


def decayed(patterns: tuple[str, ...], params: PyTree) -> PyTree:
    """Mask of the parameters with weight decay: their paths match no pattern."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: (
            not any(re.search(pattern, jax.tree_util.keystr(path, simple=True, separator="/")) for pattern in patterns)
        ),
        params,
    )
