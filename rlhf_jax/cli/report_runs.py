"""`rlhf-jax report`: one HTML file about one or several runs."""

from pathlib import Path

from rlhf_jax.cli.parser import Parser
from rlhf_jax.reports.html import write_page
from rlhf_jax.reports.report import REPORT, write_report
from rlhf_jax.reports.run import Run

DESCRIPTION = """\
Write a report of one or several work directories: one HTML file that works
offline, with results and what not to believe, curves of every metric, an
explorer of all samples, score against KL, Best-of-N, calibration, configs and
their differences, and times. Samples that do not fit into the file are in a
script beside it, FILE.samples.js, which belongs to it.

Runs need not be finished. Runs of one config with different seeds share their
curves. For a single run without --out, the tables and figures in its directory
are written anew, too."""


def report_verb(arguments: list[str]) -> None:
    """Write the report that the arguments ask for, and print its path."""
    parser = Parser("rlhf-jax report", DESCRIPTION)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="work directory of an experiment")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=f"file to write (default: {REPORT} in the work directory of a single run, otherwise in this one)",
    )
    options = parser.parse_args(arguments)
    runs = [Run(path) for path in options.runs]
    if len(runs) == 1 and options.out is None:
        print(write_report(runs[0].workdir))
        return
    path = Path(REPORT) if options.out is None else options.out
    path.parent.mkdir(parents=True, exist_ok=True)
    write_page(runs, path)
    print(path)
