"""Progress of a stage on the terminal, complete at every width, and as lines elsewhere."""

import io
import re
import time

import pytest
from rich.console import Console

from rlhf_jax.runtime import progress
from rlhf_jax.runtime.progress import Display, duration, rounded, size
from rlhf_jax.runtime.timings import Timing

FIGURES = {"objective/scores": 2.3281, "objective/kl": 7.128, "val/num_eos_tokens": 93.0}
FACTS = ("4 seeds", "512 responses per update", "3.42 M parameters", "18,400 tokens per step")


def on_terminal(width: int) -> tuple[Display, io.StringIO]:
    file = io.StringIO()
    return Display(Console(width=width, height=24, file=file, force_terminal=True, legacy_windows=False)), file


def shown(display: Display, file: io.StringIO) -> str:
    """Redraw the display, and return what it draws."""
    file.seek(file.truncate(0))
    display.progress.refresh()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("width", [120, 80, 60])
@pytest.mark.parametrize("name", ["ppo", "reinforce_plus_plus_04"])
def test_counter_sizes_times_and_figures_are_whole(width, name, clock):
    display, file = on_terminal(width)
    with display.running(), display.bar(name, later=[Timing(3600.0, None, 1), None]) as bar:
        bar.describe(*FACTS)
        bar.update(129, 4000, FIGURES)
        clock[0] += 0.5
        bar.update(131, 4000, FIGURES)
        drawn = shown(display, file)
        text = " ".join(drawn.split())
        assert all(len(line) <= width for line in drawn.replace("\r", "\n").splitlines())
        assert re.search(rf"{name} \S+ 131/4000 0:00:\d\d", text), text
        left = "4 steps/s, 16 min left, at least 76 min for all stages"
        assert f"{', '.join(FACTS)}, {left}" in text
        assert "objective/scores 2.328 objective/kl 7.128 val/num_eos_tokens 93" in text
        assert "…" not in text


def test_the_time_left_does_not_count_the_first_call(clock):
    display, file = on_terminal(80)
    with display.running(), display.bar("dpo", before=Timing(100.0, 17.2, 1)) as bar:
        clock[0] += 10
        with bar.compiling():
            assert "90 s left" in shown(display, file), "by the earlier run"
            assert "compiling (17 s the last time)" in shown(display, file)
            clock[0] += 40
        bar.update(1, 11, {"loss": 1.0})
        assert "compiling" not in shown(display, file)
        clock[0] += 2
        bar.update(2, 11, {"loss": 1.0})
        assert "18 s left" in shown(display, file) and "for all stages" not in shown(display, file)
    assert bar.first_call == 40


def test_an_activity_is_shown_until_the_next_step():
    display, file = on_terminal(80)
    with display.running(), display.bar("sft") as bar:
        bar.update(2, 4, {"loss": 1.5})
        bar.now("evaluating")
        assert "evaluating" in shown(display, file) and "loss" not in shown(display, file)
        bar.update(3, 4, {"loss": 1.25})
        assert "evaluating" not in shown(display, file) and "loss 1.25" in shown(display, file)


def test_many_stages_leave_a_line_each_and_one_bar():
    display, file = on_terminal(80)
    with display.running():
        for number in range(40):  # more than a terminal has lines
            with display.bar(f"stage_{number}") as bar:
                bar.update(1, 1, {"loss": number})
        with display.bar("last") as bar:
            bar.update(3, 7, {})
            drawn = shown(display, file)
            assert "3/7" in drawn and "stage_" not in drawn


def test_the_line_about_the_device_comes_once():
    file = io.StringIO()
    display = Display(Console(width=80, file=file))
    for _ in range(2):
        display.start("Device: 4 × H100")
    assert file.getvalue() == "Device: 4 × H100\n"


def test_off_a_terminal_there_is_a_line_a_stage():
    file = io.StringIO()
    display = Display(Console(width=120, file=file))
    with display.running(), display.bar("sft") as bar:
        bar.update(1, 2, {"loss": 1.5})
    assert re.fullmatch(r"sft: \d+\.\d s  loss 1\.5\n", file.getvalue())


def test_off_a_terminal_progress_is_a_line_now_and_then_also_while_nothing_returns(monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL", 0.02)
    file = io.StringIO()
    display = Display(Console(width=120, file=file))
    with display.running(), display.bar("ppo") as bar:
        bar.describe("3.42 M parameters")
        bar.now("compiling")
        until(lambda: file.getvalue().count("ppo: 3.42 M parameters, compiling\n") > 1)
        bar.update(2, 4, {"loss": 1.0})
        until(lambda: "ppo: 2/4, 3.42 M parameters  loss 1\n" in file.getvalue())
    assert re.fullmatch(r"ppo: \d+\.\d s  loss 1", file.getvalue().splitlines()[-1])
    written = file.getvalue()
    time.sleep(0.1)
    assert file.getvalue() == written, "no line after the end of the stage"


def test_advice_about_compilation_is_printed_only_if_it_takes_long(monkeypatch):
    file = io.StringIO()
    display = Display(Console(width=120, file=file))
    with display.running(), display.bar("ppo") as bar:
        bar.advise("30 layers are compiled one by one.")
        with bar.compiling():
            pass
        assert file.getvalue() == ""
        monkeypatch.setattr(progress, "SLOW", 0.01)
        with bar.compiling():
            until(lambda: file.getvalue() == "ppo: 30 layers are compiled one by one.\n")
    assert file.getvalue().count("layers") == 1


def until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_times_and_sizes_are_short():
    assert [duration(s) for s in (0.4, 119, 120, 7199, 7200, 172800)] == [
        "0 s",
        "119 s",
        "2 min",
        "120 min",
        "2.0 h",
        "2.0 days",
    ]
    assert [rounded(n) for n in (12, 3_420_000, 1_234, 8.03e9)] == ["12", "3.42 M", "1.23 k", "8.03 B"]
    assert [size(n) for n in (500, 3_420_000, 8.03e9, 2e12)] == ["0.5 kB", "3.42 MB", "8.03 GB", "2 TB"]
