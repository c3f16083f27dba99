"""What a person watches while an experiment runs: a bar a stage with its key figures and the time left."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as TimeRemaining


class Bar:
    """One stage's bar. Off a terminal, one line when the stage ends."""

    def __init__(self, progress: Progress, task: TaskID, name: str) -> None:
        """Wraps a task of the progress display."""
        self._progress, self._task, self._name = progress, task, name
        self._figures = ""

    def update(self, done: int, total: int, figures: Mapping[str, float]) -> None:
        """Shows how far the stage is, and its key figures."""
        self._figures = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self._progress.update(self._task, completed=done, total=total, figures=self._figures)

    def finish(self) -> None:
        """Leaves the bar full."""
        total = self._progress.tasks[self._task].total or 1
        self._progress.update(self._task, completed=total, total=total)
        if not self._progress.console.is_terminal:
            elapsed = self._progress.tasks[self._task].elapsed or 0.0
            self._progress.console.print(f"{self._name}: {elapsed:.1f} s  {self._figures}", highlight=False)


class Display:
    """The console of an experiment, and a bar for each of its stages."""

    def __init__(self, console: Console) -> None:
        """Draws on a console."""
        self.console = console
        self._progress = Progress(
            TextColumn("{task.description:<14}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemaining(),
            TextColumn("{task.fields[figures]}"),
            console=console,
        )

    @contextmanager
    def running(self) -> Iterator[None]:
        """Shows the bars for as long as the context lasts; off a terminal there is nothing to redraw."""
        if self.console.is_terminal:
            with self._progress:
                yield
        else:
            yield

    @contextmanager
    def bar(self, name: str) -> Iterator[Bar]:
        """A bar for a stage, full when the context ends well."""
        task = self._progress.add_task(name, total=None, figures="")
        bar = Bar(self._progress, task, name)
        yield bar
        bar.finish()
