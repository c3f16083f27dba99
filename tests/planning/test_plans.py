"""Plans for CPU devices, against sizes and FLOPs by hand; memory that runs out; meshes; the command."""

import json
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax import experiment
from rlhf_jax.api import load_config
from rlhf_jax.main import main
from rlhf_jax.planning import compiling, machines
from rlhf_jax.planning.plans import Planner
from rlhf_jax.planning.stage_outlines import ProgramOutline
from rlhf_jax.types import RlhfError

WIDTH, HIDDEN, VOCAB, LENGTH, ROWS = 32, 64, 512, 16 + 12, 16
MODEL = {
    "d_model": WIDTH,
    "n_layers": 2,
    "n_heads": 2,
    "d_ff": HIDDEN,
    "activation": "relu",
    "param_dtype": "float32",
    "compute_dtype": "float32",
}
LAYER = 4 * WIDTH**2 + 2 * WIDTH * HIDDEN
PARAMETERS = VOCAB * WIDTH + 2 * (LAYER + 2 * WIDTH) + WIDTH


def planner(memory: float | None = None, topology: str = "cpu:2", **changes) -> Planner:
    """Planner of the smoke variant of `preferences`, with the model above, on CPUs with so much memory."""
    overrides = {"sft.model": MODEL, "sft.tokenizer.vocab_size": VOCAB, "stages": ("sft",), **changes}
    machine = machines.machine(topology)
    machine = machine._replace(chip=machine.chip._replace(memory=memory))
    return Planner(experiment.parse(load_config("preferences:smoke", overrides)), machine)


def test_parameters_memory_and_flops_are_those_by_hand():
    (plan,) = planner(**{"runtime.data": 2}).stages(None)
    assert plan.trained == PARAMETERS
    assert (plan.rows, plan.calls) == (ROWS, 4)  # 64 pairs
    (program,) = plan.programs
    # Weights and Adam's two moments in float32, three counters, and half of the batch: tokens and two masks.
    state, batch = 3 * 4 * PARAMETERS, ROWS // 2 * LENGTH * (4 + 1 + 1)
    assert program.compiled.memory is not None and program.compiled.costs is not None
    assert program.compiled.memory.arguments == pytest.approx(state + batch, abs=64)
    # Products of the layers for all tokens; attention's two products, over all pairs of positions; the logits of all
    # predictions. The backward pass takes twice the forward pass.
    tokens = ROWS // 2 * LENGTH
    forward = 2 * tokens * 2 * LAYER + 2 * 4 * tokens * LENGTH * WIDTH
    logits = 2 * ROWS // 2 * (LENGTH - 1) * VOCAB * WIDTH
    assert program.compiled.costs.flops == pytest.approx(3 * (forward + logits), rel=0.01)
    assert program.compiled.replication == pytest.approx(1, abs=0.05)
    # The table of embeddings is also the head, and both gradients are reduced.
    reduced = 4 * (PARAMETERS + VOCAB * WIDTH)
    assert program.compiled.costs.bytes["all-reduce"] == pytest.approx(reduced, rel=0.01)
    assert plan.seconds == 4 * program.seconds


@pytest.mark.nightly
def test_fsdp_halves_the_state_of_a_device():
    (plan,) = planner(**{"runtime.fsdp": 2}).stages(None)
    memory = plan.programs[0].compiled.memory
    split = VOCAB * WIDTH + 2 * LAYER
    assert memory is not None
    assert memory.arguments == pytest.approx(12 * (split / 2 + PARAMETERS - split) + 8 * LENGTH * 6, abs=64)


def test_a_program_that_does_not_fit_is_said_to():
    nothing = planner(1000)
    plans = list(nothing.stages(None))
    assert [program.fits for plan in plans for program in plan.programs] == [False]
    smallest = nothing.smallest(plans, print)
    assert smallest is not None and smallest.mesh is None and smallest.need is not None
    assert smallest.need.bytes > 1000


def test_a_mesh_that_was_planned_is_not_compiled_again(monkeypatch):
    enough = planner(1e12)
    plans = list(enough.stages(None))
    monkeypatch.delattr("rlhf_jax.planning.plans.compile_program")
    smallest = enough.smallest(plans, print)
    assert smallest is not None and smallest.mesh == (1, 1, 1) and smallest.fits


@pytest.mark.nightly
def test_the_smallest_mesh_is_found_by_arithmetic_and_compiled():
    """With memory for a program on four devices, one on a single device does not fit."""
    sharded = {"runtime.fsdp": 4}
    (whole,), (quarter,) = planner().stages(None), planner(topology="cpu:8", **sharded).stages(None)
    needs = [plan.programs[0].needed or 0 for plan in (whole, quarter)]
    assert needs[1] < needs[0] / 2
    enough = planner(1.2 * needs[1], "cpu:8")
    plans = list(enough.stages(None))
    assert [program.fits for plan in plans for program in plan.programs] == [False]
    said = []
    smallest = enough.smallest(plans, said.append)
    assert smallest is not None and smallest.mesh is not None and smallest.fits
    assert smallest.mesh.fsdp == 4 and 1 <= len(said) <= 2


@pytest.mark.nightly
def test_other_arrays_that_live_beside_a_program_are_counted():
    """The reward model is no argument of the program that samples, but its memory is not free meanwhile."""
    stages = {"stages": ("sft", "reward_model", "ppo"), "ppo.trim_padding": True, "data.max_response_tokens": 40}
    (plan,) = planner(**stages).stages("ppo")
    sample, learn = plan.programs
    assert (sample.compiled.name, learn.compiled.name) == ("sample", "learn")
    reward = 4 * (PARAMETERS + WIDTH)
    assert sample.extras >= reward > learn.extras
    assert sample.needed == (sample.compiled.needed or 0) + sample.extras


def test_work_that_all_devices_do_alike_is_found():
    mesh = Mesh(jax.devices()[:2], ("data",), axis_types=(AxisType.Auto,))
    arrays = [jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=NamedSharding(mesh, P()))] * 2
    program = ProgramOutline("update", jax.jit(lambda a, b: a @ b), tuple(arrays), 0)
    assert compiling.compile_program(program, machines.machine("cpu:2"), 2).replication == 2


@pytest.mark.parametrize(
    ("message", "used"),
    [
        ("Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded", int(20.5 * 2**30)),
        ("Used 512.00M of 15.75G hbm.", 2**29),
        ("RESOURCE_EXHAUSTED", None),
    ],
)
def test_the_compiler_says_how_much_memory_is_missing(message, used):
    assert compiling.used_bytes(message) == used


@pytest.mark.parametrize("topology", ["v5e", "v5e:", "v5e:0x2", "h200:8", "v5e:2x2x2x2", "cpu:two"])
def test_a_topology_that_is_none_is_refused(topology):
    with pytest.raises(RlhfError, match="cpu:2"):
        machines.machine(topology)


@pytest.mark.parametrize(
    ("whole", "count", "part"),
    [
        ("v5e:16x16", 128, "v5e:8x16"),
        ("v5e:16x16", 64, "v5e:8x8"),
        ("v5p:4x4x8", 32, "v5p:2x4x4"),
        ("v5p:8x8x8", 4, "v5p:2x2x1"),
        ("h100:8", 2, "h100:2"),
    ],
)
def test_a_part_of_a_machine_is_an_arrangement_that_exists(whole, count, part):
    found = machines.machine(whole).part(count)
    assert found is not None and found.topology == part and found.device_count == count
    assert found.chip is machines.CHIPS[part.partition(":")[0]]


def test_a_number_that_no_halving_gives_is_no_part():
    assert machines.machine("h100:6").part(4) is None
    assert machines.machine("h100:6").part(3) == machines.machine("h100:3")


def test_machines_have_as_many_devices_as_their_names_say():
    assert [machines.machine(name).device_count for name in ("v5e:16x16", "v5p:4x4x8", "h100:8", "v5e:1")] == [
        256,
        128,
        8,
        1,
    ]


@pytest.mark.parametrize(("topology", "extra"), [("v5e:2x2", "plan"), ("h100:8", "cuda12")])
def test_a_compiler_that_is_not_installed_is_named(topology, extra, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RlhfError, match=rf"rlhf-jax\[{extra}\]"):
        machines.devices(machines.machine(topology))


def test_the_command_prints_stages_and_the_run(capsys):
    flags = ["plan", "--config=preferences:smoke", "--topology=cpu:2", "--stage=sft", "--config.runtime.data=2"]
    assert main([*flags, "--json"]) == 0
    stage, whole = map(json.loads, capsys.readouterr().out.splitlines())
    assert (stage["stage"], stage["mesh"]) == ("sft", {"data": 2, "fsdp": 1, "tensor": 1})
    assert stage["programs"][0]["bound"] in ("FLOP", "memory", "interconnect")
    assert whole["devices"] == 2 and whole["seconds"] == pytest.approx(stage["seconds"])
    assert main(flags) == 0
    out = capsys.readouterr().out
    assert "sft (sft)" in out and "all-reduce" in out and "device hours" in out


def test_bad_requests_end_with_one_message(capsys):
    flags = ["plan", "--config=preferences:smoke"]
    for more, words in (
        (["--topology=cpu:2", "--stage=dpo_2"], "--stage=dpo_2"),
        (["--topology=cpu:2", "--config.runtime.strategy=pmap"], "strategy=jit"),
        (["--topology=cpu:2", "--config.runtime.data=4"], "requires 4 devices"),
        ([], "--topology"),
    ):
        assert main([*flags, *more]) == 1
        error = capsys.readouterr().err
        assert words in error and "Traceback" not in error


@pytest.mark.nightly
def test_every_planned_number_is_finite():
    for plan in planner(**{"stages": ("sft", "reward_model", "dpo")}).stages(None):
        for program in plan.programs:
            assert all(math.isfinite(seconds) and seconds >= 0 for seconds in program.times.values())


def test_programs_may_use_the_share_of_a_gpu_that_jax_takes(monkeypatch):
    machine = machines.machine("h100:1")
    whole = machine.chip.memory or 0
    monkeypatch.delenv(machines.GPU_SHARE, raising=False)
    assert machine.memory == pytest.approx(0.75 * whole)
    monkeypatch.setenv(machines.GPU_SHARE, "0.95")
    assert machine.memory == pytest.approx(0.95 * whole)
