"""Progress of an experiment: a bar for the running stage (lines without a terminal), a line per finished stage."""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as TimeRemaining
from rich.table import Column
from rich.text import Text

INTERVAL = 30.0
"""Seconds between lines of progress where there is no bar: in notebooks and log files."""

MOST_BAR = 24
"""Maximum width of a bar in columns; narrow terminals shrink it."""


class Bar:
    """Progress bar of a stage, replaced by a line when the stage ends."""

    def __init__(self, progress: Progress, task: TaskID, name: str) -> None:
        """Wrap a task of the progress display."""
        self._progress, self._task, self._name = progress, task, name
        self._figures, self._printed = "", time.monotonic()

    def update(self, done: int, total: int, figures: Mapping[str, float]) -> None:
        """Show the progress of the stage and its key metrics."""
        self._figures = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self._progress.update(self._task, completed=done, total=total, figures=self._figures)
        if not self._progress.console.is_terminal and time.monotonic() - self._printed >= INTERVAL and done < total:
            self._printed = time.monotonic()
            self.say(f"{self._name}: {done}/{total}  {self._figures}".rstrip())

    def warn(self, message: str) -> None:
        """Print a warning above the bar."""
        self._progress.console.print(
            f"Warning: {self._name}: {message}", style="yellow", highlight=False, soft_wrap=True
        )

    def say(self, *lines: RenderableType) -> None:
        """Print permanent lines above the bar."""
        for line in lines:
            self._progress.console.print(line, highlight=False)

    def finish(self) -> None:
        """Replace the bar by a line with the stage's time and key metrics."""
        elapsed = self._progress.tasks[self._progress.task_ids.index(self._task)].elapsed or 0.0
        self._progress.remove_task(self._task)
        self._progress.console.print(f"{self._name}: {elapsed:.1f} s  {self._figures}".rstrip(), highlight=False)


class Display:
    """Console of an experiment, with a bar for each stage."""

    def __init__(self, console: Console) -> None:
        """Create a display on a console."""
        self.console = console
        self.progress = _Progress(console)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Show the bars within the context, if the console is a terminal."""
        if self.console.is_terminal:
            with self.progress:
                yield
        else:
            yield

    @contextmanager
    def bar(self, name: str) -> Iterator[Bar]:
        """Yield a bar for a stage; it is replaced by a line if the context ends without an error."""
        task = self.progress.add_task(name, total=None, figures="")
        bar = Bar(self.progress, task, name)
        yield bar
        bar.finish()


class _Progress(Progress):
    """Bars with their figures below them, so that neither is cut off on a narrow terminal."""

    def __init__(self, console: Console) -> None:
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None, table_column=Column(max_width=MOST_BAR, min_width=4)),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            TimeRemaining(table_column=Column(no_wrap=True)),
            console=console,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield the bar of each stage and below it the metrics, wrapped if necessary."""
        for task in self.tasks:
            yield self.make_tasks_table([task])
            if task.fields["figures"]:
                yield Text(f"  {task.fields['figures']}", style="dim")
