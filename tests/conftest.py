"""Fixtures that several files share."""

from pathlib import Path

import pytest
from launching import Workshop
from stopping import resumable


@pytest.fixture(scope="session")
def workshop(tmp_path_factory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="session")
def settings(workshop) -> dict[str, object]:
    return resumable(workshop)


@pytest.fixture(scope="session")
def lesson(workshop):
    from lessons import lesson_of  # imports DeepSpeed, for which most tests need not wait

    return lesson_of(workshop)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr("todi.engine.cache.store.SHARD_SAMPLES", 5)


@pytest.fixture
def filled(lesson, tmp_path, small_shards) -> Path:
    """A complete teacher cache of 18 samples in 4 shards."""
    from lessons import ALONE, CPU
    from todi.teachers import fill_cache

    fill_cache(lesson, tmp_path / "cache", ALONE, CPU)
    return tmp_path / "cache"
