"""Checkpoints against a baseline on the same examples."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from todi.errors import InputError, collecting
from todi.evaluation.bootstrap import Difference, paired_difference
from todi.evaluation.results import aligned, example_scores, read_generations, read_results

AVERAGE = "average"


def compare(folder: Path, baseline: Path) -> dict[str, Difference]:
    """ROUGE-L of `folder` less that of `baseline` by set, and under "average" over the sets.

    Raises:
        InputError: no results, or they are of other sets, seeds or examples.
    """
    ours, theirs = _scores(folder), _scores(baseline)
    if ours.keys() != theirs.keys():
        raise InputError(f"{folder} has the sets {', '.join(ours)}, the baseline {baseline} {', '.join(theirs)}: "
                         "only the same sets compare")
    problems = []
    for name in ours:
        with collecting(problems):
            _check_pairing(name, (folder, *ours[name][:2]), (baseline, *theirs[name][:2]))
    if problems:
        raise InputError(problems)
    pairs = {name: (ours[name][2], theirs[name][2]) for name in ours}
    by_set = {name: paired_difference([mine], [other]) for name, (mine, other) in pairs.items()}
    return by_set | {AVERAGE: paired_difference(*zip(*pairs.values(), strict=True))}


def comparison_table(baseline: str, rows: Mapping[str, Mapping[str, Difference]]) -> str:
    """Differences by name and set -> a Markdown table."""
    columns = next(iter(rows.values()))
    return aligned([[f"less {baseline}", *columns],
                    *([name, *(_cell(differences[column]) for column in columns)]
                      for name, differences in rows.items())])


def _scores(folder: Path) -> dict[str, tuple[Sequence[str], Sequence[object], np.ndarray]]:
    """By set: the seeds, what each example asks and expects, and its score."""
    found = {}
    for name, summary in read_results(folder)["sets"].items():
        by_seed = {seed: read_generations(folder, name, int(seed)) for seed in summary["seeds"]}
        examples = [(line.prompt, line.references) for line in next(iter(by_seed.values()))]
        found[name] = (list(by_seed), examples, example_scores(by_seed))
    return found


def _check_pairing(name: str, ours: tuple[Path, Sequence[str], Sequence[object]],
                   theirs: tuple[Path, Sequence[str], Sequence[object]]) -> None:
    (folder, seeds, examples), (baseline, other_seeds, other_examples) = ours, theirs
    if sorted(seeds) != sorted(other_seeds):
        raise InputError(f"{name}: {folder} has the seeds {', '.join(seeds)}, the baseline {baseline} "
                         f"{', '.join(other_seeds)}")
    if len(examples) != len(other_examples):
        raise InputError(f"{name}: {folder} has {len(examples)} examples, the baseline {baseline} "
                         f"{len(other_examples)}")
    differing = sum(mine != other for mine, other in zip(examples, other_examples, strict=True))
    if differing:
        raise InputError(f"{name}: {differing} of {len(examples)} examples of {folder} are others in the baseline "
                         f"{baseline}")


def _cell(difference: Difference) -> str:
    text = f"{difference.mean:+.2f}"
    if difference.interval:
        low, high = difference.interval
        text += f" [{low:+.2f}, {high:+.2f}] p = {difference.p_value:.4f}"
    return text
