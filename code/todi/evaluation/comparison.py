"""Checkpoints against a baseline on the same examples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from todi.errors import InputError, collecting
from todi.evaluation.bootstrap import Difference, paired_difference
from todi.evaluation.results import aligned, example_scores, read_generations, read_results, tokenizer_of

AVERAGE = "average"


@dataclass(frozen=True)
class _Scored:
    """A set of a checkpoint: what each example asks and expects, and its score, the mean over seeds."""

    folder: Path
    tokenizer: str
    seeds: Sequence[str]
    examples: Sequence[object]
    scores: np.ndarray


def compare(folder: Path, baseline: Path) -> dict[str, Difference]:
    """ROUGE-L of `folder` less that of `baseline` by set, and under "average" over the sets.

    Raises:
        InputError: no results, or they are of other sets, seeds or examples, or were scored by other tokens.
    """
    ours, theirs = _read(folder), _read(baseline)
    if ours.keys() != theirs.keys():
        raise InputError(f"{folder} has the sets {', '.join(ours)}, the baseline {baseline} {', '.join(theirs)}: "
                         "only the same sets compare")
    problems = []
    for name in ours:
        with collecting(problems):
            _check_pairing(name, ours[name], theirs[name])
    if problems:
        raise InputError(problems)
    pairs = {name: (ours[name].scores, theirs[name].scores) for name in ours}
    by_set = {name: paired_difference([mine], [other]) for name, (mine, other) in pairs.items()}
    return by_set | {AVERAGE: paired_difference(*zip(*pairs.values(), strict=True))}


def comparison_table(baseline: str, rows: Mapping[str, Mapping[str, Difference]]) -> str:
    """Differences by name and set -> a Markdown table."""
    columns = next(iter(rows.values()))
    return aligned([[f"less {baseline}", *columns],
                    *([name, *(_cell(differences[column]) for column in columns)]
                      for name, differences in rows.items())])


def _read(folder: Path) -> dict[str, _Scored]:
    found = {}
    for name, summary in read_results(folder)["sets"].items():
        by_seed = {seed: read_generations(folder, name, int(seed)) for seed in summary["seeds"]}
        examples = [(line.prompt, line.references) for line in next(iter(by_seed.values()))]
        found[name] = _Scored(folder, tokenizer_of(summary), list(by_seed), examples, example_scores(by_seed))
    return found


def _check_pairing(name: str, ours: _Scored, theirs: _Scored) -> None:
    folder, baseline = ours.folder, theirs.folder
    if ours.tokenizer != theirs.tokenizer:
        raise InputError(f"{name}: {folder} has ROUGE-L by {ours.tokenizer}, the baseline {baseline} by "
                         f"{theirs.tokenizer}")
    if sorted(ours.seeds) != sorted(theirs.seeds):
        raise InputError(f"{name}: {folder} has the seeds {', '.join(ours.seeds)}, the baseline {baseline} "
                         f"{', '.join(theirs.seeds)}")
    if len(ours.examples) != len(theirs.examples):
        raise InputError(f"{name}: {folder} has {len(ours.examples)} examples, the baseline {baseline} "
                         f"{len(theirs.examples)}")
    differing = sum(mine != other for mine, other in zip(ours.examples, theirs.examples, strict=True))
    if differing:
        raise InputError(f"{name}: {differing} of {len(ours.examples)} examples of {folder} are others in the baseline "
                         f"{baseline}")


def _cell(difference: Difference) -> str:
    text = f"{difference.mean:+.2f}"
    if difference.interval:
        low, high = difference.interval
        text += f" [{low:+.2f}, {high:+.2f}] p = {difference.p_value:.4f}"
    return text
