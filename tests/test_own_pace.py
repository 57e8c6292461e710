"""A student whose weights ZeRO-3 has spread: each rank writes what it has to, the same texts as under ZeRO-1."""

import pytest
from launching import exhaustive, slow
from test_library import run_program
from tiny import tiny_model, tiny_tokenizer

SPREAD = pytest.mark.parametrize("way", ["whole", "in turns"])


@pytest.fixture(scope="module", params=[slow(False), exhaustive(True)], ids=["full", "LoRA"])
def found(request, tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("paces")
    # with dropout, for which an idle forward must draw no numbers
    student = tiny_model(folder / "student", "gpt2", vocab=len(tiny_tokenizer(folder / "student")), resid_pdrop=0.2)
    return run_program("paces", {"student": student, "lora": request.param}, folder, ranks=2)


@SPREAD
def test_the_ranks_share_the_prompts_and_write_the_same_texts(found, way):
    ours, theirs = found[way], found["ZeRO 1"]
    assert [len(written) for written in ours["written"]] == [2, 1]
    assert ours["written"] == theirs["written"]
    assert len({len(ids) for written in ours["written"] for _, (ids, _) in written}) > 1  # so they need not be in step
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5) and ours["rouge"] == theirs["rouge"]


@SPREAD
def test_a_round_too_however_few_prompts_there_are(found, way):
    texts, untouched = zip(*found[way]["answers"], strict=True)
    assert list(texts) == [texts for texts, _ in found["ZeRO 1"]["answers"]]
    assert all(untouched)


@SPREAD
def test_training_goes_on_as_if_nothing_had_been_written(found, way):
    for ours, theirs in zip(found[way]["losses"], found["ZeRO 1"]["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("way", ["ZeRO 1", "whole", "in turns"])
def test_where_one_rank_is_asked_to_stop_all_do(found, way):
    assert found[way]["stopped"] == [15, 15]


def test_weights_that_fit_are_gathered_once(found):
    assert found["whole"]["fetches"] == 0 < found["in turns"]["fetches"]
