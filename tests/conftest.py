"""Fixtures that several files share."""

import json
from pathlib import Path

import pytest
from launching import Workshop
from stopping import resumable
from tiny import tiny_model, tiny_tokenizer

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="session")
def workshop(tmp_path_factory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="session")
def settings(workshop) -> dict[str, object]:
    return resumable(workshop)


@pytest.fixture(scope="session")
def spec(workshop):
    from teachers import teacher_spec_of  # imports DeepSpeed, for which most tests need not wait

    return teacher_spec_of(workshop)


@pytest.fixture(scope="session")
def only_process_group():
    """A group of one process, for all tests."""
    import torch
    from todi.runtime.distributed import process_group, world_from_environment

    with pytest.MonkeyPatch.context() as environment:
        for name in RANK_VARIABLES:
            environment.setenv(name, "0")  # so that it is put back: other processes must not take it for theirs
            environment.delenv(name)
        group = process_group(world_from_environment(), torch.device("cpu"))
        group.__enter__()
    yield
    group.__exit__(None, None, None)


@pytest.fixture
def process_group(only_process_group, monkeypatch):
    """What `deepspeed.initialize` needs, also in fp16: DeepSpeed refuses it where the processor has no products of it,
    which PyTorch does without."""
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda accelerator: True)
    for name, value in zip(RANK_VARIABLES, (0, 1, 0), strict=False):
        monkeypatch.setenv(name, str(value))


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr("todi.teacher.cache_files.SHARD_SAMPLES", 5)


@pytest.fixture
def filled(spec, tmp_path, small_shards) -> Path:
    """A complete teacher cache of 18 samples in 4 shards."""
    from teachers import ALONE, CPU
    from todi.teacher.opening import fill_cache

    fill_cache(spec, tmp_path / "cache", ALONE, CPU)
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A folder with a tiny model and its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    return tiny_model(folder, "llama", vocab=len(tiny_tokenizer(folder)))


@pytest.fixture
def data(tmp_path):
    """A data folder with two sets of 3 and 2 records."""
    for name, count in (("dolly", 3), ("sinst/11_", 2)):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        records = [{"prompt": f"Write the number {index}." * (index + 1), "output": ["The number", f"{index}"]}
                   for index in range(count)]
        (folder / "valid.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path / "data"
