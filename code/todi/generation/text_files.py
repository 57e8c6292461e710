"""A data set that a model wrote. In its folder lie

    train.jsonl          a line for each response that is kept: all prompts with the first seed, then with the next
    dev.jsonl            that of the prompts' folders, where they have one
    made_with.json       what made the responses and in what batches, which of them are kept, how many that are, and the
                         checksums of the two files
    .unfinished.jsonl    the responses of an interrupted run (todi/generation/unfinished.py)
"""

import dataclasses
import json
import logging
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from todi.data.records import Message, Record
from todi.errors import RunError
from todi.generation.decoding import Response, to_training_texts
from todi.generation.unfinished import UnfinishedFile, made_with_before, read_record
from todi.generation.writer import Layout, Row
from todi.runtime.checksums import UNREAD, file_checksum
from todi.runtime.storage import sweep, write_bytes, write_text

logger = logging.getLogger(__name__)

_TRAIN, _DEV, _RECORD, _UNFINISHED = "train.jsonl", "dev.jsonl", "made_with.json", ".unfinished.jsonl"
_BY_CHECKSUM = {"model": "another model", "adapter": "another adapter", "prompts": "other prompts",
                "dev.jsonl": "another dev.jsonl"}


@dataclass(frozen=True)
class Selection:
    """Which responses are kept, by their length in tokens and by their end."""

    drop_cut: bool = True
    least_tokens: int = 1
    most_tokens: int | None = None

    def reason_against(self, response: Response, text: str) -> str | None:
        """Why a response is left out, the first reason of several; None for one that is kept."""
        if self.drop_cut and response.cut:
            return "cut"
        if not text.strip():  # training reads none, and could learn from it only to be silent
            return "empty"
        if len(response.ids) < self.least_tokens:
            return "too short"
        if self.most_tokens is not None and len(response.ids) > self.most_tokens:
            return "too long"
        return None


class TextFolder:
    """The files of such a set, whoever wrote them.

    Args:
        made_with: whatever a response depends on, by name; JSON values.
        dev: the contents of dev.jsonl; without any there is none.
        layout: in what batches responses are written now.
    """

    def __init__(self, folder: Path, made_with: Mapping[str, Any], selection: Selection, dev: bytes, layout: Layout):
        self._folder, self._made_with, self._selection, self._dev = folder, dict(made_with), selection, dev
        self._unfinished = UnfinishedFile(folder / _UNFINISHED, made_with, layout)
        record = read_record(folder / _RECORD)
        self._record = record if {"made_with", "selection", "files"} <= record.keys() else {}  # else it is of others

    @property
    def finished(self) -> bool:
        """Whether all of it is there."""
        return bool(self._record) and all((self._folder / name).is_file() for name in self._record["files"])

    @property
    def rows(self) -> Mapping[Row, Response]:
        """What an interrupted run has written."""
        return self._unfinished.rows

    def refusal(self) -> str | None:
        """Why nothing may be written here, in a sentence; None where it may."""
        differences = list(self._differences())
        if differences:
            return (f"{self._folder} holds text that was made with {'; '.join(differences)}. Choose another "
                    "--save-dir (TEXT_DIR), or remove that folder")
        foreign = [name for name in (_TRAIN, _DEV, _RECORD) if (self._folder / name).exists()]
        if foreign and not self._record and self._unfinished.earlier_with is None:
            return (f"{self._folder} has a {foreign[0]} that was not written by todi.generate; choose another "
                    "--save-dir (TEXT_DIR)")
        return None

    def begin(self) -> None:
        """Tidies up after a run that was killed, and says so of files that were changed since."""
        sweep(self._folder)
        if self.finished:
            self._unfinished.remove()
            for name, checksum in self._record["files"].items():
                if file_checksum(self._folder / name) != checksum:
                    logger.warning("warning: %s was changed after it was written", self._folder / name)

    def add(self, responses: Mapping[Row, Response]) -> None:
        """Keeps the responses of a round, in case the run is interrupted."""
        self._unfinished.add(responses)

    def finish(self, records: Sequence[Record], seeds: Sequence[int], responses: Mapping[Row, Response],
               tokenizer: Tokenizer) -> dict[str, Any]:
        """Writes the set, and only then says that it is there.

        Returns:
            what made_with.json has under "responses".

        Raises:
            RunError: none of the responses is kept. What was written can be gone on with, with another selection.
        """
        rows = [(seed, index) for seed in seeds for index in range(len(records))]
        written = [responses[row] for row in rows]
        texts = to_training_texts(written, tokenizer)
        reasons = list(map(self._selection.reason_against, written, texts))
        summary = summarise(written, reasons)
        if not summary["kept"]:
            raise RunError(f"no response is kept of {describe(summary)}; --no-drop-cut, --least-tokens and "
                           "--most-tokens choose from what was written, a larger --max-length leaves more room")
        kept = [_line(records[index], text) for (_, index), text, reason in zip(rows, texts, reasons, strict=True)
                if reason is None]
        contents = {_TRAIN: "".join(kept).encode()} | ({_DEV: self._dev} if self._dev else {})
        for name, content in contents.items():
            write_bytes(self._folder / name, content)
        layouts = [layout._asdict() for layout in dict.fromkeys(self._unfinished.layouts)]
        self._record = {
            "made_with": self._made_with, "selection": dataclasses.asdict(self._selection), "layouts": layouts,
            "responses": summary, "files": {name: file_checksum(self._folder / name) for name in contents}}
        write_text(self._folder / _RECORD, json.dumps(self._record, indent=2) + "\n")
        self._unfinished.remove()
        return summary

    def _differences(self) -> Iterator[str]:
        """How what is there was made otherwise, a clause each; of what is `UNREAD`, that it was not there at all."""
        now: dict[str, Any] = dict(self._made_with)
        if self._record:
            then = self._record["made_with"] | self._record["selection"]
            now |= dataclasses.asdict(self._selection)
        else:
            then = self._unfinished.earlier_with or now
        for name in {**then, **now}:
            if then.get(name) != now.get(name) and not (then.get(name) and now.get(name) == UNREAD):
                yield _BY_CHECKSUM.get(name) or f"{name} {then.get(name)}, where this run has {now.get(name)}"


def earlier_date(folder: Path) -> str | None:
    """The date of the chat template with which text there, finished or not, was written; None where there is none."""
    found = (made_with.get("template_date") for made_with in made_with_before(folder / _RECORD, folder / _UNFINISHED))
    return next(filter(None, found), None)


def summarise(written: Sequence[Response], reasons: Sequence[str | None]) -> dict[str, Any]:
    """How many responses there are, how many are kept, how many are left out by which reason; the share that the length
    limit cut off, and the mean length of those that are kept, in tokens."""
    lengths = [len(response.ids) for response, reason in zip(written, reasons, strict=True) if reason is None]
    dropped = Counter(filter(None, reasons))
    return {"written": len(written), "kept": len(lengths), "dropped": dict(sorted(dropped.items())),
            "mean_tokens": statistics.fmean(lengths) if lengths else None,
            "cut_share": statistics.fmean(response.cut for response in written)}


def describe(summary: Mapping[str, Any]) -> str:
    """Its numbers in words: '12 (3 cut, 1 empty)'."""
    dropped = ", ".join(f"{count} {reason}" for reason, count in summary["dropped"].items())
    return f"{summary['written']}" + (f" ({dropped})" if dropped else "")


def _line(record: Record, text: str) -> str:
    """The line of a prompt and its response, as training reads it."""
    if record.messages:
        turns = [*record.messages, Message("assistant", text)]
        fields: dict[str, Any] = {"messages": [dataclasses.asdict(turn) for turn in turns]}
    else:
        fields = {"prompt": record.prompt, "output": text}
    return json.dumps(fields, ensure_ascii=False) + "\n"
