"""Draws the training curves of one or several runs, and beside them how their models scored.

    python -m todi.plot RUN_DIR [RUN_DIR ...] --output curves.png
    python -m todi.plot RUN_DIR RUN_DIR --names SFT ToDi --scores CKPT_PATH CKPT_PATH --score-names SFT ToDi

A run's label is its folder's name unless --names gives another; a label has one colour in all panels.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from todi.errors import InputError, run_main
from todi.options import option, parse
from todi.report import read_all
from todi.runtime.logs import set_up_logging

logger = logging.getLogger("todi.plot")

# panel title -> kind of line in metrics.jsonl, and its value
_PANELS = {
    "training loss": ("train", "loss"),
    "cross-entropy (training)": ("train", "ce"),
    "divergence (training)": ("train", "kd"),
    "ROUGE-L (dev)": ("dev", "rouge_l"),
}
_SCORES = "ROUGE-L, with its 95 % interval"
_COLUMNS = 3
_FEW = 12  # points that are marked one by one

Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class PlotConfig:
    """Draws the training curves of one or several runs, and beside them how their models scored."""

    runs: tuple[str, ...] = option((), "folders with a metrics.jsonl", flag="runs")
    names: tuple[str, ...] = option((), "a label for each run")
    scores: tuple[str, ...] = option((), "folders with eval/results.json, whose average is drawn in a panel of its own")
    score_names: tuple[str, ...] = option((), "a label for each of them; that of a run gives it the run's colour")
    output: str = option("curves.png", "the picture to write (png, pdf, svg)")


def main() -> None:
    """Read every run, draw one picture."""
    config = parse(PlotConfig, prog="python -m todi.plot")
    set_up_logging(is_main=True)
    if not config.runs:
        raise InputError("name at least one run folder")
    if config.names and len(config.names) != len(config.runs):
        raise InputError(f"{len(config.names)} names for {len(config.runs)} runs")
    names = config.names or [Path(run).name for run in config.runs]
    runs = {name: read_metrics(Path(run)) for name, run in zip(names, config.runs, strict=True)}
    scores = read_all(config.scores, config.score_names) if config.scores else {}
    draw(runs, Path(config.output), {name: results["average"] for name, results in scores.items()})
    logger.info("training curves: %s", config.output)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl. Raises InputError when there are none."""
    file = run / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    if not lines:
        raise InputError(f"no metrics in {run}: {file} is missing or empty")
    return [json.loads(line) for line in lines]


def draw(runs: Mapping[str, Sequence[Mapping[str, Any]]], output: Path,
         scores: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Writes the picture of `figure_of`: png, pdf or svg."""
    output.parent.mkdir(parents=True, exist_ok=True)
    figure_of(runs, scores or {}).savefig(output, dpi=130)


def figure_of(runs: Mapping[str, Sequence[Mapping[str, Any]]],
              scores: Mapping[str, Mapping[str, Any]] = MappingProxyType({})) -> Figure:
    """A panel for each value that any of the runs has, over optimizer steps, and one for the scores.

    Args:
        runs: lines of metrics.jsonl by label.
        scores: by label, "rouge_l" and "rouge_l_interval" as results.json has them.
    """
    colours = {name: f"C{index % 10}" for index, name in enumerate(dict.fromkeys([*runs, *scores]))}
    curves = {title: {name: curve for name, lines in runs.items() if (curve := _curve(lines, *what))}
              for title, what in _PANELS.items()}  # an SFT run among distillations has no divergence
    shown = {title: by_run for title, by_run in curves.items() if by_run}
    panels = len(shown) + bool(scores)
    columns = min(panels, _COLUMNS)
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(4.8 * columns, 3.6 * rows), layout="constrained")  # and no pyplot: it needs no screen
    axes = figure.subplots(rows, columns, squeeze=False)
    places = iter(axes.flat)
    for (title, by_run), axis in zip(shown.items(), places, strict=False):
        if len(runs) > 1 and all(len(curve) == 1 for curve in by_run.values()):
            steps = {step for (step, _), in by_run.values()}
            _rows(axis, {name: (value, None) for name, ((_, value),) in by_run.items()}, colours)
            axis.set(title=title + (f", step {min(steps)}" if len(steps) == 1 else ", once each"))
        else:
            _lines(axis, by_run, colours)
            axis.set(title=title, xlabel="optimizer step")
            if len(by_run) > 1:
                axis.legend(fontsize="small")
    if scores:
        axis = next(places)
        _rows(axis, {name: (one["rouge_l"], one.get("rouge_l_interval")) for name, one in scores.items()}, colours)
        axis.set(title=_SCORES)
    for axis in places:
        axis.set_axis_off()
    return figure


def _curve(lines: Sequence[Mapping[str, Any]], kind: str, value: str) -> Curve:
    return [(line["step"], line[value]) for line in lines if line["kind"] == kind and line.get(value) is not None]


def _lines(axis: Axes, by_run: Mapping[str, Curve], colours: Mapping[str, str]) -> None:
    """Earlier ones are wider: where curves lie on one another, each still shows."""
    for index, (name, curve) in enumerate(by_run.items()):
        width = 1.3 + 1.6 * (len(by_run) - 1 - index)
        axis.plot(*zip(*curve, strict=True), label=name, color=colours[name], linewidth=width,
                  marker="o" if len(curve) < _FEW else None, markersize=3 + width, markeredgecolor="white")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)


def _rows(axis: Axes, values: Mapping[str, tuple[float, Sequence[float] | None]], colours: Mapping[str, str]) -> None:
    """A row for each label, so that equal values stay apart: a point, its interval, and the number."""
    for place, (name, (value, interval)) in enumerate(values.items()):
        if interval:
            axis.plot(interval, (place, place), color=colours[name], linewidth=2, solid_capstyle="butt")
        axis.plot(value, place, "o", color=colours[name], markersize=7)
        axis.annotate(f"{value:.2f}", (value, place), (0, 7), textcoords="offset points", ha="center", fontsize="small")
    axis.set_yticks(range(len(values)), values)
    axis.set_ylim(len(values) - 0.4, -0.7)  # the first on top
    end = max(max([value, *(interval or ())]) for value, interval in values.values()) or 1
    axis.set_xlim(-0.06 * end, 1.12 * end)  # from 0, with room for the numbers
    axis.grid(axis="x", alpha=0.3)


if __name__ == "__main__":
    run_main(main)
