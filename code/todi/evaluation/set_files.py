"""What is done of a set already, so that an interrupted evaluation goes on where it was. In eval/<set>/ lie

    seed<N>.jsonl        the responses of a finished seed
    made_with.json       what made them (settings, checksums of model and data), in what batches, their checksums, and
                         the set's loss
    .unfinished.jsonl    the responses of an interrupted run: what makes them, then a line for each round; an object
                         among these lines says in what batches those after it were written
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from todi.evaluation.results import Generation, Layout, read_generations, seed_file
from todi.generation.decoding import Response
from todi.runtime.checksums import file_checksum
from todi.runtime.storage import write_text, writing

_MODEL_FILES = {".safetensors", ".bin", ".gguf", ".json", ".jinja", ".model", ".txt"}
_RECORD, _UNFINISHED = "made_with.json", ".unfinished.jsonl"

Row = tuple[int, int]  # seed, index of the record


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
        layout: in what batches responses are written now. Others are no reason to write them again, though in half
            precision some would differ.
    """

    def __init__(self, folder: Path, set_name: str, made_with: Mapping[str, Any], layout: Layout):
        self._folder, self._set_name, self._made_with = folder, set_name, dict(made_with)
        self._record_file = folder / "eval" / set_name / _RECORD
        self._unfinished_file = self._record_file.with_name(_UNFINISHED)
        self._record = _read_record(self._record_file)
        unfinished_with, self._rows, self._layouts = _read_unfinished(self._unfinished_file)
        earlier = [made_with for made_with in (self._record.get("made_with"), unfinished_with) if made_with]
        # Names of what earlier results were made with otherwise.
        self.differences = sorted({name for other in earlier for name in other.keys() | self._made_with.keys()
                                   if other.get(name) != self._made_with.get(name)})
        if self._record.get("made_with") != self._made_with:
            self._record = {"made_with": self._made_with, "loss": None, "seeds": {}}
        self._goes_on = unfinished_with == self._made_with
        if not self._goes_on:
            self._rows, self._layouts = {}, []
        self._layout = layout

    def done(self, seeds: Sequence[int]) -> Done:
        """What of `seeds` need not be done again; a seed whose file was touched since is not finished."""
        finished = tuple(seed for seed in seeds if self._is_whole(seed))
        return Done(finished, self._record["loss"], self._rows)

    def add(self, responses: Mapping[Row, Response]) -> None:
        """Keeps the responses of a round, in case the run is interrupted before the set is done."""
        if not self._goes_on:
            self._make_folder()
            write_text(self._unfinished_file, json.dumps(self._made_with))
            self._goes_on = True
        lines = [json.dumps([[*row, response.ids, response.cut] for row, response in responses.items()])]
        if self._layouts[-1:] != [self._layout]:
            self._layouts.append(self._layout)
            lines.insert(0, json.dumps(self._layout._asdict()))
        with writing(self._unfinished_file), self._unfinished_file.open("a", encoding="utf-8") as file:
            file.writelines("\n" + line for line in lines)  # so that a line torn by an interruption spoils no other

    def finish(self, by_seed: Mapping[int, Sequence[Generation]], loss: float) -> None:
        """Writes the files of finished seeds, and only then says that they are there."""
        self._make_folder()
        for seed, generations in by_seed.items():
            file = seed_file(self._folder, self._set_name, seed)
            lines = (json.dumps(dataclasses.asdict(generation), ensure_ascii=False) for generation in generations)
            write_text(file, "\n".join(lines) + "\n")
            self._record["seeds"][str(seed)] = file_checksum(file)
            layouts = dict.fromkeys(self._layouts)  # each once
            self._record.setdefault("layouts", {})[str(seed)] = [layout._asdict() for layout in layouts]
        self._record["loss"] = loss
        write_text(self._record_file, json.dumps(self._record, indent=2) + "\n")
        self._unfinished_file.unlink(missing_ok=True)

    def generations(self, seeds: Sequence[int]) -> dict[int, list[Generation]]:
        """The scored responses of finished seeds."""
        return {seed: read_generations(self._folder, self._set_name, seed) for seed in seeds}

    def layouts(self, seeds: Sequence[int]) -> set[Layout]:
        """In what batches they were written, where that was noted."""
        noted = self._record.get("layouts", {})
        return {Layout(**layout) for seed in seeds for layout in noted.get(str(seed), ())}

    def _make_folder(self) -> None:
        with writing(self._record_file.parent):
            self._record_file.parent.mkdir(parents=True, exist_ok=True)

    def _is_whole(self, seed: int) -> bool:
        file = seed_file(self._folder, self._set_name, seed)
        return file.is_file() and self._record["seeds"].get(str(seed)) == file_checksum(file)


def earlier_value(folder: Path, set_names: Sequence[str], name: str) -> Any:
    """What the results of any of these sets, finished or not, were made with by the name of `name`; None if nothing."""
    for place in (folder / "eval" / set_name for set_name in set_names):
        finished = _read_record(place / _RECORD).get("made_with")
        for made_with in (finished, _read_unfinished(place / _UNFINISHED)[0]):
            if made_with and name in made_with:
                return made_with[name]
    return None


def _read_record(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _read_unfinished(file: Path) -> tuple[dict[str, Any] | None, dict[Row, Response], list[Layout]]:
    """What makes the responses, those there are, and in what batches they were written, one after the other."""
    if not file.is_file():
        return None, {}, []
    header, *lines = file.read_text(encoding="utf-8").split("\n")
    rows, layouts = {}, []
    for line in lines:
        try:
            found = json.loads(line)
        except ValueError:  # torn
            continue
        if isinstance(found, dict):
            layouts.append(Layout(**found))
        else:
            rows |= {(seed, index): Response(ids, cut) for seed, index, ids, cut in found}
    return json.loads(header), rows, layouts
