"""Training computes what it computed when the curves in tests/assets/losses were recorded."""

import json

import pytest
from pinned import ASSETS, RUNS, curves, made_with, start_all


@pytest.fixture(scope="module")
def runs(workshop):
    return start_all(workshop)


@pytest.mark.parametrize("name", RUNS)
def test_a_pinned_curve(runs, name):
    record = json.loads((ASSETS / f"{name}.json").read_text())
    found = curves(runs[name].result())
    if record["made_with"] == made_with():
        assert found == record["curves"]
    assert found.keys() == record["curves"].keys()
    for curve, values in record["curves"].items():
        assert found[curve] == pytest.approx(values, rel=1e-4), curve
