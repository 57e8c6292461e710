"""What is done of a set already, so that an interrupted evaluation goes on where it was. In eval/<set>/ lie

    seed<N>.jsonl        the responses of a finished seed
    made_with.json       what made them (settings, checksums of model and data), in what batches, their checksums, and
                         the set's loss
    .unfinished.jsonl    the responses of an interrupted run (todi/generation/unfinished.py)
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from todi.evaluation.results import Generation, read_generations, seed_file
from todi.generation.decoding import Response
from todi.generation.unfinished import UnfinishedFile, made_with_before, make_folder, read_record
from todi.generation.writer import Layout, Row
from todi.runtime.checksums import file_checksum
from todi.runtime.storage import write_text

_RECORD, _UNFINISHED = "made_with.json", ".unfinished.jsonl"


@dataclass(frozen=True)
class Done:
    """What there is of a set.

    Attributes:
        seeds: the finished ones.
        loss: None where it was not computed.
        rows: what an interrupted run has written of the others.
    """

    seeds: tuple[int, ...] = ()
    loss: float | None = None
    rows: Mapping[Row, Response] = field(default_factory=dict)


class SetStore:
    """The files of one set. Results that were made with anything else than `made_with` count as not there.

    Args:
        folder: of the checkpoint, or --save-dir.
        made_with: whatever a response depends on, by name; JSON values.
        layout: in what batches responses are written now.
    """

    def __init__(self, folder: Path, set_name: str, made_with: Mapping[str, Any], layout: Layout):
        self._folder, self._set_name, self._made_with = folder, set_name, dict(made_with)
        self._record_file = folder / "eval" / set_name / _RECORD
        unfinished_file = self._record_file.with_name(_UNFINISHED)
        self._unfinished = UnfinishedFile(unfinished_file, made_with, layout)
        self._record = read_record(self._record_file)
        # Names of what earlier results were made with otherwise.
        self.differences = sorted({name for other in made_with_before(self._record_file, unfinished_file)
                                   for name in other.keys() | self._made_with.keys()
                                   if other.get(name) != self._made_with.get(name)})
        if self._record.get("made_with") != self._made_with:
            self._record = {"made_with": self._made_with, "loss": None, "seeds": {}}

    def done(self, seeds: Sequence[int]) -> Done:
        """What of `seeds` need not be done again; a seed whose file was touched since is not finished."""
        finished = tuple(seed for seed in seeds if self._is_whole(seed))
        return Done(finished, self._record["loss"], self._unfinished.rows)

    def add(self, responses: Mapping[Row, Response]) -> None:
        """Keeps the responses of a round, in case the run is interrupted before the set is done."""
        self._unfinished.add(responses)

    def finish(self, by_seed: Mapping[int, Sequence[Generation]], loss: float) -> None:
        """Writes the files of finished seeds, and only then says that they are there."""
        make_folder(self._record_file.parent)
        for seed, generations in by_seed.items():
            file = seed_file(self._folder, self._set_name, seed)
            lines = (json.dumps(dataclasses.asdict(generation), ensure_ascii=False) for generation in generations)
            write_text(file, "\n".join(lines) + "\n")
            self._record["seeds"][str(seed)] = file_checksum(file)
            layouts = dict.fromkeys(self._unfinished.layouts)  # each once
            self._record.setdefault("layouts", {})[str(seed)] = [layout._asdict() for layout in layouts]
        self._record["loss"] = loss
        write_text(self._record_file, json.dumps(self._record, indent=2) + "\n")
        self._unfinished.remove()

    def generations(self, seeds: Sequence[int]) -> dict[int, list[Generation]]:
        """The scored responses of finished seeds."""
        return {seed: read_generations(self._folder, self._set_name, seed) for seed in seeds}

    def layouts(self, seeds: Sequence[int]) -> set[Layout]:
        """In what batches they were written, where that was noted."""
        noted = self._record.get("layouts", {})
        return {Layout(**layout) for seed in seeds for layout in noted.get(str(seed), ())}

    def _is_whole(self, seed: int) -> bool:
        file = seed_file(self._folder, self._set_name, seed)
        return file.is_file() and self._record["seeds"].get(str(seed)) == file_checksum(file)


def earlier_value(folder: Path, set_names: Sequence[str], name: str) -> Any:
    """What the results of any of these sets, finished or not, were made with by the name of `name`; None if nothing."""
    for place in (folder / "eval" / set_name for set_name in set_names):
        for made_with in made_with_before(place / _RECORD, place / _UNFINISHED):
            if name in made_with:
                return made_with[name]
    return None
