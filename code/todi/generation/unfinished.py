"""The responses of an interrupted run, so that the same run goes on where it was.

The file has, a line each, what makes the responses, then the responses of each round; an object among these lines says
in what batches those after it were written.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from todi.generation.decoding import Response
from todi.generation.writer import Layout, Row
from todi.runtime.storage import write_text, writing


class UnfinishedFile:
    """Such a file, be it there or not. Rows that were made with anything else than `made_with` count as not there.

    Args:
        made_with: whatever a response depends on, by name; JSON values.
        layout: in what batches responses are written now. Others are no reason to write them again, though in half
            precision some would differ.

    Attributes:
        earlier_with: what makes the rows that the file has; None without one.
        rows: those that can be gone on with.
        layouts: in what batches they were written, one after the other.
    """

    def __init__(self, file: Path, made_with: Mapping[str, Any], layout: Layout):
        self._file, self._made_with, self._layout = file, dict(made_with), layout
        self.earlier_with, self.rows, self.layouts = _read(file)
        self._goes_on = self.earlier_with == self._made_with
        if not self._goes_on:
            self.rows, self.layouts = {}, []

    def add(self, responses: Mapping[Row, Response]) -> None:
        """Keeps the responses of a round."""
        if not self._goes_on:
            make_folder(self._file.parent)
            write_text(self._file, json.dumps(self._made_with))
            self._goes_on = True
        lines = [json.dumps([[*row, response.ids, response.cut] for row, response in responses.items()])]
        if self.layouts[-1:] != [self._layout]:
            self.layouts.append(self._layout)
            lines.insert(0, json.dumps(self._layout._asdict()))
        with writing(self._file), self._file.open("a", encoding="utf-8") as file:
            file.writelines("\n" + line for line in lines)  # so that a line torn by an interruption spoils no other

    def remove(self) -> None:
        """What was written is elsewhere."""
        self._file.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it. Raises StorageError where it cannot be made."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def read_record(file: Path) -> dict[str, Any]:
    """What a made_with.json holds; nothing where it is not there or of another form."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def made_with_before(record_file: Path, unfinished_file: Path) -> list[dict[str, Any]]:
    """What responses that lie there were made with: the finished ones, then the unfinished, where there are any."""
    found = (read_record(record_file).get("made_with"), _read(unfinished_file)[0])
    return [made_with for made_with in found if made_with]


def _read(file: Path) -> tuple[dict[str, Any] | None, dict[Row, Response], list[Layout]]:
    """What makes the responses, those there are, and in what batches they were written."""
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
