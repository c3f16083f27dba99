"""`rlhf-jax reproduce`: run a paper's experiment over seeds, and list or recompute verdicts."""

import json
import sys
from pathlib import Path

from rich.console import Console

from rlhf_jax.cli.parser import Parser
from rlhf_jax.papers.listing import listing
from rlhf_jax.papers.side_by_side import run_papers
from rlhf_jax.types import Json, RlhfError

DESCRIPTION = """\
Reproduce a paper: measure every seed that has no results yet, draw the paper's
figure beside its own numbers, and give a verdict on every claim: reproduced,
contradicted, inconclusive, or not run.

  rlhf-jax reproduce NAME ...          run, or continue, in runs/papers/NAME
  rlhf-jax reproduce --all             run, or continue, the whole suite
  ... --processes=2                    two papers at a time, one thread each
  rlhf-jax reproduce --list [NAME ...] every claim with its verdict, and the
                                       cost of every run; --json: as JSON
  rlhf-jax reproduce --check [NAME]    recompute verdicts and figures, without
                                       training, from the results of the package"""


def reproduce_verb(arguments: list[str]) -> None:
    """Run, list or check papers."""
    parser = Parser("rlhf-jax reproduce", DESCRIPTION)
    parser.add_argument("names", nargs="*", metavar="NAME", help="folders of papers in experiments/papers")
    parser.add_argument(
        "--scale", default="cpu", help="cpu; smoke, a test; or gpu, a paper's own setting, and gpu:smoke, its test"
    )
    parser.add_argument("--seeds", type=int, metavar="N", help="number of seeds (default: the scale's own)")
    parser.add_argument("--workdir", type=Path, metavar="DIR", help="default: runs/papers/NAME/SCALE")
    parser.add_argument("--all", action="store_true", help="run every paper that has the scale")
    parser.add_argument("--processes", type=int, metavar="N", help="run N papers at a time, in processes of one thread")
    parser.add_argument("--list", action="store_true", help="list claims, verdicts and costs, of all papers or of some")
    parser.add_argument("--json", action="store_true", help="with --list: as JSON")
    parser.add_argument("--check", action="store_true", help="recompute verdicts and figures from the results")
    options = parser.parse_args(arguments)
    from rlhf_jax.papers import reproduce, suite  # scipy.stats, pandas and matplotlib take two seconds

    console = Console(width=None if sys.stdout.isatty() else 120)
    if options.list:
        for name in options.names:
            suite.load_paper(name)
        rows = [row for row in reproduce.overview() if row["paper"] in (options.names or suite.names())]
        _list(rows, console, as_json=options.json)
    elif options.check:
        for name in options.names or suite.names():
            reproduce.check(name, console)
    elif bool(options.names) == options.all:
        raise RlhfError(f"name papers, or give --all, --list or --check; the papers are {', '.join(suite.names())}")
    elif options.seeds is not None and options.seeds < 1:
        raise RlhfError(f"--seeds = {options.seeds} should be at least 1")
    elif options.processes is not None and options.processes < 1:
        raise RlhfError(f"--processes = {options.processes} should be at least 1")
    elif options.workdir is not None and len(options.names) != 1:
        raise RlhfError(f"--workdir={options.workdir} is for one paper: leave it out, or name one")
    else:
        names = options.names or [name for name in suite.names() if options.scale in suite.load_paper(name).scales]
        workdirs = {name: options.workdir or Path("runs") / "papers" / name / options.scale for name in names}
        if options.processes is not None:
            further = [f"--scale={options.scale}"] + [f"--seeds={options.seeds}"] * (options.seeds is not None)
            run_papers(workdirs, further, options.processes, console)
            return
        for name, workdir in workdirs.items():
            reproduce.reproduce(name, options.scale, options.seeds, workdir, console)


def _list(rows: list[dict[str, Json]], console: Console, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    for line in listing(rows, console.width):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
