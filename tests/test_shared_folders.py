"""Whether nodes see that their folder is another one elsewhere, and that they leave nothing behind."""

import os
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from threads import ThreadWorld, on_ranks
from todi.errors import InputError
from todi.runtime import shared_folders
from todi.runtime.shared_folders import check_shared

HOST = socket.gethostname()


def check(*roots: Path, marks: Sequence[bool] = (), kind: str = "node",
          monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What each of the nodes says of "outputs/run", which is in its own root."""
    here = threading.local()
    monkeypatch.setattr(shared_folders, "Path", lambda name: here.root / name)

    def node(world: ThreadWorld) -> list[str]:
        here.root = roots[world.rank]
        try:
            check_shared(["outputs/run"], world, kind, marks[world.rank] if marks else True)
        except InputError as error:
            return error.problems
        return []

    return on_ranks(len(roots), node)


def left(*roots: Path) -> list[Path]:
    return [path for root in roots for path in root.rglob("*")]


@pytest.fixture
def roots(tmp_path, monkeypatch) -> Callable[..., list[Path]]:
    monkeypatch.setattr(shared_folders, "PATIENCE", 0.5)

    def make(*names: str) -> list[Path]:
        paths = [tmp_path / name for name in names]
        for path in paths:
            path.mkdir(exist_ok=True)
        return paths

    return make


def test_one_folder(roots, monkeypatch):
    nodes = roots("shared", "shared", "shared")
    assert check(*nodes, monkeypatch=monkeypatch) == [[], [], []]
    assert not left(*nodes)


def test_what_is_there_stays(roots, monkeypatch):
    nodes = roots("shared", "shared")
    (nodes[0] / "outputs" / "run").mkdir(parents=True)
    (nodes[0] / "outputs" / "run" / "train.log").write_text("step 1")
    assert check(*nodes, monkeypatch=monkeypatch) == [[], []]
    assert [path.name for path in left(nodes[0])] == ["outputs", "run", "train.log"]


def test_another_folder_on_one_node(roots, monkeypatch):
    nodes = roots("shared", "shared", "own")
    said = f"{nodes[0]}/outputs/run is another folder on node 2 ({HOST}) than on node 0 ({HOST}): put it on a file " \
           "system that all nodes share"
    heard = check(*nodes, monkeypatch=monkeypatch)
    assert heard[0] == [said]
    assert [len(problems) for problems in heard] == [1, 1, 1]
    assert not left(*nodes)


def test_the_first_node_has_its_own(roots, monkeypatch):
    heard = check(*roots("own", "shared", "shared"), monkeypatch=monkeypatch)
    assert ["node 1" in heard[0][0], "node 2" in heard[0][1]] == [True, True]


def test_ranks_of_one_node_leave_one_mark(roots, monkeypatch):
    heard = check(*roots("shared", "shared", "own", "own"), marks=(True, False, True, False), kind="rank",
                  monkeypatch=monkeypatch)
    assert [len(problems) for problems in heard] == [1] * 4
    assert f"on rank 2 ({HOST}) than on rank 0" in heard[3][0]


def test_a_folder_that_cannot_be_written(roots, monkeypatch):
    nodes = roots("shared", "bad")
    (nodes[1] / "outputs").touch()
    heard = check(*nodes, monkeypatch=monkeypatch)
    for problems in heard:
        assert len(problems) == 1 and problems[0].startswith(f"node 1 ({HOST}) cannot write to ")
    assert not os.listdir(nodes[0])
