"""Ranks that wait for one another: for as long as it takes, with a word on who is missing, up to a limit."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from launching import ROOT, free_port
from todi.runtime.lost import LOST, PeersLost
from todi.runtime.waiting import MeetingPlace
from todi.runtime.whereabouts import RANKS_FOLDER, Whereabouts, record_path, wait_for_an_end
from torch.distributed import HashStore

# The ranks meet three times. The first one works for some seconds before each; one may stay away from the second.
WORK = """
import logging, sys, time
import torch
from todi.errors import run_main
from todi.runtime import waiting
from todi.runtime.distributed import process_group, world_from_environment

def main():
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    waiting._REPORT = 0.5
    limit, seconds, stays_away = map(float, sys.argv[1:])
    world = world_from_environment()
    with process_group(world, torch.device("cpu"), limit):
        for meeting in range(3):
            if world.is_main:
                time.sleep(seconds)
            if meeting == 1 and world.rank == stays_away:
                time.sleep(3600)
            print(meeting, world.gather(world.rank), flush=True)
            assert world.from_main({"of rank": world.rank}) == {"of rank": 0}
            world.barrier()
            print("all of them have passed", meeting, flush=True)

run_main(main)
"""


def start(*words: object, ranks: int = 2) -> list[subprocess.Popen]:
    ours = os.environ | {"PYTHONPATH": str(ROOT / "code"), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                         "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return [subprocess.Popen([sys.executable, "-c", WORK, *map(str, words)], text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, env=ours | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(ranks)]


def test_the_first_rank_works_while_the_others_wait():
    first, *others = [process.communicate(timeout=120)[0] for process in start(30, 1.5, -1, ranks=3)]
    for output in (first, *others):
        assert [line for line in output.splitlines() if line.endswith("[0, 1, 2]")] == [
            "0 [0, 1, 2]", "1 [0, 1, 2]", "2 [0, 1, 2]"], output
    assert others[0].count("rank 1 waits for rank 0, ") >= 3
    assert "waits for" not in others[1]  # one says it for all of them


@pytest.mark.slow
def test_a_rank_that_never_comes():
    started = time.monotonic()
    stuck, waiting = start(6, 0, 0)
    output, _ = waiting.communicate(timeout=120)
    stuck.kill()
    stuck.communicate()
    assert waiting.returncode == 1, output
    assert output.splitlines()[-1] == (
        "error: rank 0 did not come to where rank 1 waits within 6 s (PROCESS_GROUP_TIMEOUT)")
    assert "Traceback" not in output
    assert time.monotonic() - started < 90


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_dies(killed):
    """Without torchrun, which would end the others."""
    processes = start(4, 0, killed)
    dying, left = processes[killed], processes[1 - killed]
    while not left.stdout.readline().startswith("all of them have passed 0"):
        assert left.poll() is None
    dying.kill()
    output, _ = left.communicate(timeout=120)
    dying.communicate()
    assert left.returncode == (1 if killed else LOST)  # the first keeps the store, so that the other notices at once
    assert output.splitlines()[-1].startswith("error: rank ") and "Traceback" not in output


@pytest.fixture
def rank_1(tmp_path, monkeypatch) -> Iterator[subprocess.Popen]:
    """A rank of this node, which waits until its standard input is closed."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    said = Whereabouts()
    said.keep_in(record_path(tmp_path, 1))
    said.record.pid = process.pid
    said.tick()
    monkeypatch.setenv(RANKS_FOLDER, str(tmp_path))
    yield process
    process.communicate()


def test_one_of_this_node_that_has_ended_is_not_waited_for(rank_1):
    rank_1.communicate()
    place = MeetingPlace(HashStore(), rank=0, size=2, limit=60)
    started = time.monotonic()
    with pytest.raises(PeersLost, match="^rank 1, which rank 0 waits for, has ended$"):
        place.meet()
    assert time.monotonic() - started < 30


def test_others_are_left_time_for_their_last_words_until_one_has_ended(rank_1, monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    wait_for_an_end(5)
    assert sum(slept) == pytest.approx(5)
    slept.clear()
    monkeypatch.setattr(time, "sleep", lambda seconds: (slept.append(seconds), rank_1.communicate()))
    wait_for_an_end(5)
    assert len(slept) == 1
