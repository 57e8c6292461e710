"""Several nodes: that they meet, who is missing, and what they would do otherwise than one another."""

import logging
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from launching import free_port, in_tiers, run_on_nodes, start, write_data
from stopping import KD
from threads import on_ranks
from todi.errors import InputError
from todi.runtime import nodes
from todi.runtime.distributed import World
from todi.runtime.locks import claimed
from todi.runtime.nodes import Nodes, agree, check_ranks, differing, refusals_told, what_must_agree


def meet(*descriptions: dict[str, str], timeout: float = 30) -> list[str | None]:
    """What `agree` says on each of as many nodes."""
    port = free_port()

    def node(rank: int) -> str | None:
        try:
            agree(Nodes(len(descriptions), rank, "127.0.0.1", port, timeout), descriptions[rank])
        except InputError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:
        return list(pool.map(node, range(len(descriptions))))


def test_nodes_that_agree():
    assert meet({"lr": "0.1"}, {"lr": "0.1"}, {"lr": "0.1"}) == [None, None, None]


def test_every_node_hears_who_differs_in_what():
    host = socket.gethostname()
    said = (f"the nodes differ: lr is 0.1 on node 0, 0.2 on node 2 ({host}); train.jsonl is not there on node 0, abc "
            f"on node 2 ({host})")
    assert meet({"lr": "0.1"}, {"lr": "0.1"}, {"lr": "0.2", "train.jsonl": "abc"}) == [said] * 3


@pytest.mark.parametrize(("rank", "missing"), [(0, 1), (1, 0)])
def test_a_node_that_does_not_come(monkeypatch, caplog, rank, missing):
    monkeypatch.setattr(logging.getLogger("todi"), "propagate", True)
    caplog.set_level("INFO", logger="todi")
    monkeypatch.setattr(nodes, "_REPORT", 0.5)
    started, port = time.monotonic(), free_port()
    with pytest.raises(InputError, match=rf"node {missing} of 2 did not come to 127.0.0.1:{port} within 2 s "):
        agree(Nodes(2, rank, "127.0.0.1", port, timeout=2), {})
    assert time.monotonic() - started < 20
    assert f"node {rank} of 2 waits for node {missing} at 127.0.0.1:{port}" in caplog.text


def test_an_address_that_is_not_ours():
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    with taken, pytest.raises(InputError, match="node 0 cannot listen at port"):
        agree(Nodes(2, 0, "127.0.0.1", taken.getsockname()[1], timeout=2), {})


def test_descriptions():
    assert differing({"a": "1", "b": "2"}, {"a": "1", "b": "3"}, "x", "y") == ["b is 2 on x, 3 on y"]


def test_what_must_agree_has_the_code_as_well(monkeypatch):
    monkeypatch.setattr(nodes, "git_commit", lambda: "abc")
    described = what_must_agree({"lr": 0.1}, {"train.jsonl": "123"}, World(0, 2, 0, 2))
    assert {"lr": "0.1", "train.jsonl": "123", "the code's commit": "abc", "number of ranks": "2"}.items() <= (
        described.items())
    assert {"python", "torch", "deepspeed", "the code"} <= described.keys()


@pytest.mark.parametrize(("other", "said"), [
    ({"lr": "0.1"}, None),  # a rank on the node of one that has read the weights
    ({"lr": "0.1", "teacher": "abc"}, None),
    ({"lr": "0.2"}, "the ranks differ: lr is 0.1 on rank 0, 0.2 on rank 2"),
    ({"lr": "0.1", "teacher": "xyz"}, "the ranks differ: teacher is abc on rank 0, xyz on rank 2")])
def test_ranks_that_no_launcher_started(other, said):
    """Every one hears of it, whatever it is itself about to do."""
    descriptions = [{"lr": "0.1", "teacher": "abc"}, {"lr": "0.1"}, other]
    heard = on_ranks(3, lambda world: check_ranks(world, descriptions[world.rank]))
    assert [error and str(error) for error in heard] == [said] * 3


def launched(settings: dict[str, object], *changes: dict[str, object]) -> list[tuple[int, str]]:
    """Exit code and output of a launcher on each of two nodes of this machine."""
    common = settings | {"NPROC": 1, "GRAD_ACC": 1}
    return [(done.returncode, done.stdout) for done in run_on_nodes(KD, common, *changes)]


OTHERWISE = {"LR": 0.02, "KD_OBJ": "tvd", "KD_TEMP": 3, "SEED": 11, "MAX_LENGTH": 63, "GRAD_ACC": 2, "ZERO_STAGE": 2,
             "EPOCH": 2, "DATA_DIR": "{data}", "TEACHER_MODEL_PATH": "{student}"}


@pytest.mark.parametrize("name", in_tiers(OTHERWISE, always={"LR"}, slowly={
    "DATA_DIR", "ZERO_STAGE", "TEACHER_MODEL_PATH"}))
def test_what_one_node_has_otherwise_is_named_on_both(settings, tmp_path, name):
    other = write_data(tmp_path / "data", train=18, dev=4)
    value = str(OTHERWISE[name]).format(data=other, student=settings["MODEL_PATH"])
    started = time.monotonic()
    for code, output in launched(settings | {"SAVE_DIR": tmp_path / "run"}, {}, {name: value}):
        assert code == 2, output
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "the nodes differ: " in errors[0] and value in errors[0], output
    assert time.monotonic() - started < 60
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_nodes_train(settings, tmp_path):
    for code, output in launched(settings | {"SAVE_DIR": tmp_path / "run", "EPOCH": 1}, {}, {}):
        assert code == 0, output
    assert list((tmp_path / "run").glob("epoch1*"))


@pytest.mark.parametrize(("changed", "said"), [
    ({"NNODES": "1:4"}, "NNODES must be a whole number of at least 1, got '1:4'"),
    ({"NPROC": "gpu"}, "NPROC must be a whole number of at least 1, got 'gpu'"),
    ({"NPROC": 0}, "NPROC must be a whole number of at least 1, got '0'"),
    ({"NNODES": 2, "NODE_RANK": 2}, "NODE_RANK must be below NNODES=2, got 2"),
    ({"NNODES": 2}, "NODE_RANK must be a whole number of at least 0, got ''"),
    ({"NPROC": "08"}, "NPROC must be a whole number of at least 1, got '08'"),
    ({"NPROC": "٣"}, "NPROC must be a whole number of at least 1, got '٣'"),
    ({"NNODES": 2, "NODE_RANK": 0, "MASTER_PORT": 99999}, "MASTER_PORT must be at most 65535, got 99999"),
    ({"NNODES": 2, "NODE_RANK": 0, "RENDEZVOUS_TIMEOUT": "soon"}, "RENDEZVOUS_TIMEOUT must be a whole number"),
    ({"NNODES": 2, "NODE_RANK": 0}, "NNODES=2 needs MASTER_ADDR"),
    ({"NODE_RANK": 1}, "NODE_RANK must be below NNODES=1, got 1"),
    ({"NNODES": 2, "NODE_RANK": 0, "MASTER_ADDR": "node0:29500"}, "MASTER_ADDR must be a name or an address"),
    ({"DRY_RUN": 0}, "DRY_RUN must be 1, or not set, got '0'"),
    ({"GPUS": "x"}, "GPUS must be numbers or names of devices, or cpu; got x"),
    ({"GPUS": "0,x"}, "GPUS must be numbers or names of devices, or cpu; got 0,x"),
    ({"TEACHER_NAME": "x" * 300}, "TEACHER_NAME must have at most 255 bytes between slashes"),
    ({"DATA_DIR": "x" * 300}, "DATA_DIR must have at most 255 bytes between slashes")])
def test_what_cannot_be(changed, said):
    process = start(KD, **changed)
    output, _ = process.communicate()
    assert process.returncode == 2
    assert output.startswith(f"error: {said}") and output.count("\n") == 1


def test_another_job_at_the_same_place(monkeypatch, caplog):
    """Both sides say so, and the one that waits goes on waiting for its own."""
    monkeypatch.setattr(logging.getLogger("todi"), "propagate", True)
    caplog.set_level("INFO", logger="todi")
    monkeypatch.setattr(nodes, "_REPORT", 0.5)
    port, came = free_port(), []

    def node(rank: int, token: str, delay: float = 0) -> str | None:
        time.sleep(delay)
        try:
            came.append(agree(Nodes(2, rank, "127.0.0.1", port, 60, token), {}).rank)
        except InputError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:
        said = list(pool.map(node, (0, 1, 1), ("mine", "other", "mine"), (0, 0, 3)))
    stranger = f"node 1 ({socket.gethostname()}) of job 'other'"
    assert said[::2] == [None, None] and sorted(came) == [0, 1]
    assert said[1].startswith(f"{stranger} came to 127.0.0.1:{port}, where job 'mine' meets (RENDEZVOUS_ID)")
    assert f"waits for node 1 at 127.0.0.1:{port}" in caplog.text and f"refused: {stranger}" in caplog.text


@pytest.mark.parametrize("refuses", [0, 1])
def test_a_node_that_refuses_its_input_tells_the_others(refuses):
    port = free_port()

    def node(rank: int) -> str | None:
        here = Nodes(2, rank, "127.0.0.1", port, 60)
        try:
            with refusals_told(here):
                if rank == refuses:
                    raise InputError(["no data", "no model"])
            agree(here, {})
        except InputError as error:
            return str(error)
        return None

    started = time.monotonic()
    with ThreadPoolExecutor() as pool:
        said = list(pool.map(node, range(2)))
    who = f"node {refuses} ({socket.gethostname()}) refuses its input:"
    assert said[refuses] == "no data\nno model"
    assert said[1 - refuses] == f"{who} no data\n{who} no model"
    assert time.monotonic() - started < 20


def test_an_address_of_another_machine(monkeypatch):
    monkeypatch.setattr(nodes, "_CONNECT", 0.5)
    with pytest.raises(InputError, match=r"MASTER_ADDR=192\.0\.2\.1 does not lead to this machine"):
        agree(Nodes(2, 0, "192.0.2.1", free_port(), timeout=2), {})  # which no machine has


@pytest.mark.slow
def test_a_node_that_is_refused_leaves_the_run_alone(settings, tmp_path):
    """What the other wrote there before is as it was."""
    folder = tmp_path / "run"
    (folder / "state").mkdir(parents=True)
    (folder / "train.log").write_text("step 1\n")
    started = time.monotonic()
    (_, first), (_, second) = launched(settings | {"SAVE_DIR": folder}, {}, {"DATA_DIR": tmp_path / "nowhere"})
    assert "error: no such data file" in second and "node 1" in first and "no such data file" in first
    assert sorted(path.name for path in folder.iterdir()) == ["state", "train.log"]
    assert (folder / "train.log").read_text() == "step 1\n"
    assert time.monotonic() - started < 60


@pytest.mark.slow
def test_folders_that_are_not_shared(settings, tmp_path):
    """The same name leads to another place on each node: said in a line, before anything is trained."""
    for rank in range(2):
        (tmp_path / f"node{rank}" / "outputs").mkdir(parents=True)
    common = settings | {"NNODES": 2, "NPROC": 1, "GRAD_ACC": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(),
                         "SAVE_DIR": "/proc/self/fd/9/outputs/run"}
    processes = [start(KD, prefix=("bash", "-c", 'exec 9<"$0"; exec "$@"', str(tmp_path / f"node{rank}")),
                       **common | {"NODE_RANK": rank}) for rank in range(2)]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 2
        assert "error: /proc/self/fd/9/outputs/run is another folder on node 1 (" in output
        assert output.count("error: ") == 1
    assert not list(tmp_path.glob("node*/outputs/*"))


def test_a_second_run_is_refused_before_its_processes_start(settings, tmp_path):
    with claimed(tmp_path / "run"):
        process = start(KD, **settings, SAVE_DIR=tmp_path / "run", NPROC=2, GRAD_ACC=1)
        output, _ = process.communicate(timeout=240)
    assert process.returncode == 2, output
    assert output.count("error: ") == 1
    assert (f"error: another run is writing to {tmp_path}/run: process {os.getpid()} on {socket.gethostname()} (its "
            f"lock is {tmp_path}/run/.lock)\n") in output
    assert "torch.distributed" not in output
