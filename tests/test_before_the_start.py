"""What the check before a start looks at, what it leaves to the run, and who of many ranks reads the weights."""

import dataclasses
import shutil
import threading
from types import SimpleNamespace

import pytest
import torch
from threads import ThreadWorld, on_ranks
from tiny import tiny_model
from todi.errors import InputError
from todi.job import _read_weights, meet, prepare
from todi.options import parse
from todi.runtime import checksums
from todi.runtime.checksums import read_together, weights_checksum, weights_place, weights_sizes
from todi.runtime.distributed import World
from todi.settings import TrainConfig
from todi.teacher.opening import look_at_choices
from todi.train import train
from todi.training.train_inputs import checksums as checksums_of_inputs

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
    sizes, file = weights_sizes(one), one / "model.safetensors"
    assert sizes[str(file)] == f"{file.stat().st_size} bytes" and sizes.keys() == {str(file), str(one / "config.json")}
    assert [*sizes.values()] == [*weights_sizes(same).values()] == [*weights_sizes(other).values()]
    assert weights_checksum(one) == weights_checksum(same) != weights_checksum(other)
    (tmp_path / "link").symlink_to(one)
    assert weights_place(one) == weights_place(tmp_path / "link") != weights_place(same)
    before = weights_place(one)
    (one / "model.safetensors").touch()
    assert weights_place(one) != before


def test_several_read_a_part_each(tmp_path, monkeypatch):
    """The first ranks of two nodes."""
    models = [tiny_model(tmp_path / name, layers=layers) for name, layers in (("a", 1), ("b", 2))]
    monkeypatch.setattr(checksums, "_PIECE", 10_000)
    expected, given = [weights_checksum(model) for model in models], {}
    checksums._found.clear()

    def read(world: ThreadWorld) -> None:
        def gather(digests: list[bytes]) -> list[list[bytes]]:
            given[world.rank] = digests
            return world.gather(digests)
        read_together(models, world.rank, 2, gather)

    assert on_ranks(2, read) == [None] * 2
    monkeypatch.setattr(checksums, "_piece_digest", None)
    assert [weights_checksum(model) for model in models] == expected
    assert 0 <= len(given[0]) - len(given[1]) <= 1
    assert len(given[0]) > 10


@pytest.mark.parametrize(("folders", "fellows", "sent"), [
    ("aa", {0: (0, 2), 2: (0, 2)}, True),  # one folder of two nodes
    ("ab", {}, False),  # a copy each
    ("aba", {0: (0, 4), 4: (0, 4)}, True)])
def test_who_reads(words, monkeypatch, folders, fellows, sent):
    """Nodes of two ranks. Who has files of its own reads all and sends nothing; where all have, nothing is sent."""
    job, found, here = prepare(parse(TrainConfig, words), ALONE, CPU), {}, threading.local()
    monkeypatch.setattr("todi.job.weights_place", lambda model: folders[here.world.rank // 2])

    def note(models, reader, readers, gather) -> None:
        rank = here.world.rank
        gathered = gather([rank])
        found[rank] = (tuple(one for one, in gathered), reader, readers, len(models), here.told[1:])

    def read(world: ThreadWorld) -> None:
        here.world, here.told, gather = world, [], world.gather
        told, world.local_rank = here.told, world.rank % 2
        world.gather = lambda value: told.append(value) or gather(value)
        _read_weights(dataclasses.replace(job, world=world))

    monkeypatch.setattr("todi.job.read_together", note)
    ranks = 2 * len(folders)
    assert on_ranks(ranks, read) == [None] * ranks
    for rank in range(ranks):
        group, models = fellows.get(rank, (rank,)), 2 if rank % 2 == 0 else 0
        own = [[rank] if len(group) > 1 else []]
        assert found[rank] == (group, group.index(rank), len(group), models, own if sent else []), rank


def met(monkeypatch, job) -> tuple[dict[str, str], list]:
    """What `meet` compares, and the folders of caches that it has looked at."""
    said = []
    monkeypatch.setattr("todi.job.agree", lambda nodes, description: said.append(description))
    monkeypatch.setattr("todi.job.check_same_folders", lambda config, caches, party: said.append(caches))
    meet(job, None)
    return tuple(said)


@pytest.mark.parametrize(("teachers", "mode", "looked_at"), [
    (1, "{folder}", True), (1, "auto", False),
    (2, "{folder}", False)])  # it holds a folder of each, and is itself no cache
def test_which_caches_the_nodes_look_for(words, tmp_path, monkeypatch, teachers, mode, looked_at):
    more = ["--teacher-model-path", words[3], words[1]] if teachers == 2 else []
    config = parse(TrainConfig, [*words, *more, "--teacher-cache", mode.format(folder=tmp_path / "cache")])
    job = prepare(config, ALONE, CPU)
    assert len(job.specs) == teachers
    assert met(monkeypatch, job)[1] == ([tmp_path / "cache"] if looked_at else [])


def test_the_commit_of_a_model_on_the_hub(words, monkeypatch, unread):
    """It takes no reading, so a check has it; the nodes tell models that lie there by the size of each file."""
    job = prepare(parse(TrainConfig, words), ALONE, CPU)
    student = dataclasses.replace(job.inputs.student, path="someone/student")
    job = dataclasses.replace(job, inputs=dataclasses.replace(job.inputs, student=student))
    monkeypatch.setattr("todi.models.loading.load_config", lambda *_: SimpleNamespace(_commit_hash="c0ffee"))
    said = checksums_of_inputs(job.config, job.inputs, of_models=False)
    assert said["someone/student"] == "c0ffee" and words[3] not in said
    description = met(monkeypatch, job)[0]
    assert description["someone/student"] == "c0ffee" and f"{words[3]}/model.safetensors" in description
