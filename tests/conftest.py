"""Fixtures that several files share."""

import pytest
from launching import Workshop


@pytest.fixture(scope="session")
def workshop(tmp_path_factory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="session")
def settings(workshop) -> dict[str, object]:
    """Six epochs of three steps with dropout on, a state every two steps."""
    models = {role: workshop.model(f"resume-{role}", family="gpt2", hidden=hidden, seed=seed, resid_pdrop=0.2,
                                   embd_pdrop=0.2)
              for role, hidden, seed in (("teacher", 48, 1), ("student", 32, 2))}
    return workshop.settings | {"MODEL_PATH": models["student"], "TEACHER_MODEL_PATH": models["teacher"], "EPOCH": 6,
                                "SAVE_STATE_EVERY": 2, "LR": 1e-2}
