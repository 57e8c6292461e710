"""Training computes what it computed when the curves in tests/assets/losses were recorded."""

import json
from functools import cache

import pytest
from launching import in_tiers
from pinned import ASSETS, RUNS, curves, made_with, start


@pytest.fixture(scope="module")
def runs(workshop):
    return cache(lambda name: start(workshop, name).result())


@pytest.mark.parametrize("name", in_tiers(RUNS, always={"todi-full"}, slowly=RUNS))
def test_a_pinned_curve(runs, name):
    record = json.loads((ASSETS / f"{name}.json").read_text())
    found = curves(runs(name))
    if record["made_with"] == made_with():
        assert found == record["curves"]
    assert found.keys() == record["curves"].keys()
    for curve, values in record["curves"].items():
        assert found[curve] == pytest.approx(values, rel=1e-4), curve
