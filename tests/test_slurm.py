"""Launchers as jobs of SLURM and on the hosts of a hostfile, with stand-ins for srun, scontrol and ssh."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import ROOT, environment, free_port
from stopping import KD, finished, outcome
from todi.errors import InputError
from todi.runtime.sole_process import check_sole_process

# Starts the tasks of a step here, hands signals on to them, and ends with the highest exit code, as srun does. A task
# may say something before this process knows that it runs: so a signal is handed on when all of them are known to run.
SRUN = f"""#!{sys.executable}
import itertools, os, signal, subprocess, sys, time
options = list(itertools.takewhile(lambda word: word.startswith("--"), sys.argv[1:]))
count, = (word.partition("=")[2] for word in options if word.startswith("--ntasks="))
received = []
for name in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(name, lambda number, frame: received.append(number))
tasks = [subprocess.Popen(sys.argv[len(options) + 1:], start_new_session=True, env=os.environ | {{
    "SLURM_PROCID": str(number), "SLURM_STEP_NUM_TASKS": count}}) for number in range(int(count))]
while running := [task for task in tasks if task.poll() is None]:
    while received:
        number = received.pop()
        for task in running:
            os.killpg(task.pid, number)
    time.sleep(0.02)
sys.exit(max(task.returncode for task in tasks))
"""
SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
  "show hostnames") printf '127.0.0.1\\n127.0.0.1\\n' ;;
  requeue*) echo "$2" >>"$REQUEUED" ;;
esac
"""
# Knows nothing of the variables here, as another host does not.
SSH = """#!/usr/bin/env bash
exec env -i PATH="$PATH" HOME="$HOME" MARK="$MARK" bash -c "$2"
"""
# Two of its variables have names that hostfile.sh takes for a library's, and hands on.
LAUNCHER = """#!/usr/bin/env bash
trap 'echo "asked to stop"; exit 138' USR1
trap 'echo "ended"; exit 143' TERM
echo "node $NODE_RANK of $NNODES at $MASTER_ADDR:$MASTER_PORT, job $RENDEZVOUS_ID, LR=$LR, NPROC=${NPROC:-}, words $*"
if [[ ${TORCH_FAILS:-} == "$NODE_RANK" ]]; then exit 3; fi
for ((i = 0; i < ${TORCH_SECONDS:-0} * 10; i++)); do sleep 0.1; done
"""


@pytest.fixture
def fakes(tmp_path) -> Path:
    """A folder for PATH, with a launcher beside the commands."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("fake_ssh", SSH), ("launcher.sh", LAUNCHER)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def start(fakes: Path, script: str, *words: object, **settings: object) -> subprocess.Popen:
    variables = environment(settings | {"PATH": f"{fakes}:{os.environ['PATH']}", "REQUEUED": fakes / "requeued"})
    return subprocess.Popen(["bash", script, *map(str, words)], cwd=ROOT, env=variables, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


def job(fakes: Path, *words: object, nodes: int = 2, restarts: int = 0, **settings: object) -> subprocess.Popen:
    of_slurm = {"SLURM_JOB_ID": 41234, "SLURM_JOB_NUM_NODES": nodes, "SLURM_JOB_NODELIST": "n[1-2]",
                "SLURM_SUBMIT_DIR": ROOT, "SLURM_RESTART_COUNT": restarts, "SLURM_PROCID": 0, "SLURM_NTASKS": nodes}
    return start(fakes, "scripts/slurm/train.sbatch", *words, **of_slurm | settings)


def read_until(process: subprocess.Popen, text: str, times: int = 1) -> str:
    output = ""
    while output.count(text) < times:
        line = process.stdout.readline()
        assert line, output
        output += line
    return output


class TestSlurm:
    def test_each_node_knows_its_place(self, fakes):
        output, _ = job(fakes, fakes / "launcher.sh", "--lr", "a b", LR=1).communicate(timeout=60)
        for rank in range(2):
            assert f"node {rank} of 2 at 127.0.0.1:11234, job slurm-41234.0, LR=1, NPROC=, words --lr a b" in output
        assert not (fakes / "requeued").exists()

    def test_preempted_it_is_queued_again(self, fakes):
        process = job(fakes, fakes / "launcher.sh", TORCH_SECONDS=60)
        read_until(process, " of 2 at ", times=2)
        process.send_signal(signal.SIGUSR1)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 138
        assert output.count("asked to stop") == 2 and "its state is written; job 41234 is queued again" in output
        assert (fakes / "requeued").read_text() == "41234\n"

    def test_one_that_fails_or_is_cancelled_is_not(self, fakes):
        failing = job(fakes, fakes / "launcher.sh", TORCH_FAILS=1)
        cancelled = job(fakes, fakes / "launcher.sh", TORCH_SECONDS=60)
        read_until(cancelled, " of 2 at ", times=2)
        cancelled.send_signal(signal.SIGTERM)
        for process in (failing, cancelled):
            process.communicate(timeout=60)
        assert (failing.returncode, cancelled.returncode) == (3, 143)
        assert not (fakes / "requeued").exists()

    @pytest.mark.parametrize(("changed", "words", "said"), [
        ({"SLURM_JOB_ID": ""}, ["x"], "this is for SLURM"),
        ({}, ["no/launcher.sh"], f"no launcher at {ROOT}/no/launcher.sh"),
        ({"SLURM_SUBMIT_DIR": "/"}, ["x"], "submit it in the root of the repository, got /")])
    def test_what_cannot_be(self, fakes, changed, words, said):
        process = job(fakes, *words, **changed)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 2 and said in output and output.count("\n") == 1

    @pytest.mark.slow
    def test_a_training_is_preempted_and_ends_equal(self, fakes, settings, tmp_path):
        """Two nodes with a process each, as one node with two."""
        of_ranks = settings | {"GRAD_ACC": 1, "EPOCH": 3}
        common = of_ranks | {"NPROC": 1, "MASTER_PORT": free_port(), "SAVE_DIR": tmp_path / "run"}
        first = job(fakes, f"scripts/{KD}.sh", **common)
        output = read_until(first, "step 4/9")
        first.send_signal(signal.SIGUSR1)
        output += first.communicate(timeout=240)[0]
        assert first.returncode == 138 and (fakes / "requeued").exists(), output
        again = job(fakes, f"scripts/{KD}.sh", restarts=1, **common)
        output, _ = again.communicate(timeout=240)
        assert again.returncode == 0 and "going on from" in output, output
        assert outcome(tmp_path / "run") == finished(tmp_path / "whole", **of_ranks, NPROC=2)


class TestHostfile:
    @pytest.fixture
    def hosts(self, tmp_path) -> Path:
        (tmp_path / "hosts").write_text("# two of them\nuser@a slots=2  # the first\n\nb slots=2 max_slots=4\n")
        return tmp_path / "hosts"

    def start(self, fakes: Path, *words: object, **settings: object) -> subprocess.Popen:
        return start(fakes, "scripts/hostfile.sh", *words, SSH="fake_ssh", MARK=fakes, **settings)

    def test_each_host_knows_its_place_and_the_settings(self, fakes, hosts):
        process = self.start(fakes, hosts, fakes / "launcher.sh", "--lr", "a b", LR="1'\n2")
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        for rank, host in enumerate(("user@a", "b")):
            assert re.search(rf"^\[{host}\] node {rank} of 2 at a:29500, job \S+, LR=1'$", output, re.MULTILINE)
            assert re.search(rf"^\[{host}\] 2, NPROC=2, words --lr a b$", output, re.MULTILINE)
            assert f"[{host}] ended with exit code 0" in output
        assert len(set(re.findall(r"job (\S+),", output))) == 1

    def test_one_that_fails_ends_the_others(self, fakes, hosts):
        process = self.start(fakes, hosts, fakes / "launcher.sh", TORCH_SECONDS=100, TORCH_FAILS=1)
        started = time.monotonic()
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 3 and "[user@a] ended" in output
        assert time.monotonic() - started < 60

    def test_a_signal_is_handed_on(self, fakes, hosts):
        process = self.start(fakes, hosts, fakes / "launcher.sh", TORCH_SECONDS=100)
        read_until(process, " of 2 at ", times=2)
        process.send_signal(signal.SIGUSR1)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 138 and output.count("asked to stop") == 2

    def test_killed_it_leaves_nobody(self, fakes, hosts):
        process = self.start(fakes, hosts, fakes / "launcher.sh", TORCH_SECONDS=100)
        read_until(process, " of 2 at ", times=2)
        process.kill()
        output, _ = process.communicate(timeout=60)  # at its end nobody has the pipe open any more
        assert output.count("] ended") == 2

    @pytest.mark.parametrize(("text", "said"), [
        ("a slots=x", "must be HOST or HOST slots=N, got a slots=x"), ("# none", "names no host"),
        ("a slots=2\nb slots=3", "all hosts must have as many slots")])
    def test_what_cannot_be(self, fakes, tmp_path, text, said):
        (tmp_path / "hosts").write_text(text)
        process = self.start(fakes, tmp_path / "hosts", fakes / "launcher.sh")
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 2 and said in output and output.count("\n") == 1


@pytest.mark.parametrize(("variables", "said"), [
    ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, "this is process 1 of 2 that srun started (SLURM_PROCID)"),
    ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, "process 0 of 2 that srun"),
    ({"SLURM_PROCID": "3"}, "process 3 of 4 that srun"),
    ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, "process 0 of 2 that mpirun"),
    ({"PMI_RANK": "1"}, "process 1 of 2 that mpirun"),
    ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "NNODES": "2"}, "process 1 of 4 that srun"),
    ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "NNODES": "2"}, None),
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, None),  # the shell of a job, which is no step
    ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, None),
    ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "RANK": "1", "WORLD_SIZE": "2"}, None),
    ({"SLURM_PROCID": "x", "PMI_RANK": ""}, None), ({}, None)])
def test_processes_that_know_nothing_of_each_other(variables, said):
    if said is None:
        check_sole_process(variables)
        return
    with pytest.raises(InputError, match=re.escape(said)):
        check_sole_process(variables)


def test_a_launcher_that_srun_starts_several_times():
    done = subprocess.run(["bash", f"scripts/{KD}.sh"], cwd=ROOT, text=True, capture_output=True, env=environment(
        {"SLURM_PROCID": 1, "SLURM_STEP_NUM_TASKS": 2}))
    assert done.returncode == 2
    assert done.stderr.startswith("error: this is process 1 of 2 that srun started") and done.stderr.count("\n") == 1


def test_scripts_are_quoted():
    """A path with a space is handed on as one word by follow.sh."""
    command = shlex.join(["bash", "scripts/lib/follow.sh", "printf", "%s|", "a b", "c"])
    with subprocess.Popen(["bash", "-c", command], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as process:
        process.stdin.write("A=1\n")
        process.stdin.flush()  # and stays open: its end would end the command
        assert process.stdout.read() == "a b|c|"
