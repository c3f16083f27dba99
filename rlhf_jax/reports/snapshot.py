"""A run whose files are read once, for reports, which read the same files many times."""

import functools

from rlhf_jax.reports.run import Run

READ = (
    "directory",
    "is_complete",
    "config",
    "summary",
    "metrics",
    "samples",
    "results",
    "win_rates",
    "selected",
    "evaluation",
    "best_of_n_curve",
)
"""Methods of a run whose results are kept."""


class Snapshot(Run):
    """A run as it is when its files are first read. Its tables are shared, and must not be changed."""

    def __init__(self, run: Run) -> None:
        """Copy the directories of a run."""
        super().__init__(run.workdir, run.inputs)
        for name in READ:
            setattr(self, name, functools.cache(getattr(self, name)))

    @functools.cached_property
    def stages(self) -> list[str]:  # type: ignore[override]
        """Names of started and complete stages, in the order of `Run.stages`."""
        return super().stages
