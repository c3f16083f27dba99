"""Two runs in one work directory: the second refuses, and reading commands still work."""

import errno
import fcntl
import multiprocessing
import os
import socket

import filelock
import pytest

from rlhf_jax.runtime.workdir_lock import LOCK, locked
from rlhf_jax.types import RlhfError
from tests.support import workdirs
from tests.support.commands import fails, succeeds
from tests.support.own_data import PREFERENCES, files

FORK = multiprocessing.get_context("forkserver")


def hold(root, taken):
    with locked(root):
        taken.set()
        FORK.Event().wait()


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of `run`."""
    taken = FORK.Event()
    process = FORK.Process(target=hold, args=(tmp_path / "run", taken), daemon=True)
    process.start()
    assert taken.wait(60)
    yield process
    process.kill()
    process.join()


def test_a_second_run_refuses_and_reading_commands_work(holder, tmp_path, capsys):
    message = fails(capsys, PREFERENCES, f"--workdir={tmp_path / 'run'}", *files(tmp_path))
    assert f"process {holder.pid} on {socket.gethostname()} runs an experiment in {tmp_path / 'run'}" in message
    assert not (tmp_path / "run" / "sft").exists(), "nothing is written into another's run"
    workdirs.write_stage(tmp_path / "run", "sft", {"kind": "sft"}, summary={"steps": 1})
    assert "complete" in succeeds(capsys, "status", str(tmp_path / "run"))
    assert "sft" in succeeds(capsys, "show", str(tmp_path / "run" / "sft"))


def test_the_lock_of_a_killed_process_is_free(holder, tmp_path):
    with pytest.raises(RlhfError, match=f"process {holder.pid}"), locked(tmp_path / "run"):
        pass
    holder.kill()
    holder.join()
    with locked(tmp_path / "run"):
        pass
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK], "nothing is left but the empty file"


def test_a_process_that_opened_the_file_before_the_release_excludes_others_too(tmp_path):
    with locked(tmp_path / "run"):
        early = os.open(tmp_path / "run" / LOCK, os.O_RDWR)
    try:
        fcntl.flock(early, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(RlhfError, match="another process"), locked(tmp_path / "run"):
            pass
    finally:
        os.close(early)
    with locked(tmp_path / "run"):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_with_the_process_stands_for_the_lock_where_there_is_none(number, tmp_path, monkeypatch):
    def acquire(lock, timeout=None):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with locked(tmp_path / "run"), pytest.raises(RlhfError, match=f"process {os.getpid()}"), locked(tmp_path / "run"):
        pass
    with locked(tmp_path / "run"):
        pass
    assert list((tmp_path / "run").iterdir()) == []
