"""The committed demo data set is what its generator makes, and its splits are sound."""

import json
import operator
import re
from collections import Counter
from itertools import chain
from pathlib import Path

import make_demo as demo
import pytest
from todi.data.templates import alpaca_prompt

DATA = Path(__file__).parents[1] / "data" / "demo"
LEAST = {"train": 1200, "dev": 120, "valid": 160}


@pytest.fixture(scope="module")
def splits() -> dict[str, list[dict[str, str]]]:
    return {split: [json.loads(line) for line in (DATA / f"{split}.jsonl").read_text("utf-8").splitlines()]
            for split in LEAST}


def test_regenerating_gives_the_committed_bytes(tmp_path):
    demo.main(["--out", str(tmp_path)])
    for split in LEAST:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (DATA / f"{split}.jsonl").read_bytes()


def test_another_seed_gives_other_data():
    assert demo.make_splits(1) == demo.make_splits(1) != demo.make_splits(2)


def test_sizes_and_balance(splits):
    for split, records in splits.items():
        assert len(records) >= LEAST[split]
        counts = Counter(record["kind"] for record in records)
        assert set(counts) == set(demo.KINDS) and len(counts) >= 12
        assert len(set(counts.values())) == 1


def test_no_prompt_and_no_answer_of_a_kind_occurs_twice(splits):
    records = list(chain(*splits.values()))
    assert len({record["prompt"] for record in records}) == len(records)
    assert len({(record["kind"], record["output"]) for record in records}) == len(records)


def test_records_are_filled_templates(splits):
    for record in chain(*splits.values()):
        assert list(record) == ["instruction", "input", "output", "prompt", "kind"]
        assert record["prompt"] == alpaca_prompt(record["instruction"], record["input"])
        assert not re.search(r"[{}>]|  ", record["instruction"] + record["input"] + record["output"])


def test_lengths(splits):
    for record in chain(*splits.values()):
        assert 4 <= len(record["output"].split()) <= 45
        assert 1 <= len(f"{record['instruction']} {record['input']}".split()) <= 60


def test_every_sum_is_right(splits):
    records = list(chain(*splits.values()))
    signs = {"+": operator.add, "-": operator.sub, "×": operator.mul, "÷": operator.truediv}
    sums = [found for record in records for found in
            re.findall(r"([\d,]+) ([-+×÷]) ([\d,]+) = ([\d,]*\d)", record["output"])]
    assert len(sums) == sum(record["kind"] in ("convert", "word_problem") for record in records)
    for left, sign, right, result in sums:
        a, b, c = (int(number.replace(",", "")) for number in (left, right, result))
        assert signs[sign](a, b) == c


def test_too_small_a_bank_is_reported():
    with pytest.raises(ValueError, match="'define'"):
        demo.draw_records("define", 500, seed=10)
