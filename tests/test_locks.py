"""The lock of a folder: who is refused, whose lock is taken over and when, and that it is given back."""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from todi.errors import InputError, StorageError
from todi.runtime import locks
from todi.runtime.holders import BEAT, writer_of
from todi.runtime.locks import STALE, Holder, Lock, check_unclaimed, claimed


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def gone() -> Holder:
    """A process of this machine that is no more."""
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    return changed(Holder.this_process(), pid=int(done.stdout), started="1")


def changed(holder: Holder, **fields: object) -> Holder:
    return Holder(**vars(holder) | {"token": "another"} | fields)


def left_by(holder: Holder, folder: Path, age: float = 0) -> Path:
    """The lock of a holder whose heart last beat so many seconds ago."""
    file = folder / ".lock"
    file.write_text(json.dumps(vars(holder)))
    os.utime(file, (time.time() - age,) * 2)
    return file


def comes(condition: Callable[[], bool]) -> bool:
    """Whether it does within ten seconds."""
    started = time.monotonic()
    while not condition() and time.monotonic() - started < 10:
        time.sleep(0.01)
    return condition()


def test_a_second_run_is_refused_and_told_by_whom(folder):
    with claimed(folder):
        for refused in (lambda: check_unclaimed(folder), lambda: claimed(folder).__enter__()):
            with pytest.raises(InputError, match=rf"another run is writing to {folder}: process {os.getpid()} on "):
                refused()
    check_unclaimed(folder)
    assert not list(folder.iterdir())


def test_one_of_many_gets_it(folder):
    left_by(changed(Holder.this_process(), host="elsewhere"), folder, age=STALE + 1)
    ready, taken = threading.Barrier(8), []

    def run() -> None:
        lock = Lock(folder / ".lock")
        ready.wait()
        if lock.take():
            taken.append(lock)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1
    taken[0].release()
    assert not list(folder.iterdir())


def test_what_a_dead_process_of_this_machine_left(folder, gone):
    left_by(gone, folder)
    check_unclaimed(folder)
    with claimed(folder):
        assert str(os.getpid()) in (folder / ".lock").read_text()


@pytest.mark.parametrize("fields", [{"started": "1"}, {"pid": 2**22 + 1}])
def test_a_number_of_a_process_that_is_another_ones_now(folder, fields):
    if not Holder.this_process().started:
        pytest.skip("this system does not tell when a process was started")
    left_by(changed(Holder.this_process(), **fields), folder)
    with claimed(folder):
        pass


@pytest.mark.parametrize("elsewhere", [{"host": "elsewhere"}, {"processes": "of another container"}])
def test_another_machine_is_given_up_only_after_a_while(folder, gone, monkeypatch, elsewhere):
    """Though a process of its number is not here."""
    left_by(changed(gone, **elsewhere), folder, age=STALE - 3)
    monkeypatch.setattr(locks, "_LOOK", 0.05)
    started = time.monotonic()
    with claimed(folder):
        assert 2 < time.monotonic() - started < 20


def test_a_heartbeat_from_another_machine_is_waited_for(folder, monkeypatch):
    file = left_by(changed(Holder.this_process(), host="elsewhere"), folder, age=60)
    monkeypatch.setattr(locks, "_LOOK", 0.05)
    threading.Timer(0.5, lambda: os.utime(file)).start()
    with pytest.raises(InputError, match=f"another run is writing to {folder}: process {os.getpid()} on elsewhere"):
        check_unclaimed(folder)


def test_a_lock_that_says_nothing(folder, monkeypatch):
    """Of an earlier version, or of a process that was killed before it wrote."""
    monkeypatch.setattr(locks, "_LOOK", 0.05)
    (folder / ".lock").touch()
    os.utime(folder / ".lock", (time.time() - STALE - 1,) * 2)
    with claimed(folder):
        pass


def test_a_look_at_who_writes_without_waiting(folder, gone, monkeypatch):
    """Of another machine's process an overdue heartbeat tells; what cannot be read tells nothing."""
    assert writer_of(folder) is None
    left_by(gone, folder)
    assert writer_of(folder) is None
    elsewhere = changed(gone, host="elsewhere")
    left_by(elsewhere, folder, age=BEAT)
    assert str(writer_of(folder)) == f"process {gone.pid} on elsewhere"
    left_by(elsewhere, folder, age=2 * BEAT + 1)
    assert writer_of(folder) is None
    left_by(Holder.this_process(), folder)
    assert writer_of(folder).holder.pid == os.getpid()

    def closed(path: Path, **_: object) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", closed)
    assert writer_of(folder) is None


def test_the_heart_beats_and_another_holder_is_seen(folder, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("todi"), "propagate", True)
    monkeypatch.setattr(locks, "BEAT", 0.05)
    with claimed(folder):
        file = folder / ".lock"
        os.utime(file, (0, 0))
        assert comes(lambda: file.stat().st_mtime > 1)
        left_by(changed(Holder.this_process(), host="elsewhere"), folder)
        assert comes(lambda: "is another process's now" in caplog.text)
    assert file.exists()  # it is not ours to remove


def test_a_folder_that_cannot_be_made():
    with pytest.raises(StorageError, match="cannot write /dev/null/run"), claimed(Path("/dev/null/run")):
        pass
