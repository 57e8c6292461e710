"""What `todi.distil` and `todi.evaluate` return: it shows itself in a notebook as tables and curves."""

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from todi.evaluation.results import aligned, markdown_table, result_cells
from todi.finding import best_of_run
from todi.plot import figure_of, read_metrics


class Evaluation:
    """Scores of a model.

    Attributes:
        folder: that eval/ is in.
        results: what eval/results.json holds (todi/evaluation/results.py).
    """

    def __init__(self, folder: Path, results: Mapping[str, Any]):
        self.folder = folder
        self.results = results

    @property
    def scores(self) -> dict[str, float]:
        """ROUGE-L, 0 to 100, of each set and their average."""
        sets = {name: summary["rouge_l"] for name, summary in self.results["sets"].items()}
        return sets | {"average": self.results["average"]["rouge_l"]}

    def __repr__(self) -> str:
        return markdown_table({self.folder.name: self.results})

    def _repr_html_(self) -> str:
        return html_table(result_cells({self.folder.name: self.results}))


class Result:
    """A training run, finished or stopped.

    Attributes:
        folder: of the run.
        best: the checkpoint with the best score on dev; None where there is none yet.
        metrics: the lines of metrics.jsonl: each has `kind` (train, dev, skipped), `step` and values by name.
        stopped: what stopped it, in words; None for a run that has finished.
    """

    def __init__(self, folder: Path, stopped: str | None, evaluate: Callable[..., Evaluation],
                 settings: Mapping[str, Any]):
        self.folder = folder
        self.stopped = stopped
        self._evaluate = evaluate
        self._settings = settings

    @cached_property
    def best(self) -> Path | None:
        return best_of_run(self.folder)

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        file = self.folder / "metrics.jsonl"
        return read_metrics(self.folder) if file.is_file() and file.stat().st_size else []

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The metrics of one kind."""
        return [line for line in self.metrics if line["kind"] == kind]

    def evaluate(self, sets: Any = None, **settings: Any) -> Evaluation:
        """`todi.evaluate` of the best checkpoint, with the lengths that it was trained with unless others are given."""
        return self._evaluate(self.best, sets=sets, **{**self._settings, **settings})

    def __repr__(self) -> str:
        return "\n".join([self._headline, aligned(self._cells)])

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self._headline)}</p>{html_table(self._cells)}{self._curves()}"

    @property
    def _headline(self) -> str:
        state = f"{self.stopped}" if self.stopped else "finished"
        return f"{self.folder}: {state}. Best checkpoint: {self.best.name if self.best else 'none yet'}"

    @property
    def _cells(self) -> list[list[str]]:
        """A row for each evaluation on dev, beside the newest training losses since the last one; at its end those that
        no evaluation has followed yet."""
        rows, train = [], {}
        for line in self.metrics:
            if line["kind"] == "train":
                train = line
            elif line["kind"] == "dev":
                rows.append((line["epoch"], line["step"], train, line))
                train = {}
        if train:
            rows.append((train["epoch"], train["step"], train, {}))
        return [["epoch", "step", "loss", "divergence", "cross-entropy", "dev loss", "dev ROUGE-L"],
                *([str(epoch), str(step), *(_number(train.get(name), 4) for name in ("loss", "kd", "ce")),
                   _number(dev.get("loss"), 4), _number(dev.get("rouge_l"), 2)] for epoch, step, train, dev in rows)]

    def _curves(self) -> str:
        if not self.metrics:
            return ""
        picture = io.BytesIO()
        figure_of({self.folder.name: self.metrics}).savefig(picture, format="png", dpi=90)
        encoded = base64.b64encode(picture.getvalue()).decode()
        return f'<img alt="training curves" src="data:image/png;base64,{encoded}">'


def html_table(cells: Sequence[Sequence[str]]) -> str:
    """The first row is its head."""
    rows = ["".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
            for tag, row in zip(["th", *["td"] * len(cells)], cells, strict=False)]
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
