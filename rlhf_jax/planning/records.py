"""Plans as JSON."""

import time
from collections.abc import Callable, Sequence

from rlhf_jax.planning.compiling import REPLICATED
from rlhf_jax.planning.plans import Planner, ProgramPlan, StagePlan
from rlhf_jax.runtime import provenance
from rlhf_jax.types import Json


def stage_record(plan: StagePlan, planner: Planner) -> dict[str, Json]:
    """Convert the plan of a stage."""
    return {
        "stage": plan.name,
        "kind": plan.kind,
        "topology": planner.machine.topology,
        "mesh": planner.mesh._asdict(),
        "trained": plan.trained,
        "frozen": plan.frozen,
        "rows": plan.rows,
        "row": plan.row,
        "calls": plan.calls,
        "seconds": plan.seconds,
        "programs": [_program(program, planner) for program in plan.programs],
    }


def _program(plan: ProgramPlan, planner: Planner) -> dict[str, Json]:
    compiled, memory, costs = plan.compiled, plan.compiled.memory, plan.compiled.costs
    return {
        "program": compiled.name,
        "fits": plan.fits,
        "needed": plan.needed,
        "limit": planner.machine.memory,
        "memory": None if memory is None else {**memory._asdict(), "extras": plan.extras},
        "flops": compiled.products if costs is None else costs.flops,
        "memory_traffic": None if costs is None else costs.memory,
        "collectives": None
        if costs is None
        else {kind: {"calls": costs.calls[kind], "bytes": costs.bytes[kind]} for kind in sorted(costs.bytes)},
        "received": None if costs is None else costs.received,
        "times": plan.times,
        "bound": plan.bound,
        "replication": compiled.replication,
        "replicated": (compiled.replication or 0) > REPLICATED,
        "compile_seconds": round(compiled.seconds, 1),
    }


def record_of(plans: Sequence[StagePlan], planner: Planner, report: Callable[[str], None]) -> dict[str, Json]:
    """Convert the plan of the run: the smallest mesh, the least time, and the versions that it was made with."""
    smallest = planner.smallest(plans, report)
    seconds = sum(plan.seconds or 0 for plan in plans)
    return {
        "topology": planner.machine.topology,
        "devices": planner.mesh.devices,
        "seconds": seconds,
        "device_hours": seconds * planner.mesh.devices / 3600,
        "unknown": [plan.name for plan in plans if plan.seconds is None],
        "smallest": None
        if smallest is None
        else {
            "mesh": None if smallest.mesh is None else smallest.mesh._asdict(),
            "stage": None if smallest.need is None else smallest.need.stage,
            "bytes": None if smallest.need is None else smallest.need.bytes,
            "fits": smallest.fits,
        },
        **made_with(),
    }


def made_with() -> dict[str, Json]:
    """Commit, versions and date of a plan."""
    source = provenance.source()
    return {
        "commit": source["commit"],
        "clean": source["clean"],
        "packages": provenance.packages(),
        "date": time.strftime("%Y-%m-%d"),
    }
