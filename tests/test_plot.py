"""todi.plot: curves that lie on one another, single points, and scores stay readable."""

import json

from evaluating import run
from todi import plot


def curve(*losses, rouge=()):
    return [*({"kind": "train", "step": step, "loss": loss, "kd": loss} for step, loss in enumerate(losses, 1)),
            *({"kind": "dev", "step": step, "rouge_l": value} for step, value in enumerate(rouge, 1))]


def panels(*what) -> dict:
    """By title, without the empty ones."""
    return {axis.get_title(): axis for axis in plot.figure_of(*what).axes if axis.axison}


def test_equal_curves_are_of_different_width():
    axis = panels({"a": curve(3, 2, 1), "b": curve(3, 2, 1)})["training loss"]
    below, above = axis.get_lines()
    assert below.get_linewidth() > above.get_linewidth() + 1
    assert below.get_zorder() <= above.get_zorder()
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["a", "b"]


def test_single_points_have_a_row_each_with_the_number():
    axis = panels({"a": curve(3, 2, rouge=[7.5]), "b": curve(3, 2, rouge=[7.5])})["ROUGE-L (dev), step 1"]
    points = [line.get_xydata().tolist() for line in axis.get_lines()]
    assert points == [[[7.5, 0]], [[7.5, 1]]]
    assert [text.get_text() for text in axis.texts] == ["7.50", "7.50"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b"]


def test_steps_are_whole_numbers():
    axis = panels({"short": curve(2.1, 1.7)})["training loss"]
    assert all(tick == int(tick) for tick in axis.get_xticks())


def test_scores_have_their_run_s_colour_and_interval():
    scores = {"other": {"rouge_l": 5.0, "rouge_l_interval": [4.0, 6.0]}, "a": {"rouge_l": 9.0}}
    found = panels({"a": curve(3, 2, 1)}, scores)
    training, = found["training loss"].get_lines()
    interval, other, of_a = found["ROUGE-L, with its 95 % interval"].get_lines()
    assert list(interval.get_xdata()) == [4.0, 6.0]
    assert of_a.get_color() == training.get_color() != other.get_color()


def test_the_command(monkeypatch, tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in curve(2, 1)))
    picture = tmp_path / "deep" / "curves.svg"
    assert run(monkeypatch, plot, tmp_path / "a", tmp_path / "b", "--output", picture) == 0
    assert "training loss" in picture.read_text()
    assert run(monkeypatch, plot, tmp_path / "a", "--scores", tmp_path / "b") == 2
    assert "no results in" in capsys.readouterr().err
