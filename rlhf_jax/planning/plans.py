"""Plans of experiments: every stage's programs on a machine, and the smallest mesh of it that fits."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax

from rlhf_jax.experiment import Experiment
from rlhf_jax.planning import machines, shapes
from rlhf_jax.planning.compiling import Bound, Compiled, compile_program
from rlhf_jax.planning.machines import Machine
from rlhf_jax.planning.outlines import Outlines
from rlhf_jax.planning.run_lengths import calls
from rlhf_jax.planning.stage_outlines import ProgramOutline, RunOutline, StageOutline
from rlhf_jax.planning.stage_programs import outline
from rlhf_jax.runtime.checkpoints import TrainState
from rlhf_jax.runtime.programs import MeshPlacement, make_placement
from rlhf_jax.stages.kinds import find_kind
from rlhf_jax.types import RlhfError


class ProgramPlan(NamedTuple):
    """One program of a stage on a machine."""

    compiled: Compiled
    extras: int  # bytes of a device that are not arguments of the program, and that the stage's other programs read
    fits: bool | None  # None: the machine's memory is not known
    times: dict[Bound, float]  # least seconds of a call

    @property
    def seconds(self) -> float:
        """Least seconds of a call."""
        return max(self.times.values())

    @property
    def bound(self) -> Bound:
        """Resource that takes the longest."""
        return max(self.times, key=lambda name: self.times[name])

    @property
    def needed(self) -> int | None:
        """Bytes of a device; None if the compiler does not say."""
        return None if self.compiled.needed is None else self.compiled.needed + self.extras


class StagePlan(NamedTuple):
    """A stage on a machine."""

    name: str
    kind: str
    trained: int  # parameters
    frozen: int  # parameters
    rows: int  # of a call
    row: str
    calls: int | None  # of each program; None: they depend on what earlier stages find
    programs: tuple[ProgramPlan, ...]

    @property
    def seconds(self) -> float | None:
        """Least seconds of the stage."""
        return None if self.calls is None else self.calls * sum(program.seconds for program in self.programs)


class MeshSizes(NamedTuple):
    """Number of devices along each axis of a mesh."""

    data: int
    fsdp: int
    tensor: int

    @property
    def devices(self) -> int:
        """Number of devices."""
        return math.prod(self)


class Need(NamedTuple):
    """Memory that the largest program of an experiment needs on a mesh."""

    bytes: float  # of a device
    stage: str
    program: int  # place among the stage's programs


class SmallestMesh(NamedTuple):
    """Smallest mesh whose devices hold all programs."""

    mesh: MeshSizes | None  # None: no mesh of the machine does
    need: Need | None  # predicted
    fits: bool  # as compiled


class Planner:
    """Plans of one experiment on one machine."""

    def __init__(self, experiment: Experiment, machine: Machine) -> None:
        """Take an experiment, and the devices of the machine. Raises RlhfError for `strategy = "pmap"`."""
        runtime = experiment.runtime
        if runtime.strategy == "pmap":
            raise RlhfError("plans are of programs that jit compiles: set --config.runtime.strategy=jit")
        self.machine, self.mesh = machine, MeshSizes(runtime.data, runtime.fsdp, runtime.tensor)
        self._experiment, self._devices = experiment, machines.devices(machine)
        self._outlines = Outlines(experiment.stages)
        self._programs: dict[tuple[str, int, MeshSizes], ProgramPlan] = {}

    def stages(self, only: str | None) -> Iterator[StagePlan]:
        """Plan the stages one after another, or only one. Stages without programs of their own are left out."""
        for name in [only] if only else self._experiment.stages:
            found = self._outline(name, self.mesh)
            if found is None:
                continue
            params = found.state.params if isinstance(found.state, TrainState) else ()
            yield StagePlan(
                name,
                self._experiment.stages[name].kind,
                shapes.parameters_of(params),
                shapes.parameters_of(found.frozen),
                found.rows,
                found.row,
                calls(self._experiment, name),
                tuple(self._program(name, found, place, self.mesh) for place in range(len(found.programs))),
            )

    def smallest(self, plans: Sequence[StagePlan], report: Callable[[str], None]) -> SmallestMesh | None:
        """Find the smallest mesh of the machine that holds all programs; None if the memory of its chips is not known.

        States and frozen networks are counted as they lie on a mesh, and temporaries are taken to be proportional to a
        device's rows. The program that needs the most is then compiled, unless it has been for this mesh, and for the
        next mesh again if it does not fit.
        """
        limit = self.machine.memory
        if limit is None or any(program.needed is None for plan in plans for program in plan.programs):
            return None
        needs = {mesh: self._need(plans, mesh) for mesh in self._meshes(plans)}
        best = SmallestMesh(None, min(needs.values(), default=None), False)
        for mesh in [mesh for mesh, need in needs.items() if need.bytes <= limit][:2]:
            need = needs[mesh]
            report(f"compiling {need.stage} for {mesh.devices} devices, to see whether it fits")
            found = self._outline(need.stage, mesh)
            assert found is not None
            best = SmallestMesh(mesh, need, bool(self._program(need.stage, found, need.program, mesh).fits))
            if best.fits:
                return best
        return best

    def _outline(self, name: str, mesh: MeshSizes) -> StageOutline | None:
        experiment, runtime = self._experiment, dataclasses.replace(self._experiment.runtime, **mesh._asdict())
        seeds = experiment.seeds if find_kind(experiment.stages[name].kind, name).seeded else 1
        placement = make_placement(runtime, seeds, self._devices_of(mesh))
        assert isinstance(placement, MeshPlacement)
        run = RunOutline(self._outlines, experiment.stages, experiment.data, runtime, placement)
        return outline(run, name)

    def _devices_of(self, mesh: MeshSizes) -> Sequence[jax.Device]:
        """Devices of the machine, or of a smaller one of which the mesh occupies all."""
        part = None if mesh == self.mesh else self.machine.part(mesh.devices)
        return self._devices if part is None else machines.devices(part)

    def _program(self, name: str, stage: StageOutline, place: int, mesh: MeshSizes) -> ProgramPlan:
        """Plan one program of a stage, compiled once for each mesh."""
        key = name, place, mesh
        if key not in self._programs:
            self._programs[key] = self._compiled(stage, stage.programs[place], mesh)
        return self._programs[key]

    def _compiled(self, stage: StageOutline, program: ProgramOutline, mesh: MeshSizes) -> ProgramPlan:
        compiled = compile_program(program, self.machine, mesh.devices)
        live = shapes.bytes_of_device(stage.state) + shapes.bytes_of_device(stage.frozen)
        extras = max(0, live - compiled.memory.arguments) if compiled.memory else 0
        fits, limit = None, self.machine.memory
        if limit is not None:
            fits = compiled.memory is not None and compiled.memory.peak + extras <= limit
        return ProgramPlan(compiled, extras, fits, compiled.times(self.machine, stage.dtype))

    def _meshes(self, plans: Sequence[StagePlan]) -> Iterator[MeshSizes]:
        """Meshes with fully sharded weights and the config's tensor axis, over which the rows of all stages divide."""
        batch = self._experiment.runtime.inference_batch
        tensor, rows = self.mesh.tensor, math.gcd(batch, *(plan.rows for plan in plans))
        for power in range(self.machine.device_count.bit_length()):
            mesh = MeshSizes(1, 2**power, tensor)
            if mesh.devices <= self.machine.device_count and rows % mesh.fsdp == 0:
                yield mesh

    def _need(self, plans: Sequence[StagePlan], mesh: MeshSizes) -> Need:
        """Predict the memory of the largest program on a mesh."""
        share = (self.mesh.data * self.mesh.fsdp) / mesh.fsdp
        needs = []
        for plan in plans:
            here, there = self._outline(plan.name, self.mesh), self._outline(plan.name, mesh)
            assert here is not None and there is not None
            live, other = (shapes.bytes_of_device((each.state, each.frozen)) for each in (here, there))
            for place, program in enumerate(plan.programs):
                assert program.needed is not None
                needs.append(Need(other + max(0, program.needed - live) * share, plan.name, place))
        return max(needs)
