"""State of a stage, as other processes read it while it runs and after it ended."""

import multiprocessing

import pytest

from rlhf_jax.runtime import stage_state
from rlhf_jax.runtime.stage_state import LOCK, STATE, StageState, is_running, read_state

FORK = multiprocessing.get_context("forkserver")


def written(directory):
    state = read_state(directory)
    assert state is not None
    return state


def work(directory, started, end):
    state = StageState(directory)
    state.update(done=3, total=7)
    started.set()
    end.wait()
    state.complete()


def test_a_stage_runs_as_long_as_its_process_lives(tmp_path):
    assert read_state(tmp_path) is None and not is_running(tmp_path)
    started, end = FORK.Event(), FORK.Event()
    process = FORK.Process(target=work, args=(tmp_path, started, end), daemon=True)
    process.start()
    assert started.wait(60)
    assert is_running(tmp_path)
    process.kill()
    process.join()
    assert not is_running(tmp_path)
    assert written(tmp_path)["error"] is None, "a killed process leaves no error"


def test_an_error_is_kept_until_the_stage_starts_again(tmp_path):
    state = StageState(tmp_path)
    state.update(done=3, total=7)
    assert is_running(tmp_path)
    state.fail("the loss is not finite")
    assert not is_running(tmp_path)
    assert written(tmp_path)["error"] == "the loss is not finite" and written(tmp_path)["done"] == 3
    again = StageState(tmp_path)
    assert written(tmp_path)["error"] is None and "done" not in written(tmp_path)
    again.complete()
    assert list(tmp_path.iterdir()) == [], "nothing is left of a complete stage"


def test_progress_is_written_now_and_then(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(stage_state.time, "monotonic", lambda: now[0])
    state = StageState(tmp_path)
    state.update(done=1)
    assert "done" not in written(tmp_path)
    now[0] += stage_state.INTERVAL
    state.update(done=2)
    assert written(tmp_path)["done"] == 2


def test_another_activity_is_written_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(stage_state.time, "monotonic", lambda: 0.0)
    state = StageState(tmp_path)
    state.update(doing="loading sft", done=0)
    assert written(tmp_path)["doing"] == "loading sft"
    state.update(doing="loading sft", done=1)
    assert written(tmp_path)["done"] == 0
    state.update(doing="", done=2)
    assert (written(tmp_path)["doing"], written(tmp_path)["done"]) == ("", 2)


def test_a_second_process_leaves_the_lock_to_the_first(tmp_path):
    first = StageState(tmp_path)
    second = StageState(tmp_path)
    second.complete()
    assert is_running(tmp_path)
    first.complete()
    assert not (tmp_path / LOCK).exists() and not (tmp_path / STATE).exists()


@pytest.mark.parametrize("name", [STATE, LOCK])
def test_files_of_the_state_are_no_results(name, tmp_path):
    from rlhf_jax.runtime.workdir import Identity, Workdir

    place = Workdir(tmp_path)
    place.begin("sft", Identity({"kind": "sft"}, {}, {}))
    (tmp_path / "sft" / name).write_text("{}")
    assert place.status("sft", Identity({"kind": "other"}, {}, {})) == "again"
