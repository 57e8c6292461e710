"""Puts the results of several checkpoints side by side in one Markdown table.

    python -m todi.report outputs/student-a/epoch3 outputs/student-b/epoch5 [--names ToDi forward_kl]
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from todi.engine.logs import set_up_logging
from todi.evaluation.results import markdown_table, read_results
from todi.options import InputError, option, parse, run_main

logger = logging.getLogger("todi.report")


@dataclass(frozen=True)
class ReportConfig:
    """Puts the results of several checkpoints (folders with eval/results.json) side by side."""

    dirs: tuple[str, ...] = option((), "the folders", flag="dirs")
    names: tuple[str, ...] = option((), "what to call them in the table; the folders' paths when not given")


def main() -> None:
    """Reads, compares, prints."""
    config = parse(ReportConfig, prog="python -m todi.report")
    set_up_logging(is_main=True)
    print(report(config.dirs, config.names))


def report(folders: Sequence[str], names: Sequence[str] = ()) -> str:
    """The table: a row for each folder, a column for each set that any of them has, and the average.

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
        try:
            results[name] = read_results(Path(folder))
        except InputError as error:
            problems.extend(error.problems)
    if problems:
        raise InputError(problems)
    _warn_of_differences(results)
    return markdown_table(results)


def _warn_of_differences(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Scores that were not made in the same way do not compare; says in what they differ."""
    settings = [row.get("settings", {}) for row in results.values()]
    keys = dict.fromkeys(key for row in settings for key in row)
    differing = [key for key in keys if any(row.get(key) != settings[0].get(key) for row in settings)]
    if differing:
        logger.warning("the rows do not compare: they were made with different %s", ", ".join(differing))


if __name__ == "__main__":
    run_main(main)
