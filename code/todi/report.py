"""Puts the results of several checkpoints side by side in one Markdown table.

    python -m todi.report outputs/student-a/epoch3 outputs/student-b/epoch5 [--names ToDi forward_kl]
    python -m todi.report outputs/student-a/epoch3 --baseline outputs/student-b/epoch5 --output scores.png
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from todi.errors import InputError, collecting, run_main
from todi.evaluation.comparison import compare, comparison_table
from todi.evaluation.results import annotated_table, column_titles, how_made, read_results, tokenizer_of
from todi.options import option, parse
from todi.runtime.logs import set_up_logging

logger = logging.getLogger("todi.report")

_PICTURES = (".png", ".pdf", ".svg")


@dataclass(frozen=True)
class ReportConfig:
    """Puts the results of several checkpoints (folders with eval/results.json) side by side."""

    dirs: tuple[str, ...] = option((), "the folders", flag="dirs")
    names: tuple[str, ...] = option((), "what to call them in the table; the folders' paths when not given")
    baseline: str | None = option(None, "a folder that the others are compared to by a paired bootstrap test")
    output: str | None = option(None, "a bar chart to draw (png, pdf, svg)")


def main() -> None:
    """Reads, compares, prints, draws."""
    config = parse(ReportConfig, prog="python -m todi.report")
    set_up_logging(is_main=True)
    if config.output and Path(config.output).suffix not in _PICTURES:
        raise InputError(f"--output {config.output}: a picture is one of {', '.join(_PICTURES)}")
    results = read_all(config.dirs, config.names)
    comparison = config.baseline and against(config.baseline, dict(zip(results, config.dirs, strict=True)))
    warn_of_differences(results)
    print(annotated_table(results))
    if comparison:
        print(f"\n{comparison}")
    if config.output:
        from todi.evaluation.chart import draw  # a second of imports

        draw(results, Path(config.output))
        logger.info("chart: %s", config.output)


def read_all(folders: Sequence[str], names: Sequence[str] = ()) -> dict[str, Mapping[str, Any]]:
    """The results of each folder by its name.

    Raises:
        InputError: no folder, a folder without results, or names that do not fit the folders.
    """
    names = names or folders
    problems = [] if folders else ["name at least one folder with results"]
    if len(names) != len(folders):
        problems.append(f"--names has {len(names)} names for {len(folders)} folders")
    if len(set(names)) < len(names):
        problems.append(f"two rows would have the same name: {', '.join(names)}")
    results = {}
    for name, folder in zip(names, folders, strict=False):
        with collecting(problems):
            results[name] = read_results(Path(folder))
    if problems:
        raise InputError(problems)
    return results


def against(baseline: str, folders: Mapping[str, str]) -> str:
    """The table of differences between each folder, by its name, and the baseline.

    Raises:
        InputError: there is nothing to compare, or the examples are others.
    """
    names = {folder: name for name, folder in folders.items()}
    problems, rows = [], {}
    for name, folder in folders.items():
        if Path(folder) != Path(baseline):
            with collecting(problems):
                rows[name] = compare(Path(folder), Path(baseline))
    if not rows and not problems:
        problems.append(f"nothing to compare with --baseline {baseline}: name other folders too")
    if problems:
        raise InputError(problems)
    return comparison_table(names.get(baseline, baseline), rows)


def warn_of_differences(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Scores that were not made in the same way do not compare; says in what they differ."""
    settings = [row.get("settings", {}) for row in results.values()]
    keys = dict.fromkeys(key for row in settings for key in row)
    differing = [key for key in keys if any(row.get(key) != settings[0].get(key) for row in settings)]
    for name in column_titles(results):
        tokenizers = {tokenizer_of(row["sets"][name]) for row in results.values() if name in row["sets"]}
        if len(tokenizers) > 1:
            differing.append(f"tokens of {name} ({', '.join(sorted(tokenizers))})")
    if differing:
        logger.warning("the rows do not compare: they were made with different %s", ", ".join(differing))
    elif len({how_made(row) for row in results.values()}) > 1 and settings[0].get("precision") != "fp32":
        logger.warning("the rows were written in other batches, on which some responses depend in half precision")


if __name__ == "__main__":
    run_main(main)
