"""ROUGE-L of several checkpoints as bars."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws files, needs no screen
import matplotlib.pyplot as plt

from todi.evaluation.results import column_titles


def draw(rows: Mapping[str, Mapping[str, Any]], output: Path) -> None:
    """Results by name -> a group of bars for each set and the average, with 95 % intervals over examples.

    Args:
        output: the picture to write; png, pdf or svg.
    """
    titles = column_titles(rows) | {"average": "average"}
    groups = list(titles)
    figure, axis = plt.subplots(figsize=(1.5 + 0.35 * len(groups) * (len(rows) + 1), 3.8), layout="constrained")
    width = 0.8 / len(rows)
    for index, (name, results) in enumerate(rows.items()):
        summaries = [results["average"] if group == "average" else results["sets"].get(group) for group in groups]
        shown = [(place + (index - (len(rows) - 1) / 2) * width, summary)
                 for place, summary in enumerate(summaries) if summary]
        axis.bar([place for place, _ in shown], [summary["rouge_l"] for _, summary in shown], width, label=name,
                 color=f"C{index % 10}", yerr=list(zip(*(_reach(summary) for _, summary in shown), strict=True)),
                 capsize=2, error_kw={"linewidth": 1})
    axis.set_xticks(range(len(groups)), titles.values())
    axis.set(ylabel="ROUGE-L, with its 95 % interval", ylim=(0, None))
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    if len(rows) > 1:
        figure.legend(loc="outside upper center", ncols=min(len(rows), 3), fontsize="small")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=130)
    plt.close(figure)


def _reach(summary: Mapping[str, Any]) -> tuple[float, float]:
    """How far the interval reaches below and above the mean."""
    limits = summary.get("rouge_l_interval")
    return (summary["rouge_l"] - limits[0], limits[1] - summary["rouge_l"]) if limits else (0.0, 0.0)
