"""Reports on a run: tables, figures, the HTML report, and `Run` for notebooks."""

from rlhf_jax.reports.report import draw, write_report
from rlhf_jax.reports.run import Run

__all__ = ["Run", "draw", "write_report"]
