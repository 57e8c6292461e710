"""The files of a resume state of several ranks, which are threads here: each sees to its own, and one names it."""

import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from threads import ThreadWorld, on_ranks
from todi.errors import StorageError
from todi.training import state, state_files
from todi.training.state import Position, SavedState, StateStore

RANKS = 3


class Engine:
    """Writes a file of the rank's own, and the first rank one more, as DeepSpeed does."""

    device = torch.device("cpu")

    def __init__(self, world: ThreadWorld):
        self.world = world

    def zero_optimization_stage(self) -> int:
        return 1

    def save_checkpoint(self, folder: str, tag: str, **_: Any) -> None:
        os.makedirs(f"{folder}/{tag}", exist_ok=True)
        self.checkpoint_engine.save(state_dict={"x": torch.ones(9)}, path=f"{folder}/{tag}/own{self.world.rank}.pt")
        if self.world.is_main:
            self.checkpoint_engine.save(state_dict={"x": torch.ones(9)}, path=f"{folder}/{tag}/all.pt")
            Path(folder, "a_script.py").touch()


@pytest.fixture
def write(tmp_path, monkeypatch) -> Callable[[int], list[Any]]:
    """Has all ranks write the state after so many steps."""
    monkeypatch.setattr(state, "pieces_of", lambda engine: [])

    def all_of_them(step: int) -> list[Any]:
        saved = SavedState(Position(step=step), {}, {})
        return on_ranks(RANKS, lambda world: StateStore(tmp_path, world).save(Engine(world), saved))
    return all_of_them


def newest(folder: Path) -> list[Path | None]:
    """Which state each rank takes."""
    return on_ranks(RANKS, lambda world: StateStore(folder, world).newest())


def test_each_rank_sees_to_its_own_files(tmp_path, monkeypatch, write):
    by_thread, make_durable = [], state_files.make_durable

    def note(path: Path) -> None:
        by_thread.append((threading.get_ident(), path.name))
        make_durable(path)

    monkeypatch.setattr(state_files, "make_durable", note)
    write(1)
    folder = tmp_path / "state/epoch0_step1"
    files = {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*.p[ty]*")}
    assert len(files) == 2 * RANKS + 2
    assert sorted(name for _, name in by_thread) == sorted(Path(name).name for name in files)  # each once
    of = {thread: {name for other, name in by_thread if other == thread} for thread, _ in by_thread}
    own = {rank: {f"own{rank}.pt", f"rank{rank}.pt"} for rank in range(RANKS)}
    assert sorted(of.values(), key=min) == sorted([own[0] | {"all.pt", "a_script.py"}, own[1], own[2]], key=min)
    assert json.loads((folder / "state.json").read_text())["files"] == files


def test_the_newest_two_stay_and_each_rank_deletes_a_share_of_the_rest(tmp_path, monkeypatch, write):
    deleted, unlink = {}, Path.unlink

    def note(path: Path, missing_ok: bool = False) -> None:
        deleted[path.name] = threading.get_ident()
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", note)
    for step in (1, 2, 3):
        write(step)
    assert sorted(os.listdir(tmp_path / "state")) == ["epoch0_step2", "epoch0_step3"]
    assert len(deleted) == 2 * RANKS + 2 and len(set(deleted.values())) == RANKS


def test_an_old_state_that_cannot_be_deleted_ends_no_run(tmp_path, monkeypatch, write, caplog):
    """The others' view of the folder is late, and the first rank finds a file that does not go."""
    def late(path: Path) -> dict[str, Any]:
        if path.name.endswith("discarded"):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return json.loads((path / "state.json").read_text())

    def busy(path: Path) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(logging.getLogger("todi"), "propagate", True)
    monkeypatch.setattr(state, "_read", late)
    assert all(isinstance(took, float) for step in (1, 2, 3) for took in write(step))
    assert sorted(os.listdir(tmp_path / "state")) == ["epoch0_step2", "epoch0_step3"]
    monkeypatch.setattr(state, "shutil", SimpleNamespace(rmtree=busy))
    assert all(isinstance(took, float) for took in write(4))
    assert "cannot delete an old state: [Errno 16] Device or resource busy" in caplog.text
    monkeypatch.setattr(state, "set_aside", busy)
    assert all(isinstance(took, float) for took in write(5))
    assert "cannot set aside an old state" in caplog.text
    assert newest(tmp_path) == [tmp_path / "state/epoch0_step5"] * RANKS


def test_a_disk_that_is_full_on_one_rank(tmp_path, monkeypatch, write):
    write(1)
    before, make_durable = sorted((tmp_path / "state").rglob("*")), state_files.make_durable

    def full(path: Path) -> None:
        if path.name == "own1.pt":
            raise OSError(28, "No space left on device")
        make_durable(path)

    monkeypatch.setattr(state_files, "make_durable", full)
    said = write(2)
    assert isinstance(said[1], StorageError)
    assert f"cannot write {tmp_path}/state/epoch0_step2: [Errno 28] No space left on device" in str(said[1])
    assert not (tmp_path / "state/epoch0_step2").exists()
    newest(tmp_path)
    assert sorted((tmp_path / "state").rglob("*")) == before


@pytest.mark.parametrize("damaged", ["files/own0.pt", "files/own2.pt", "rank1.pt", "a_script.py"])
def test_all_ranks_go_back_to_the_newest_whole_state(tmp_path, write, damaged):
    """Each of them looks at a share of the files, and all hear of what is wrong."""
    for step in (1, 2):
        write(step)
    last = tmp_path / "state/epoch0_step2"
    assert newest(tmp_path) == [last] * RANKS
    file = last / damaged.replace("files", state.FOLDER)
    file.write_bytes(file.read_bytes() + b"more")
    assert newest(tmp_path) == [last.with_name("epoch0_step1")] * RANKS
