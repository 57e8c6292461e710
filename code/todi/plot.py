"""Draws the training curves of one or several runs.

    python -m todi.plot RUN_DIR [RUN_DIR ...] --output curves.png

A run's label is its folder's name unless --names gives another.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from todi.errors import InputError, run_main
from todi.options import option, parse
from todi.runtime.logs import set_up_logging

logger = logging.getLogger("todi.plot")

# panel title -> kind of line in metrics.jsonl, and its value
_PANELS = {
    "training loss": ("train", "loss"),
    "cross-entropy (training)": ("train", "ce"),
    "divergence (training)": ("train", "kd"),
    "ROUGE-L (dev)": ("dev", "rouge_l"),
}


@dataclass(frozen=True)
class PlotConfig:
    """Draws the training curves of one or several runs."""

    runs: tuple[str, ...] = option((), "folders with a metrics.jsonl", flag="runs")
    names: tuple[str, ...] = option((), "a label for each run")
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
    draw({name: read_metrics(Path(run)) for name, run in zip(names, config.runs, strict=True)}, Path(config.output))
    logger.info("training curves: %s", config.output)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl. Raises InputError when there are none."""
    file = run / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    if not lines:
        raise InputError(f"no metrics in {run}: {file} is missing or empty")
    return [json.loads(line) for line in lines]


def draw(runs: dict[str, Sequence[dict[str, Any]]], output: Path) -> None:
    """Writes the picture of `figure_of`."""
    output.parent.mkdir(parents=True, exist_ok=True)
    figure_of(runs).savefig(output, dpi=130)


def figure_of(runs: dict[str, Sequence[dict[str, Any]]]) -> Figure:
    """One panel for each value that any of the runs has, one line for each run, over optimizer steps."""
    curves = {title: {name: _curve(lines, *what) for name, lines in runs.items()} for title, what in _PANELS.items()}
    shown = {title: by_run for title, by_run in curves.items() if any(by_run.values())}
    figure = Figure(figsize=(4.5 * len(shown), 3.6), layout="constrained")  # and no pyplot: it needs no screen
    axes = figure.subplots(1, len(shown), squeeze=False)
    for axis, (title, by_run) in zip(axes[0], shown.items(), strict=True):
        for index, (name, curve) in enumerate(by_run.items()):
            if not curve:  # an SFT run among distillations has no divergence
                continue
            axis.plot(*zip(*curve, strict=True), label=name, color=f"C{index % 10}",
                      marker="o" if len(curve) < 12 else None, markersize=3)
        axis.set(title=title, xlabel="optimizer step")
        axis.grid(alpha=0.3)
    if len(runs) > 1:
        axes[0][0].legend(fontsize="small")
    return figure


def _curve(lines: Sequence[dict[str, Any]], kind: str, value: str) -> list[tuple[int, float]]:
    return [(line["step"], line[value]) for line in lines if line["kind"] == kind and line.get(value) is not None]


if __name__ == "__main__":
    run_main(main)
