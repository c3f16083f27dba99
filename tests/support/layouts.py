"""Programs of all stages at sizes that divide over eight devices, for the layouts that a config can name."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data.layouts import Groups, layouts, packed, packed_width, size_of
from rlhf_jax.data.ragged import RowWidths
from rlhf_jax.methods import dpo
from rlhf_jax.methods.offline import Updates
from rlhf_jax.methods.policy_gradient import Iteration
from rlhf_jax.methods.policy_parts import Networks
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.scalars import ScalarNetwork
from rlhf_jax.models.sharding import on_devices
from rlhf_jax.runtime import hlo, program_costs
from rlhf_jax.runtime.programs import RuntimeConfig, Step, make_placement
from rlhf_jax.sampling import batches
from rlhf_jax.sampling.choice import Sampling
from rlhf_jax.sampling.compiled import mesh_of
from rlhf_jax.stages import kto, online_dpo, reward_model, sft
from tests.support import networks, tiny
from tests.support.programs import runtime

DEVICES, ROWS, VOCAB = 8, 16, 64
LAYOUTS = {
    "data=8": runtime("jit", data=8, fsdp=1, tensor=1),
    "fsdp=8": runtime("jit", data=1, fsdp=8, tensor=1),
    "data=2 x tensor=4": runtime("jit", data=2, fsdp=1, tensor=4),
    "fsdp=4 x tensor=2": runtime("jit", data=1, fsdp=4, tensor=2),
    "pmap=8": runtime("pmap", data=8, fsdp=1, tensor=1),
}
MODEL = networks.config(d_model=64, n_layers=2, n_heads=4, d_ff=256)
POLICY = PolicyNetwork(MODEL, VOCAB, tiny.SUPPRESSED)
REWARD = ScalarNetwork(MODEL, VOCAB, "mean")
ONLINE_DPO = online_dpo.OnlineDPOConfig(
    **{name: getattr(tiny.PPO, name) for name in ("policy", "reward_model", "iterations", "optimizer", "loop")},
    **{"minibatches": 2, "epochs": 2, "temperature": 1.0, "samples_every": 1, "samples_written": 4},
    kind="online_dpo",
    batch_size=ROWS,
    beta=0.1,
)


class Case(NamedTuple):
    """Inputs of a program: a function from the placement's axes to the step, and the step's first three arguments."""

    step: Callable[[tuple[str, ...]], Step]
    state: Any
    frozen: Any
    batch: Any


def _offline(make_step: Callable, network: Any, name: str, batch: Any, frozen: Any = ()) -> Case:
    def updates(axes: tuple[str, ...]) -> Updates:
        return Updates(network, tiny.OPTIMIZER, 3, axes)

    state = updates(()).init({name: network.init(jax.random.key(0))})
    return Case(lambda axes: make_step(updates(axes)), state, frozen, batch)


def _online(config: Any, prompts: int, method: Any = None, value: ScalarNetwork | None = None) -> Case:
    params = {"policy": POLICY.init(jax.random.key(0))}
    if value:
        params["value"] = value.init(jax.random.key(1))
    of_networks = Networks(POLICY, value, (tiny.EOS,), tiny.RESPONSE)

    def iteration(axes: tuple[str, ...]) -> Iteration:
        return tiny.iteration(config, axes, (), of_networks, method)

    frozen = {"reference": POLICY.init(jax.random.key(2)), "reward": REWARD.init(jax.random.key(3))}
    return Case(
        lambda axes: iteration(axes).step(REWARD), iteration(()).init_state(params), frozen, tiny.online(prompts)
    )


def _unpaired() -> Any:
    chosen = tiny.preferences(ROWS).chosen
    data = kto.Labelled(tiny.ragged(chosen), np.arange(ROWS) % 2 == 0)
    table = kto.make_table(kto.KTO, data)
    return table.padded(np.arange(ROWS), RowWidths(tiny.PROMPT + tiny.RESPONSE, tiny.RESPONSE))


def _packed(batch: Any) -> Any:
    groups = Groups(DEVICES, 1)
    width = packed_width(tiny.PROMPT + tiny.RESPONSE, groups.rows_of(ROWS))
    given = layouts(batch, groups, width)
    return packed(batch, given, size_of(given, width, per_doubling=6), width)


def _reference() -> dict[str, Any]:
    return {"reference": POLICY.init(jax.random.key(2)), "beta": jnp.float32(0.1)}


CASES: dict[str, Callable[[], Case]] = {
    "sft": lambda: _offline(sft.make_step, POLICY, "policy", tiny.demonstrations(ROWS)),
    "sft, packed": lambda: _offline(sft.make_step, POLICY, "policy", _packed(tiny.demonstrations(ROWS))),
    "reward_model": lambda: _offline(reward_model.make_step, REWARD, "reward", tiny.preferences(ROWS)),
    "dpo": lambda: _offline(dpo.make_step, POLICY, "policy", tiny.preferences(ROWS), _reference()),
    "dpo, packed": lambda: _offline(dpo.make_step, POLICY, "policy", _packed(tiny.preferences(ROWS)), _reference()),
    "kto": lambda: _offline(kto.make_step, POLICY, "policy", _unpaired(), _reference()),
    "ppo": lambda: _online(tiny.PPO, ROWS, value=REWARD),
    "grpo": lambda: _online(tiny.group_config("grpo", batch_size=2 * ROWS, minibatches=2), ROWS // 2),
    "online_dpo": lambda: _online(ONLINE_DPO, ROWS, online_dpo.build_method(ONLINE_DPO)),
}


def _bulk_generate(place: Callable) -> tuple:
    prompts = tiny.prompts(ROWS)
    sampling = Sampling(tiny.RESPONSE, 1.0, (tiny.EOS,))
    limits = np.full(ROWS, tiny.RESPONSE, np.int32)
    return POLICY, place(POLICY), prompts, limits, jax.random.key(0), sampling, 1, None


BULK: dict[str, tuple[Callable, Callable[[Callable], tuple]]] = {
    "generate": (batches.generate_batch, _bulk_generate),
    "score": (batches.score_batch, lambda place: (REWARD, place(REWARD), tiny.preferences(ROWS).chosen)),
    "logprobs": (batches.logprobs_of, lambda place: (POLICY, place(POLICY), tiny.preferences(ROWS).chosen, 1.0)),
}
"""Programs outside of training: the compiled function, and its arguments, given where parameters lie."""


class Measured(NamedTuple):
    """Costs of a program on one device, and quantities of the program that do not depend on the layout."""

    costs: program_costs.Costs
    flops: float  # of the jaxpr: those of all devices together
    trained: int  # bytes of the trained parameters
    frozen: int  # bytes of the frozen parameters
    whole: frozenset[str]  # parameters of which some device gathers all elements


@functools.cache
def measure(name: str, where: RuntimeConfig) -> Measured:
    """Compile the program of a stage for a layout and count."""
    case, placement = CASES[name](), make_placement(where, seeds=1)
    state, frozen = placement.put_state(case.state), placement.put_frozen(case.frozen)
    program = placement.compile(case.step(placement.axes), state)
    batches, key = tiny.several([case.batch]), jax.random.key(0)
    loops = tiny.RESPONSE - 1  # iterations of the decode loop
    if where.strategy == "pmap":
        batches = jax.tree.map(lambda leaf: leaf.reshape(1, DEVICES, -1, *leaf.shape[2:]), batches)
    compiled = program.compiled.lower(state, frozen, batches, key).compile()  # type: ignore[attr-defined]
    jaxpr = jax.make_jaxpr(case.step(()))(case.state, case.frozen, case.batch, key)
    return Measured(
        program_costs.of_compiled(compiled, unknown_loops=loops),
        program_costs.of_jaxpr(jaxpr.jaxpr, unknown_loops=loops),
        _bytes(case.state.params),
        _bytes(case.frozen),
        _gathered_whole(compiled, (case.state.params, case.frozen)),
    )


@functools.cache
def measure_bulk(name: str, where: RuntimeConfig) -> Measured:
    """Compile a program that samples or scores in bulk for a layout and count."""
    function, arguments = BULK[name]

    def place(network: PolicyNetwork | ScalarNetwork) -> Any:
        params = network.init(jax.random.key(0))
        return jax.device_put(params, on_devices(params, make_placement(where, seeds=1).where))

    arrays = jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf, arguments(place))
    args, loops = arguments(place), tiny.RESPONSE - 1
    compiled = function.program.lower(mesh_of(args), *args).compile()  # type: ignore[attr-defined]
    jaxpr = jax.make_jaxpr(lambda: function.__wrapped__(*arrays))()  # type: ignore[attr-defined]
    return Measured(
        program_costs.of_compiled(compiled, unknown_loops=loops),
        program_costs.of_jaxpr(jaxpr.jaxpr, unknown_loops=loops),
        0,
        _bytes(args[1]),
        _gathered_whole(compiled, args[1]),
    )


def _gathered_whole(compiled: jax.stages.Compiled, params: Any) -> frozenset[str]:
    """Names of the matrices whose shape an all-gather of a program has."""
    program = hlo.parse(compiled.as_text() or "")
    gathered = {
        tuple(sorted(size for size in array.sizes if size > 1))
        for computation in program.computations.values()
        for each in computation
        if each.op.removesuffix("-start") == "all-gather"
        for array in hlo.arrays_of(each.shape)
    }
    names = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        sizes = leaf.shape
        if len(sizes) > 1:
            forms = (sizes, (sizes[0], math.prod(sizes[1:])), (math.prod(sizes[:-1]), sizes[-1]))  # heads joined
            if any(tuple(sorted(form)) in gathered for form in forms):
                names.add(jax.tree_util.keystr(path, simple=True, separator="/"))
    return frozenset(names)


def _bytes(params: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))
