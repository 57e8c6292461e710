"""Fixtures that several files share."""

import pytest
from launching import Workshop
from stopping import resumable


@pytest.fixture(scope="session")
def workshop(tmp_path_factory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="session")
def settings(workshop) -> dict[str, object]:
    return resumable(workshop)
