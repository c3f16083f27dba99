"""Progress of an experiment: a bar for the running stage (lines without a terminal), a line per finished stage."""

import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from rlhf_jax.runtime.stage_state import StageState
from rlhf_jax.runtime.timings import Timing

INTERVAL = 30.0
"""Seconds between lines of progress where there is no bar: in notebooks and log files."""

SLOW = 60.0
"""Seconds of a first call after which the advice about slow compilation is printed."""

MOST_BAR = 24
"""Maximum width of a bar in columns; narrow terminals shrink it."""


class Bar:
    """Progress of a stage: a bar, replaced by a line when the stage ends.

    Below the bar are, as far as they are known, the size of the model and of a batch, the rate and the time left, and
    the current activity or the newest metrics.

    Attributes:
        first_call: seconds that the first call of the stage's program took, which compiles it; None before it ended.
    """

    def __init__(
        self,
        progress: Progress,
        task: TaskID,
        name: str,
        *,
        before: Timing | None = None,
        later: Sequence[Timing | None] = (),
        state: StageState | None = None,
    ) -> None:
        """Wrap a task of the progress display.

        Args: before is the timing of an earlier run of this stage, and later are those of the stages that follow (None:
        not known); state is a file that other processes read.
        """
        self._progress, self._task, self._name, self._state = progress, task, name, state
        self._before, self._later = before, later
        self._facts: list[str] = []
        self._figures, self._doing = "", ""
        self._advice: str | None = None
        self._done, self._total = 0, 0
        self._begun, self._first, self._seconds_per_step = time.monotonic(), (0.0, 0), 0.0
        self.first_call: float | None = None

    def now(self, doing: str) -> None:
        """Show the current activity, such as "loading", until the next call or the next step."""
        self._doing = doing
        self._refresh()

    def describe(self, *facts: str) -> None:
        """Add sizes of the stage, such as the number of parameters, which are shown until it ends."""
        self._facts += facts
        self._refresh()

    def advise(self, advice: str | None) -> None:
        """Keep a sentence that is printed if the program's first call takes more than `SLOW` seconds."""
        self._advice = advice

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Show that a program is compiled, with the seconds that it took the last time, and measure them."""
        earlier = self._before.first_call if self._before else None
        self.now("compiling" if earlier is None else f"compiling ({duration(earlier)} the last time)")
        start = time.monotonic()
        slow = threading.Timer(SLOW, self._say_advice)
        slow.daemon = True
        slow.start()
        try:
            yield
        finally:
            slow.cancel()
        self.first_call = time.monotonic() - start

    def update(self, done: int, total: int, figures: Mapping[str, float]) -> None:
        """Show the progress of the stage and its key metrics."""
        now = time.monotonic()
        if not self._done:
            self._first = (now, done)
        elif done > self._first[1]:
            self._seconds_per_step = (now - self._first[0]) / (done - self._first[1])
        self._done, self._total, self._doing = done, total, ""
        self._figures = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self._refresh()

    def warn(self, message: str) -> None:
        """Print a warning above the bar."""
        self._progress.console.print(
            f"Warning: {self._name}: {message}", style="yellow", highlight=False, soft_wrap=True
        )

    def say(self, *lines: RenderableType) -> None:
        """Print permanent lines above the bar."""
        for line in lines:
            self._progress.console.print(line, highlight=False)

    def say_progress(self) -> None:
        """Print the progress as a line, for consoles that are no terminals."""
        counter = [f"{self._done}/{self._total}"] if self._total else []
        parts = ", ".join([*counter, *self._sizes(), *([self._doing] if self._doing else [])])
        self.say(Text(f"{self._name}: {parts}  {'' if self._doing else self._figures}".rstrip()))

    def finish(self) -> None:
        """Replace the bar by a line with the stage's time and key metrics."""
        elapsed = self._progress.tasks[self._progress.task_ids.index(self._task)].elapsed or 0.0
        self._progress.remove_task(self._task)
        self._progress.console.print(f"{self._name}: {elapsed:.1f} s  {self._figures}".rstrip(), highlight=False)

    def _say_advice(self) -> None:
        if self._advice:
            self.say(Text(f"{self._name}: {self._advice}"))

    def _sizes(self) -> list[str]:
        """List facts, rate and time left."""
        rate = [f"{1 / self._seconds_per_step:.3g} steps/s"] if self._seconds_per_step and self._facts else []
        left = self._left()
        if left is None:
            return [*self._facts, *rate]
        times = [f"{duration(left)} left"]
        known = [timing.seconds for timing in self._later if timing]
        if known:
            bound = "at least " if None in self._later else ""
            times.append(f"{bound}{duration(left + sum(known))} for all stages")
        return [*self._facts, *rate, *times]

    def _left(self) -> float | None:
        """Seconds left of the stage, by its rate or by an earlier run; None if neither is known."""
        if self._seconds_per_step:
            return (self._total - self._done) * self._seconds_per_step
        return None if self._before is None else max(0.0, self._before.seconds - (time.monotonic() - self._begun))

    def _refresh(self) -> None:
        if self._task not in self._progress.task_ids:  # the stage is complete, and somebody reads its context
            return
        details = [", ".join(self._sizes()), self._doing or self._figures]
        self._progress.update(
            self._task, completed=self._done, total=self._total or None, details=[text for text in details if text]
        )
        if self._state:
            self._state.update(
                doing=self._doing,
                done=self._done,
                total=self._total,
                seconds_per_step=self._seconds_per_step,
                figures=self._figures,
            )


class Display:
    """Console of an experiment, with a bar for each stage."""

    def __init__(self, console: Console) -> None:
        """Create a display on a console."""
        self.console = console
        self.progress = _Progress(console)
        self._started = False

    def start(self, line: str) -> None:
        """Print a line before the first stage."""
        if not self._started:
            self.console.print(line, highlight=False)
        self._started = True

    @contextmanager
    def running(self) -> Iterator[None]:
        """Show the bars within the context, if the console is a terminal."""
        if self.console.is_terminal:
            with self.progress:
                yield
        else:
            yield

    @contextmanager
    def bar(
        self,
        name: str,
        *,
        before: Timing | None = None,
        later: Sequence[Timing | None] = (),
        state: StageState | None = None,
    ) -> Iterator[Bar]:
        """Yield a bar for a stage; it is replaced by a line if the context ends without an error."""
        task = self.progress.add_task(name, total=None, details=[])
        bar = Bar(self.progress, task, name, before=before, later=later, state=state)
        if self.console.is_terminal:
            yield bar
        else:
            with _every_interval(bar):
                yield bar
        bar.finish()


@contextmanager
def _every_interval(bar: Bar) -> Iterator[None]:
    """Print the progress every `INTERVAL` seconds from a thread, also while the main thread waits for a compiler."""
    ended = threading.Event()

    def speak() -> None:
        while not ended.wait(INTERVAL):
            bar.say_progress()

    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class _Progress(Progress):
    """Bars with their details below them, so that neither is cut off on a narrow terminal."""

    def __init__(self, console: Console) -> None:
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None, table_column=Column(max_width=MOST_BAR, min_width=4)),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            console=console,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield the bar of each stage and below it the details, wrapped if necessary."""
        for task in self.tasks:
            yield self.make_tasks_table([task])
            yield from (Text(f"  {line}", style="dim") for line in task.fields["details"])


def duration(seconds: float) -> str:
    """Write a time in the unit that fits: seconds, minutes, hours or days."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.{0 if unit == 'min' else 1}f} {unit}"
    return f"{seconds:.0f} s"


def rounded(count: float) -> str:
    """Write a count with three significant digits, in thousands (k), millions (M) or billions (B)."""
    for unit_size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if count >= unit_size:
            return f"{count / unit_size:.3g}{unit}"
    return f"{count:.0f}"


def size(count: float) -> str:
    """Write a number of bytes in the unit that fits."""
    for bytes_each, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= bytes_each:
            return f"{count / bytes_each:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def printable(text: str) -> str:
    """Replace newlines by ↵ and other unprintable characters by dots, so that a text cannot control the terminal."""
    return "".join(char if char.isprintable() else "·" for char in text.replace("\n", "↵"))
