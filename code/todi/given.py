"""What a caller of the library hands over as objects, as the files that a run reads.

A run notes what it was made from, resumes, and its LoRA adapter names its base: all of that needs files that stay. So
models, tokenizers and records are written into inputs/ of the run's folder, each under a name that its contents give
it: the same again is the same file, and nothing that an earlier run was made from is ever written over.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike, fspath
from os.path import isdir
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from todi.data.records import parse_record, readable
from todi.errors import InputError
from todi.evaluation.results import is_set_name
from todi.runtime.checksums import file_checksum, value_checksum
from todi.runtime.distributed import World
from todi.runtime.storage import writing

DEV_SHARE = 10  # of records without a dev set every tenth is kept apart

_FORMS = "dicts with prompt and output or with messages"

Records = Iterable[Mapping[str, Any]]  # a list of dicts, a datasets.Dataset, anything that yields rows
Path_ = str | PathLike


def is_path(value: Any) -> bool:
    """Whether it names files instead of being what they hold."""
    return isinstance(value, (str, PathLike))


def model_path(model: Path_ | PreTrainedModel, tokenizer: Tokenizer | None, place: Path, kind: str) -> str:
    """The path of a model: its own, or a folder in `place` that it is written into.

    Args:
        tokenizer: of a loaded model; what it was loaded from has one when not given.
        kind: what to call the folder: student, teacher.

    Raises:
        InputError: it is neither a path nor a model that can be written.
    """
    if is_path(model):
        return fspath(model)
    if isinstance(model, PeftModel):
        adapter = {"student": 'peft_path (with peft="lora")', "teacher": "teacher_peft_path"}.get(kind, "the model")
        raise InputError(f"{kind}: a model with an adapter in it; give paths, the adapter's as {adapter}, or merge it "
                         "first: model.merge_and_unload()")
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"{kind} must be a path, a Hub name or a transformers model, got a {type(model).__name__}")
    tokenizer = tokenizer or _own_tokenizer(model, kind)

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return str(_named_by_contents(place, kind, write))


def data_folders(data: Any, place: Path, responses: bool = True) -> list[str]:
    """The folders with train.jsonl and dev.jsonl: those that `data` names, or one in `place` with what it holds.

    Args:
        data: a folder or several; {"train": records, "dev": records}, where "validation" and "test" stand for dev; or
            the records of train, every tenth of which is kept apart as dev.
        responses: whether the records of train need them; those of dev do.

    Raises:
        InputError: it is none of these.
    """
    if is_path(data):
        return [fspath(data)]
    if isinstance(data, Sequence) and data and all(map(is_path, data)):
        if not any(map(isdir, data)):
            raise InputError(f"data: a list of text is a list of folders, and none of these is one, the first: "
                             f"{fspath(data[0])!r}; records are {_FORMS}")
        return list(map(fspath, data))
    splits = _splits(data, responses)
    return [str(_named_by_contents(place, "data", lambda folder: _write_splits(folder, splits)))]


def sets_folder(sets: Mapping[str, Records], place: Path) -> str:
    """A folder in `place` with a folder for each set of records by its name. Raises InputError for a bad name."""
    if bad := [name for name in sets if not is_set_name(name)]:
        raise InputError(f"sets: {', '.join(map(repr, bad))} cannot be the name of a folder")

    def write(folder: Path) -> None:
        for name, records in sets.items():
            _write_splits(folder / name, {"valid": rows_of(records, f"sets[{name!r}]")})

    return str(_named_by_contents(place, "sets", write))


def on_first_rank(world: World, make: Callable[[], Any]) -> Any:
    """What `make` returns on the first rank, on every rank; so does the InputError that it raises."""
    outcome = None
    if world.is_main:
        try:
            outcome = make()
        except InputError as error:
            outcome = error
    outcome = world.from_main(outcome)
    if isinstance(outcome, InputError):
        raise outcome
    return outcome


def rows_of(records: Records, what: str, responses: bool = True) -> list[dict[str, Any]]:
    """Records as plain dicts. Raises InputError where they are anything else, with every bad one by its number."""
    rows = list(records) if isinstance(records, Iterable) and not isinstance(records, Mapping) else None
    if not rows or not all(isinstance(row, Mapping) for row in rows):
        raise InputError(f"{what} must be records, {_FORMS}; got {_described(records)}")
    problems = []
    for number, row in enumerate(rows):
        try:
            parse_record(_as_line(row).encode(), responses)
        except ValueError as error:
            problems.append(f"{what}[{number}]: {error}")
    if problems:
        raise InputError(readable(problems, f"{what}: {{}} more bad records"))
    return [dict(row) for row in rows]


def _splits(data: Any, responses: bool) -> dict[str, list[dict[str, Any]]]:
    if isinstance(data, Mapping):
        dev = next((name for name in ("dev", "validation", "test") if name in data), None)
        if "train" not in data or dev is None:
            raise InputError(f'data must have "train" and "dev", got {", ".join(map(repr, data)) or "nothing"}')
        return {"train": rows_of(data["train"], 'data["train"]', responses),
                "dev": rows_of(data[dev], f'data["{dev}"]')}
    rows = rows_of(data, "data", responses)
    if len(rows) < 2:
        raise InputError("data has a single record; one to train on and one to judge by are the least")
    apart = set(range(DEV_SHARE - 1, len(rows), DEV_SHARE)) or {len(rows) - 1}
    return {"train": [row for number, row in enumerate(rows) if number not in apart],
            "dev": [rows[number] for number in sorted(apart)]}


def _as_line(row: Mapping[str, Any]) -> str:
    return json.dumps(dict(row), default=str)


def _write_splits(folder: Path, splits: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    folder.mkdir(parents=True)
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{_as_line(row)}\n" for row in rows), encoding="utf-8")


def _named_by_contents(place: Path, kind: str, write: Callable[[Path], None]) -> Path:
    """What `write` writes into a new folder, in `place` under a name that follows from it."""
    draft = place / f".{kind}"
    with writing(place):
        shutil.rmtree(draft, ignore_errors=True)
        draft.parent.mkdir(parents=True, exist_ok=True)
        write(draft)
        files = sorted(file for file in draft.rglob("*") if file.is_file())
        contents = value_checksum([[str(file.relative_to(draft)), file_checksum(file)] for file in files])
        path = place / f"{kind}-{contents[:12]}"
        if path.exists():
            shutil.rmtree(draft)
        else:
            draft.rename(path)
    return path


def _own_tokenizer(model: PreTrainedModel, kind: str) -> Tokenizer:
    try:
        return AutoTokenizer.from_pretrained(model.name_or_path)
    except (OSError, ValueError):
        raise InputError(f"{kind}: a loaded model needs its tokenizer: tokenizer=...") from None


def _described(value: Any) -> str:
    if isinstance(value, Iterable) and not isinstance(value, (str, Mapping)):
        first = next(iter(value), None)
        return "none" if first is None else f"a {type(value).__name__} of {type(first).__name__}"
    return f"a {type(value).__name__}"
