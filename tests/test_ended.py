"""A run that is broken off ends soon, leaves no process behind, and says why in its last line."""

import json
import signal
import time

import pytest
from killing import KILLS, STOPS, killer
from launching import run
from stopping import KD, TWO_RANKS, Launched, finished, gone_on_with, outcome

SOON = 60  # seconds


def hit(settings, tmp_path, where: str, rank: int, what: str = KILLS, **more: object) -> tuple[list[str], int]:
    """A run of two ranks of which one is hit; the lines of its output, and its exit code."""
    plugin = killer(tmp_path / "killer.py", where, rank, what)
    launched = Launched(**settings | TWO_RANKS | {"PLUGINS": plugin, "SAVE_DIR": tmp_path / "run"} | more)
    code = launched.end()
    assert plugin.with_suffix(".hit").exists(), launched.output
    assert not launched.survivors()
    assert "Traceback" not in launched.output
    return launched.output.splitlines(), code


def test_a_killed_rank_is_named(settings, tmp_path):
    lines, code = hit(settings, tmp_path, "step", 1)
    assert code == 128 + signal.SIGKILL
    assert lines[-1].startswith("error: rank 1 (pid ") and "was killed by SIGKILL in step 5: by hand" in lines[-1]
    assert len([line for line in lines if line.startswith("error: ")]) <= 2
    assert (tmp_path / "run" / "train.log").read_text().splitlines()[-1] == lines[-1]
    left = json.loads((tmp_path / "run" / "heartbeat" / "rank1").read_text())
    assert left["rank"] == 1 and left["pid"]


@pytest.mark.parametrize(("where", "rank", "said"), [
    pytest.param("save", 0, "a save", marks=pytest.mark.exhaustive),
    pytest.param("generation", 1, "generation", marks=pytest.mark.exhaustive),
    pytest.param("cache pass", 0, "the cache pass", marks=pytest.mark.exhaustive)])
def test_where_it_was_killed(where, rank, said, settings, tmp_path):
    caching = {"TEACHER_CACHE": tmp_path / "cache"} if where == "cache pass" else {}
    lines, _ = hit(settings, tmp_path, where, rank, **caching)
    assert lines[-1].startswith(f"error: rank {rank} (pid ") and f"was killed by SIGKILL in {said}: " in lines[-1]
    assert "cannot write" not in "".join(lines)
    if where == "save":
        settings = settings | TWO_RANKS
        again = settings | {"PLUGINS": tmp_path / "killer.py"}  # it hits once
        assert gone_on_with(tmp_path / "run", again) == finished(tmp_path / "whole", **settings)


@pytest.mark.exhaustive
def test_an_error_of_one_rank(settings, tmp_path):
    plugin = killer(tmp_path / "killer.py", "step", 1, "raise ValueError('the device is on fire')")
    launched = Launched(**settings | TWO_RANKS | {"PLUGINS": plugin, "SAVE_DIR": tmp_path / "run"})
    assert launched.end() == 1
    last = launched.output.splitlines()[-1]
    assert last.startswith("error: rank 1 (pid ") and last.endswith("in step 5: ValueError: the device is on fire")
    assert not launched.survivors()


@pytest.mark.exhaustive
def test_a_killed_rank_and_its_run_goes_on_by_itself(settings, tmp_path):
    lines, code = hit(settings, tmp_path, "save", 1, MAX_RESTARTS=1)
    assert code == 0 and "going on from its last state (restart 1 of 1)" in "".join(lines)
    assert outcome(tmp_path / "run") == finished(tmp_path / "whole", **settings | TWO_RANKS)


@pytest.mark.slow
def test_a_rank_that_hangs(settings, tmp_path):
    lines, code = hit(settings, tmp_path, "step", 1, STOPS, HANG_TIMEOUT=5)
    assert code == 1 and time.time() - (tmp_path / "killer.hit").stat().st_mtime < 5 + SOON
    assert lines[-1].startswith("error: rank 1 has been in step 5 for ") and "does not answer at all" in lines[-1]
    log = (tmp_path / "run" / "train.log").read_text()
    assert "rank 0 (pid " in log and "in all_reduce" in log and "in tick_or_die" in log
    assert not [line for line in lines if " step 6/" in line]


@pytest.mark.exhaustive
def test_one_process_that_hangs(settings, tmp_path):
    plugin = killer(tmp_path / "killer.py", "step", 0, "__import__('time').sleep(600)")
    done = run(KD, **settings | {"PLUGINS": plugin, "SAVE_DIR": tmp_path / "run"}, HANG_TIMEOUT=4)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].startswith("error: rank 0 has been in step 5 for ")
    assert "in tick_or_die" in (tmp_path / "run" / "train.log").read_text()


@pytest.mark.parametrize(("number", "shape"), [
    pytest.param(signal.SIGKILL, TWO_RANKS, marks=pytest.mark.slow),
    pytest.param(signal.SIGKILL, {}, marks=pytest.mark.exhaustive),
    pytest.param(signal.SIGHUP, TWO_RANKS, marks=pytest.mark.exhaustive)])
def test_the_launcher_goes(number, shape, settings, tmp_path):
    launched = Launched(**settings | shape | {"EPOCH": 2000, "SAVE_DIR": tmp_path})
    assert launched.wait_for("step 5/"), launched.output
    launched.process.send_signal(number)
    launched.process.wait()
    assert not launched.orphans(SOON)
    assert not any(tmp_path.glob("heartbeat")) or number == signal.SIGKILL
    if number == signal.SIGHUP:
        assert launched.process.returncode == 128 + number and "stopped by SIGHUP" in launched.process.stdout.read()


@pytest.mark.exhaustive
def test_the_parent_of_the_ranks_goes(settings, tmp_path):
    launched = Launched(**settings | TWO_RANKS | {"EPOCH": 2000, "SAVE_DIR": tmp_path})
    assert launched.wait_for("step 5/"), launched.output
    parent, = [process for process in launched.survivors() if "todi.runtime.ranks" in process.cmdline()]
    parent.kill()
    assert launched.end() == 128 + signal.SIGKILL
    assert not launched.orphans(SOON)


@pytest.mark.slow
def test_an_evaluation_is_stopped(workshop, tmp_path):
    model = workshop.model("long-winded", hidden=48, layers=4)
    launched = Launched(str(model), "2", "--save-dir", str(tmp_path), launcher="eval/run_eval", NPROC=2, SETS="tiny",
                        DATA_DIR=workshop.data.parent, SEEDS=" ".join(map(str, range(1, 400))), MAX_LENGTH=64,
                        MAX_PROMPT_LENGTH=48, PRECISION="fp32")
    assert launched.wait_for("response/s"), launched.output
    assert launched.stop(signal.SIGTERM) == 128 + signal.SIGTERM
    assert not launched.survivors()
    assert "Traceback" not in launched.output
