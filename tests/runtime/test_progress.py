"""Progress of a stage on the terminal, complete at every width."""

import io
import re

import pytest
from rich.console import Console

from rlhf_jax.runtime import progress
from rlhf_jax.runtime.progress import Display

FIGURES = {"objective/scores": 2.3281, "objective/kl": 7.128, "val/num_eos_tokens": 93.0}


def on_terminal(width: int) -> tuple[Display, io.StringIO]:
    file = io.StringIO()
    return Display(Console(width=width, height=24, file=file, force_terminal=True, legacy_windows=False)), file


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


@pytest.mark.parametrize("width", [120, 80, 60])
@pytest.mark.parametrize("name", ["ppo", "reinforce_plus_plus_04"])
def test_counter_times_and_figures_are_whole(width, name):
    display, file = on_terminal(width)
    with display.running(), display.bar(name) as bar:
        bar.update(131, 4000, FIGURES)
        file.seek(file.truncate(0))
        display.progress.refresh()
        shown = plain(file.getvalue())
        text = " ".join(shown.split())
        assert all(len(line) <= width for line in shown.replace("\r", "\n").splitlines())
        assert re.search(rf"{name} \S+ 131/4000 0:00:\d\d (-:--:--|\d+:\d\d:\d\d)", text), text
        assert "objective/scores 2.328 objective/kl 7.128 val/num_eos_tokens 93" in text
        assert "…" not in text


def test_many_stages_leave_a_line_each_and_one_bar():
    display, file = on_terminal(80)
    with display.running():
        for number in range(40):  # more than a terminal has lines
            with display.bar(f"stage_{number}") as bar:
                bar.update(1, 1, {"loss": number})
        with display.bar("last") as bar:
            bar.update(3, 7, {})
            file.seek(file.truncate(0))
            display.progress.refresh()
            shown = plain(file.getvalue())
            assert "3/7" in shown and "stage_" not in shown


def test_off_a_terminal_there_is_a_line_a_stage():
    file = io.StringIO()
    display = Display(Console(width=120, file=file))
    with display.running(), display.bar("sft") as bar:
        bar.update(1, 2, {"loss": 1.5})
    assert re.fullmatch(r"sft: \d+\.\d s  loss 1\.5\n", file.getvalue())


def test_off_a_terminal_progress_is_a_line_now_and_then(monkeypatch):
    file = io.StringIO()
    display, clock = Display(Console(width=80, file=file)), iter([0.0, 29.0, 30.0, 30.0, 31.0, 90.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with display.running(), display.bar("ppo") as bar:
        for done in (1, 2, 3):
            bar.update(done, 4, {"loss": done / 2})
    first, last = file.getvalue().splitlines()
    assert first == "ppo: 2/4  loss 1"
    assert last.startswith("ppo: ") and last.endswith(" s  loss 1.5")
