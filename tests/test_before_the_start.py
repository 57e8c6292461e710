"""What the check before a start looks at, what it leaves to the run, and who of many ranks reads the weights."""

import dataclasses
import shutil
import threading

import pytest
import torch
from threads import ThreadWorld, on_ranks
from tiny import tiny_model
from todi.errors import InputError
from todi.job import _read_weights, prepare
from todi.options import parse
from todi.runtime import checksums
from todi.runtime.checksums import read_together, weights_checksum, weights_listing, weights_place
from todi.runtime.distributed import World
from todi.settings import TrainConfig
from todi.teacher.opening import look_at_choices
from todi.train import train

CPU, ALONE = torch.device("cpu"), World(0, 1, 0, 1)


@pytest.fixture
def unread(monkeypatch):
    """Reading weights fails the test."""
    monkeypatch.setattr(checksums, "_piece_digest", lambda *_: pytest.fail("weights were read"))
    checksums._found.clear()


@pytest.fixture
def words(workshop, tmp_path) -> list[str]:
    """Of a run with a student of its own, which a test may change."""
    student = shutil.copytree(workshop.model("doctor student", family="llama"), tmp_path / "student")
    teacher = workshop.model("doctor teacher", family="llama", hidden=48, vocab=320)
    return ["--model-path", str(student), "--teacher-model-path", str(teacher), "--data-dir", str(workshop.data),
            "--precision", "fp32", "--save-dir", str(tmp_path / "run"), "--max-length", "64", "--max-prompt-length",
            "48"]


@pytest.mark.parametrize("cache", ["off", "auto", "on", "{folder}/cache"])
def test_a_check_reads_no_weights(words, tmp_path, unread, cache):
    config = parse(TrainConfig, [*words, "--teacher-cache", cache.format(folder=tmp_path), "--check-only"])
    train(config, ALONE, CPU)
    assert not (tmp_path / "run").exists()


def test_what_a_check_refuses(spec, filled, unread):
    """A cache of other samples, which takes no weights to see."""
    assert look_at_choices([spec], "auto", "live") == "live" and look_at_choices([spec], "off", None) == "live"
    assert look_at_choices([spec], str(filled), None) == look_at_choices([spec], "on", "live") == "cached in fp32"
    other = dataclasses.replace(spec, examples=spec.examples[::-1])
    with pytest.raises(InputError, match=f"the teacher cache {filled} is of something else: token ids was"):
        look_at_choices([other], str(filled), None)


def test_what_it_says_of_files(tmp_path):
    one, same, other = (tiny_model(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    listed = weights_listing(one)
    assert f"model.safetensors of {(one / 'model.safetensors').stat().st_size} bytes" in listed
    assert listed == weights_listing(same) == weights_listing(other)
    assert weights_checksum(one) == weights_checksum(same) != weights_checksum(other)
    (tmp_path / "link").symlink_to(one)
    assert weights_place(one) == weights_place(tmp_path / "link") != weights_place(same)
    before = weights_place(one)
    (one / "model.safetensors").touch()
    assert weights_place(one) != before


def test_several_read_a_part_each(tmp_path, monkeypatch):
    """The first ranks of two nodes; the second ones hear nothing of it, and need not."""
    models = [tiny_model(tmp_path / name, layers=layers) for name, layers in (("a", 1), ("b", 2))]
    monkeypatch.setattr(checksums, "_PIECE", 10_000)
    expected, given = [weights_checksum(model) for model in models], {}
    checksums._found.clear()

    def read(world: ThreadWorld) -> None:
        def gather(digests: list[bytes]) -> list[list[bytes]]:
            given[world.rank] = digests
            return world.gather(digests)
        read_together(models, {0: 0, 2: 1}.get(world.rank), 2, gather)

    assert on_ranks(4, read) == [None] * 4
    monkeypatch.setattr(checksums, "_piece_digest", None)
    assert [weights_checksum(model) for model in models] == expected
    assert given[1] == given[3] == [] and 0 <= len(given[0]) - len(given[2]) <= 1
    assert len(given[0]) > 10


@pytest.mark.parametrize(("shared", "expected"), [
    (True, {0: (0, 2), 1: (None, 2), 2: (1, 2), 3: (None, 2)}),
    (False, {0: (0, 1), 1: (None, 1), 2: (None, 1), 3: (None, 1)})])
def test_who_reads(words, monkeypatch, shared, expected):
    """Two nodes of two ranks."""
    job, found, here = prepare(parse(TrainConfig, words), ALONE, CPU), {}, threading.local()
    monkeypatch.setattr("todi.job.weights_place", lambda model: "one folder" if shared else f"of node {here.node}")
    monkeypatch.setattr("todi.job.read_together",
                        lambda models, reader, readers, gather: found.update({here.rank: (reader, readers)}))

    def read(world: ThreadWorld) -> None:
        here.rank, here.node, world.local_rank = world.rank, world.rank // 2, world.rank % 2
        _read_weights(dataclasses.replace(job, world=world))

    assert on_ranks(4, read) == [None] * 4
    assert found == expected
