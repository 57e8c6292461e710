"""What is made of the ends of ranks, and of ranks that do not get on: without any process."""

import logging
import os
import signal
import subprocess
import sys

import pytest
import torch.distributed as dist
from todi.errors import StorageError
from todi.runtime import heartbeat
from todi.runtime.endings import Ending, cause_of, lost_line
from todi.runtime.hangs import HangWatch
from todi.runtime.heartbeat import clear_heartbeats, heartbeat_in
from todi.runtime.logs import log_file
from todi.runtime.lost import LOST, PeersLost, peers_are_lost
from todi.runtime.parent import PARENT, parent_from_environment
from todi.runtime.signals import Interrupted, StopSignals
from todi.runtime.storage import writing
from todi.runtime.whereabouts import HERE, Record, Whereabouts, at, read_record, waiting

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:9128"


def ended(rank: int, code: int, **where: object) -> Ending:
    return Ending(rank, 100 + rank, code, Record(place="step 5", **where))


@pytest.mark.parametrize(("endings", "rank"), [
    ([ended(0, LOST), ended(1, -9)], 1),
    ([ended(0, -15), ended(1, 1, trouble="OSError: a disk")], 1),
    ([ended(0, LOST), ended(1, -15, trouble="OSError: a disk")], 1),  # it was ended before it could say so
    ([ended(2, -11), ended(0, LOST), ended(1, -9)], 2),  # the agent killed the last one
    ([ended(0, -15), ended(1, -15)], 0),
])
def test_the_cause(endings, rank):
    assert cause_of(endings).rank == rank


def test_an_ending_in_words():
    assert ended(1, -9).in_words("a").startswith("rank 1 (pid 101, host a) was killed by SIGKILL in step 5: ")
    assert ended(1, -11).in_words("a") == "rank 1 (pid 101, host a) was killed by SIGSEGV in step 5"
    assert ended(1, 1, trouble="a disk").in_words("a") == "rank 1 (pid 101, host a) ended in step 5: a disk"
    assert ended(1, 3).in_words("a").endswith("with exit code 3; what it said is above")
    assert [ended(0, code).shell_code for code in (-9, 2, 143)] == [137, 2, 143]
    assert ended(0, 128 + signal.SIGTERM).was_asked_for and not ended(0, -signal.SIGTERM).was_asked_for
    assert lost_line([ended(2, LOST), ended(3, LOST)]).startswith("error: rank 2, 3 of this node lost the others in ")


def test_lost_peers_are_told_from_other_errors():
    followed = ValueError("in the wake of it")
    followed.__context__ = RuntimeError(GLOO)
    for error in (RuntimeError(GLOO), PeersLost("a"), dist.DistNetworkError("b"), followed):
        assert peers_are_lost(error)
    others = (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), OSError(GLOO),
              ConnectionResetError("a hub"), RuntimeError("gloo/transport/tcp/x.cc:1] Timed out waiting 1ms for recv"))
    assert not any(map(peers_are_lost, others))


def test_a_lost_peer_is_no_matter_of_a_path(tmp_path):
    with pytest.raises(RuntimeError, match="closed by peer"), writing(tmp_path / "state"):
        raise RuntimeError(GLOO)
    with pytest.raises(StorageError, match="cannot write .*state: no room"), writing(tmp_path / "state"):
        raise RuntimeError("no room")
    logging.getLogger("todi").handlers = []
    with pytest.raises(RuntimeError), log_file(tmp_path / "train.log"), at("a save"):
        raise RuntimeError(GLOO)
    assert (tmp_path / "train.log").read_text() == "error: the other ranks were lost in a save\n"


def test_where_a_process_stands_is_in_a_file(tmp_path, monkeypatch):
    here = Whereabouts()
    monkeypatch.setattr("todi.runtime.whereabouts.HERE", here)
    assert read_record(tmp_path / "rank0") is None
    here.keep_in(tmp_path / "rank0")
    here.pulse(7)
    with at("a step"):
        with waiting():
            assert read_record(tmp_path / "rank0").waits
        inside = read_record(tmp_path / "rank0")
        assert (inside.place, inside.watched, inside.waits, inside.pid) == ("a step", True, False, os.getpid())
        assert inside.pulse == 7 and inside.beats == 3
    assert not read_record(tmp_path / "rank0").watched
    with pytest.raises(StorageError), at("a step"), at("a save"):
        raise StorageError("no room, twice " * 1000)
    after = read_record(tmp_path / "rank0")
    assert after.place == "a save" and after.trouble.startswith("no room, twice")
    with at("a step"):
        assert read_record(tmp_path / "rank0").trouble == ""


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def looks():
    """Looks once a second at two ranks that change from second to second; what is found then."""
    def look(watch: HangWatch, clock: Clock, seconds: int, **ranks: Record):
        for _ in range(seconds):
            clock.now += 1
            for record in ranks.values():
                record.pulse += record is not ranks.get("frozen")
            found = watch.look(dict(enumerate(ranks.values())))
            if found:
                return [(hang.rank, hang.frozen) for hang in found], clock.now
        return [], clock.now
    return look


def test_a_process_without_fellows_has_its_pulse():
    here = Whereabouts()
    here.pulse(3)
    assert here.record.pulse == 3


def test_who_hangs(looks):
    def found(**ranks):
        clock = Clock()
        return looks(HangWatch(20, clock), clock, 100, **ranks)

    def stands(**what: object) -> Record:
        return Record(place="step 5", watched=True, **what)

    assert found(a=stands(), b=stands()) == ([(0, False), (1, False)], 21)
    assert found(a=stands(), frozen=stands()) == ([(1, True)], 21)  # for the other waits for it
    assert found(a=stands(waits=True), b=stands()) == ([(1, False)], 21)
    assert found(a=Record(), b=stands(waits=True))[0] == []  # one loads a model, the other waits for it
    assert found(a=Record(), frozen=Record()) == ([(1, True)], 21)


def test_what_is_no_hang(looks):
    clock, record = Clock(), Record(watched=True)
    watch = HangWatch(20, clock)
    for _ in range(10):
        assert looks(watch, clock, 15, a=record)[0] == []
        record.beats += 1
    clock.now += 1000  # this process was stopped, and with it all others
    assert looks(watch, clock, 15, a=record)[0] == []
    assert looks(HangWatch(0, clock), clock, 100, a=record)[0] == []


def test_a_parent_that_goes(monkeypatch):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    monkeypatch.setenv(PARENT, str(child.pid))
    parent = parent_from_environment()
    assert not parent.is_direct and not parent.is_gone()
    child.communicate(b"\n")
    assert parent.is_gone()
    monkeypatch.setenv(PARENT, str(os.getppid()))
    assert parent_from_environment().is_direct and not parent_from_environment().is_gone()
    monkeypatch.delenv(PARENT)
    assert parent_from_environment() is None


@pytest.mark.parametrize(("error", "stays"), [(None, False), (Interrupted(signal.SIGTERM), False),
                                              (ValueError(), True)])
def test_the_heartbeat_of_a_run(error, stays, tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "_started", True)
    try:
        with heartbeat_in(tmp_path, 1):
            assert '"rank": 1' in (tmp_path / "heartbeat" / "rank1").read_text()
            if error:
                raise error
    except (Interrupted, ValueError):
        pass
    assert (tmp_path / "heartbeat").exists() == stays
    clear_heartbeats(tmp_path)
    assert not (tmp_path / "heartbeat").exists() and heartbeat._file is None


def test_hang_up_is_a_request_unless_it_is_ignored():
    before = signal.getsignal(signal.SIGHUP)
    try:
        for handler, received in ((signal.SIG_DFL, signal.SIGHUP), (signal.SIG_IGN, 0)):
            signal.signal(signal.SIGHUP, handler)
            with StopSignals() as signals:
                signal.raise_signal(signal.SIGHUP)
                assert signals.received == received
    finally:
        signal.signal(signal.SIGHUP, before)
        HERE.move("tests", watched=False)
