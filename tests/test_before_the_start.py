"""What the check before a start looks at, what it leaves to the run, and who of many ranks reads the weights."""

import dataclasses
import shutil
import threading
from pathlib import Path

import pytest
import torch
from threads import ThreadWorld, on_ranks
from tiny import tiny_model
from todi.errors import InputError
from todi.options import parse
from todi.runtime import checksums
from todi.runtime.checksums import weights_checksum, weights_listing, weights_place
from todi.runtime.distributed import World
from todi.settings import TrainConfig
from todi.teacher.opening import look_at_choices
from todi.train import _decide, _prepare, _what_must_agree, train

CPU, ALONE = torch.device("cpu"), World(0, 1, 0, 1)


@pytest.fixture
def unread(monkeypatch):
    """Reading weights fails the test."""
    monkeypatch.setattr(checksums, "_piece_digest", lambda *_: pytest.fail("weights were read"))
    checksums._weights_checksum.cache_clear()


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


@pytest.mark.parametrize("shared", [True, False])
def test_a_node_reads_what_the_first_one_does_not_see(words, monkeypatch, shared):
    config = parse(TrainConfig, words)
    job, read = _prepare(config, ALONE, CPU), []
    run, _ = _decide(job)
    weights = {path: said for path, said in run["files"].items() if not path.endswith(".jsonl")}
    assert len(weights) == 2
    monkeypatch.setattr("todi.train.weights_place",
                        lambda model: "a folder of all" if shared else f"of {threading.get_ident()}")

    def read_by(model: Path) -> str:
        read.append(threading.get_ident())
        return weights_checksum(model)

    monkeypatch.setattr("todi.training.train_inputs.weights_checksum", read_by)

    def describe(world: ThreadWorld) -> dict[str, str]:
        world.local_rank = world.rank % 2  # two nodes of two ranks
        return _what_must_agree(dataclasses.replace(job, world=world), run if world.is_main else None)

    said = on_ranks(4, describe)
    assert weights.items() <= said[0].items()
    assert [weights.items() <= one.items() for one in said[1:]] == [False, not shared, False]
    assert len(set(read)) == (0 if shared else 1)
