"""Write the table of docs/explanation/scale.md from the results of `plans.py`.

python -m experiments.benchmarks.write_plans
"""

from pathlib import Path
from typing import Any

from experiments.benchmarks import tables
from rlhf_jax.runtime.files import read_rows, write_text

ROWS = Path(__file__).parent / "results" / "plans.jsonl"
PAGE = Path(__file__).parents[2] / "docs" / "explanation" / "scale.md"
MODELS = {"S": "SmolLM2-135M", "L": "Llama-3.2-1B", "8B": "Llama-3-8B", "70B": "Llama-3-70B"}
KINDS = {"dpo": "DPO", "ppo": "PPO"}
GIB = 2**30


def lines_of(row: dict[str, Any]) -> list[str]:
    """Lines of a case: one for each program, and its size before the first."""
    tokens = f"{row['rows']:,} x ({row['tokens']} + {row['tokens']})"
    case = [KINDS[row["kind"]], MODELS[row["shape"]], row["topology"], mesh_of(row["mesh"]), tokens]
    lines = []
    for program in row["programs"]:
        times = program["times"]
        cells = [
            *case,
            program["program"],
            memory_of(program),
            *(milliseconds(times.get(name)) for name in ("FLOP", "memory", "interconnect")),
            program["bound"] if program["fits"] else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
        case = [""] * len(case)
    return lines


def memory_of(program: dict[str, Any]) -> str:
    """Memory that a device needs, of what it has, in GiB."""
    needed, limit = program["needed"], program["limit"] / GIB
    if program["fits"]:
        return f"{needed / GIB:.1f} of {limit:.1f}"
    return f"**{'over ' if needed is None else f'{needed / GIB:.1f} of '}{limit:.1f}**"


def mesh_of(mesh: dict[str, int]) -> str:
    """Axes of a mesh that are longer than one."""
    return ", ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "one device"


def milliseconds(seconds: float | None) -> str:
    """Milliseconds with three digits."""
    return "" if seconds is None else f"{float(f'{1000 * seconds:.3g}'):,.10g}"


def table() -> list[str]:
    """Lines of the table, and of what belongs to it."""
    rows = read_rows(ROWS)
    lines = [
        "| stage | model | machine | mesh | rows | program | GiB of a device | FLOPs, ms | memory, ms | links, ms "
        "| bound by |",
        "|---|---|---|---|---|---|--:|--:|--:|--:|---|",
        *(line for row in rows for line in lines_of(row)),
    ]
    return [*lines, "", origin(rows)]


def origin(rows: list[dict[str, Any]]) -> str:
    """Sentence about the commits, the compilers and the dates of rows."""
    commits = ", ".join(sorted({row["run"]["commit"][:7] for row in rows}))
    versions = {f"{name} {row['run']['packages'][name]}" for row in rows for name in ("jax", "libtpu")}
    dates = sorted({row["run"]["date"] for row in rows})
    return f"Commits {commits}; {', '.join(sorted(versions))}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}."


def page(text: str) -> str:
    """Put the table into the text of the page."""
    return tables.put(text, "plans", table())


if __name__ == "__main__":
    write_text(PAGE, page(PAGE.read_text(encoding="utf-8")))
