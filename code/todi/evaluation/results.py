"""What an evaluation leaves behind: eval/<set>/seed<N>.jsonl, eval/results.json, and a table of it.

results.json is {"model", "adapter", "settings", "layouts", "sets": {name: summary}, "average"}. Layouts are in what
batches the responses were written, on which some depend in half precision. A summary has the set's means over all
seeds, "rouge_l_std" (over seeds), "rouge_l_interval" (95 %, over examples), "examples", "loss" (mean cross-entropy of a
token of the first reference), the means of each seed by itself, and "rouge_tokenizer" unless that is rouge_score, as
published. The average has the three of ROUGE-L.
"""

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from todi.errors import InputError
from todi.evaluation.bootstrap import interval
from todi.evaluation.rouge_tokens import PUBLISHED
from todi.generation.writer import Layout
from todi.runtime.storage import write_text
from todi.settings import SET_NAME

RESULTS_FILE = Path("eval", "results.json")
_TOKENIZER = "rouge_tokenizer"


@dataclass(frozen=True)
class Generation:
    """One response with what it was measured against; a line of seed<N>.jsonl.

    Attributes:
        score: ROUGE-L, 0 to 100.
        tokens: length of the response.
        cut: whether the length limit ended it.
    """

    prompt: str
    response: str
    references: tuple[str, ...]
    score: float
    exact_match: bool
    tokens: int
    cut: bool


def is_set_name(name: str) -> bool:
    """Whether `name` is a relative path, spelled plainly, that stays below the folder it is joined to."""
    return re.fullmatch(SET_NAME, name) is not None


def seed_file(folder: Path, set_name: str, seed: int) -> Path:
    """Where the responses of a set with a seed are: eval/<set>/seed<N>.jsonl in `folder`."""
    return folder / "eval" / set_name / f"seed{seed}.jsonl"


def read_generations(folder: Path, set_name: str, seed: int) -> list[Generation]:
    """The responses of a set with a seed. Raises InputError when they are not there or not of this form."""
    file = seed_file(folder, set_name, seed)
    try:
        lines = file.read_text(encoding="utf-8").split("\n")[:-1]
        fields = map(json.loads, lines)
        return [Generation(**line | {"references": tuple(line["references"])}) for line in fields]
    except OSError:
        raise InputError(f"no responses at {file}") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{file} is not a file of responses") from None


def example_scores(by_seed: Mapping[int, Sequence[Generation]]) -> np.ndarray:
    """(examples,) ROUGE-L of each example, the mean over seeds."""
    return np.mean([[generation.score for generation in generations] for generations in by_seed.values()], axis=0)


def summarise(by_seed: Mapping[int, Sequence[Generation]], loss: float | None = None,
              rouge_tokenizer: str = PUBLISHED) -> dict[str, Any]:
    """The entry of a set in results.json.

    Args:
        rouge_tokenizer: what the scores were made with.

    Raises:
        ValueError: the seeds differ in their number of responses.
    """
    sizes = {seed: len(generations) for seed, generations in by_seed.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"the seeds must have as many responses, got {sizes}")
    seeds = {str(seed): _means(generations) for seed, generations in by_seed.items()}
    means = {name: statistics.fmean(values[name] for values in seeds.values())
             for name in ("rouge_l", "exact_match", "response_tokens", "cut_share")}
    deviation = _deviation([values["rouge_l"] for values in seeds.values()])
    return {"examples": len(next(iter(by_seed.values()))), **means, "rouge_l_std": deviation,
            "rouge_l_interval": interval([example_scores(by_seed)]), "loss": loss, "seeds": seeds,
            **named_tokenizer(rouge_tokenizer)}


def named_tokenizer(rouge_tokenizer: str) -> dict[str, str]:
    """The entry "rouge_tokenizer" of what describes scores; none for the published one, the only one there once was."""
    return {} if rouge_tokenizer == PUBLISHED else {_TOKENIZER: rouge_tokenizer}


def tokenizer_of(described: Mapping[str, Any]) -> str:
    """What `named_tokenizer` named."""
    return described.get(_TOKENIZER, PUBLISHED)


def average(sets: Mapping[str, Mapping[str, Any]], scores: Sequence[np.ndarray]) -> dict[str, Any]:
    """The mean over sets, its standard deviation over seeds (each seed averaged over the sets first), its interval.

    Args:
        sets: the summary of each set.
        scores: `example_scores` of each set.
    """
    seeds = next(iter(sets.values()))["seeds"]
    by_seed = [statistics.fmean(summary["seeds"][seed]["rouge_l"] for summary in sets.values())
               for seed in seeds]
    return {"rouge_l": statistics.fmean(by_seed), "rouge_l_std": _deviation(by_seed),
            "rouge_l_interval": interval(scores)}


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Writes eval/results.json in `folder`, and its table, with how it was made, as eval/results.md."""
    (folder / RESULTS_FILE).parent.mkdir(parents=True, exist_ok=True)
    write_text(folder / RESULTS_FILE, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    write_text(folder / RESULTS_FILE.with_suffix(".md"), annotated_table({folder.name: results}) + "\n")


def read_results(folder: Path) -> dict[str, Any]:
    """Reads what `write_results` wrote.

    Raises:
        InputError: it is not there or not of this form.
    """
    path = folder / RESULTS_FILE
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        annotated_table({"": results})
    except OSError:
        raise InputError(f"no results in {folder}: python -m todi.evaluate would write {path}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path} is not a file of results") from None
    return results


def markdown_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Results by name -> a table of ROUGE-L: a row for each, a column for each set that any has, the average.

    A cell is "mean ± standard deviation over seeds [95 % interval over examples]".
    """
    return aligned(result_cells(rows))


def result_cells(rows: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """The cells of `markdown_table`; the first row is its head."""
    sets = column_titles(rows)
    cells = [["ROUGE-L", *sets.values(), "average"]]
    for name, results in rows.items():
        summaries = [results["sets"].get(set_name) for set_name in sets]
        cells.append([name, *map(_score, [*summaries, results["average"]])])
    return cells


def annotated_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """`markdown_table`, and below it the precision and the layouts of each row, or of all where they are the same."""
    made = {name: how_made(results) for name, results in rows.items()}
    notes = [made.popitem()[1]] if len(set(made.values())) == 1 else [f"{name}: {how}" for name, how in made.items()]
    return "\n".join([markdown_table(rows), "", *notes])


def how_made(results: Mapping[str, Any]) -> str:
    """Precision, batch size and number of processes; of results of version 0.1 the precision alone."""
    precision = results.get("settings", {}).get("precision", "precision not noted")
    layouts = " and ".join(str(Layout(**layout)) for layout in results.get("layouts", ()))
    return f"{precision}, {layouts or 'batches of a size that was not noted'}"


def column_titles(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Of each set that any of the results have, its name, and behind it what it was not as published scored with."""
    tokenizers: dict[str, list[str]] = {}
    for results in rows.values():
        for name, summary in results["sets"].items():
            tokenizers.setdefault(name, []).append(tokenizer_of(summary))
    return {name: name if set(found) == {PUBLISHED} else f"{name} ({', '.join(dict.fromkeys(found))})"
            for name, found in tokenizers.items()}


def aligned(cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
             for row in cells]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines)


def _means(generations: Sequence[Generation]) -> dict[str, float]:
    return {
        "rouge_l": statistics.fmean(generation.score for generation in generations),
        "exact_match": 100 * statistics.fmean(generation.exact_match for generation in generations),
        "response_tokens": statistics.fmean(generation.tokens for generation in generations),
        "cut_share": statistics.fmean(generation.cut for generation in generations),
    }


def _deviation(values: Sequence[float]) -> float | None:
    """Sample standard deviation; of a single seed there is none."""
    return statistics.stdev(values) if len(values) > 1 else None


def _score(summary: Mapping[str, Any] | None) -> str:
    if summary is None:
        return "–"
    deviation, limits = summary["rouge_l_std"], summary.get("rouge_l_interval")
    return (f"{summary['rouge_l']:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")
            + (f" [{limits[0]:.2f}, {limits[1]:.2f}]" if limits else ""))
