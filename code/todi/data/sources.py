"""The public sources of the instruction sets: where their files are, and how each is read into one form."""

import http.client
import io
import json
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from todi.errors import InputError
from todi.registry import Registry
from todi.runtime.checksums import file_checksum
from todi.runtime.storage import publish, unfinished

_GITHUB = "https://raw.githubusercontent.com"
GPT2 = "model_hub/gpt2/gpt2-base"  # whose tokens the published sets count
WORDS = "words"
_TIMEOUT = 60  # seconds without a byte
_INSTANCES_PER_TASK = 100  # of Super-NaturalInstructions: those that its own evaluation takes

Item = dict[str, Any]  # instruction, input, output (a string or a list), and what else the set says of an item


@dataclass(frozen=True)
class Cut:
    """How the items of a set become files.

    Attributes:
        sizes: records by split, after a seeded shuffle; None is the rest. A set with a single split keeps its order,
            and has the first so many.
        shortest_response: fewest tokens of a response.
    """

    sizes: dict[str, int | None]
    shortest_response: int = 1


@dataclass(frozen=True)
class Source:
    """Where a set comes from. `read` gets its files from a `RawFiles`.

    Attributes:
        tokenizer: the model whose tokens its lengths are counted in, or `WORDS`.
    """

    read: Callable[["RawFiles"], Iterator[Item]]
    cut: Cut
    licence: str
    tokenizer: str = WORDS


SOURCES: Registry[Source] = Registry("data set")


class RawFiles:
    """Files of the sources in a folder; what is not there is downloaded.

    Attributes:
        folder: where they are.
        used: SHA-256 of each file that was asked for, by its name in the folder.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.used: dict[str, str] = {}

    def __str__(self) -> str:
        """Which files, and where."""
        return f"{', '.join(self.used) or 'the source'} in {self.folder}"

    def lines(self, name: str, url: str) -> Iterator[Item]:
        """The objects of a JSON-lines file."""
        path = self.path(name, url)
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _object(line, f"{path}:{number}")

    def object(self, name: str, url: str) -> Item:
        """A file that is one JSON object."""
        path = self.path(name, url)
        return _object(path.read_bytes(), str(path))

    def path(self, name: str, url: str) -> Path:
        """Where the file is. Raises InputError when it is not there and cannot be downloaded."""
        path = self.folder / name
        if not path.is_file():
            _download(url, path)
        self.used[name] = file_checksum(path)
        return path


def _download(url: str, path: Path) -> None:
    """Writes what `url` gives, or of a zip archive the file of that name in it, to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
            found = io.BytesIO(answer.read())
        if url.endswith(".zip"):
            with zipfile.ZipFile(found) as archive:
                name = next(name for name in archive.namelist() if Path(name).name == path.name)
                found = io.BytesIO(archive.read(name))
        unfinished(path).write_bytes(found.getvalue())
    except (OSError, http.client.HTTPException, ValueError, zipfile.BadZipFile, StopIteration) as error:
        reason = getattr(error, "reason", error) or type(error).__name__
        raise InputError(f"cannot download {url} ({reason}); put {path.name} at {path}") from None
    publish(path)


def _object(text: bytes, place: str) -> Item:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise InputError(f"{place}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise InputError(f"{place}: expected an object, got {type(found).__name__}")
    return found


def _dolly(raw: RawFiles) -> Iterator[Item]:
    url = "https://huggingface.co/datasets/databricks/databricks-dolly-15k/resolve/main/databricks-dolly-15k.jsonl"
    for line in raw.lines("databricks-dolly-15k.jsonl", url):
        yield {"topic": line["category"], "instruction": line["instruction"], "input": line["context"],
               "output": line["response"]}


def _self_instruct(raw: RawFiles) -> Iterator[Item]:
    name = "user_oriented_instructions.jsonl"
    for line in raw.lines(name, f"{_GITHUB}/yizhongw/self-instruct/main/human_eval/{name}"):
        for instance in line["instances"]:
            yield {"topic": line["motivation_app"], "instruction": line["instruction"], "input": instance["input"],
                   "output": instance["output"]}


def _vicuna(raw: RawFiles) -> Iterator[Item]:
    # The references that were published are the answers of gpt-3.5-turbo; later commits moved and dropped them.
    answers = raw.lines("vicuna/answer-gpt-3.5-turbo.jsonl",
                        f"{_GITHUB}/lm-sys/FastChat/06bc2232d09d8e0f9f961d848ebcb107ca431b32/chatserver/eval/table/"
                        "answer/answer-gpt-3.5-turbo.jsonl")
    answer_of = {line["question_id"]: line["text"] for line in answers}
    for line in raw.lines("vicuna/question.jsonl",
                          f"{_GITHUB}/lm-sys/FastChat/ab5cfcadd61921c08d8d4f8fbea96be6c1e90fc1/chatserver/eval/table/"
                          "question.jsonl"):
        yield {"category": line["category"], "instruction": line["text"], "input": "",
               "output": answer_of[line["question_id"]]}


def _super_natural_instructions(raw: RawFiles) -> Iterator[Item]:
    repository, folder = f"{_GITHUB}/allenai/natural-instructions/master", "natural-instructions"
    tasks = "splits/default/test_tasks.txt"
    try:
        names = raw.path(f"{folder}/{tasks}", f"{repository}/{tasks}").read_text(encoding="utf-8").split()
        files = [raw.object(f"{folder}/tasks/{name}.json", f"{repository}/tasks/{name}.json") for name in names]
    except InputError as error:
        raise InputError(f"{error.problems[0]}, or a checkout of https://github.com/allenai/natural-instructions at "
                         f"{raw.folder / folder}") from None
    for name, task in zip(names, files, strict=True):
        for instance in task["Instances"][:_INSTANCES_PER_TASK]:
            yield {"topic": name, "instruction": " ".join(task["Definition"]), "input": instance["input"],
                   "output": instance["output"]}


def _unnatural_instructions(raw: RawFiles) -> Iterator[Item]:
    url = f"{_GITHUB}/orhonovich/unnatural-instructions/main/data/core_data.zip"
    for line in raw.lines("unnatural-instructions/core_data.jsonl", url):
        for instance in line["instances"]:
            yield {"instruction": line["instruction"], "input": instance["input"], "output": instance["output"]}


SOURCES.add("dolly", Source(_dolly, Cut({"valid": 500, "dev": 1000, "train": None}), "CC BY-SA 3.0", GPT2))
SOURCES.add("self-inst", Source(_self_instruct, Cut({"valid": None}), "Apache-2.0", GPT2))
SOURCES.add("vicuna", Source(_vicuna, Cut({"valid": None}), "Apache-2.0", GPT2))
SOURCES.add("sinst/11_", Source(_super_natural_instructions, Cut({"valid": None}, shortest_response=11),
                                "Apache-2.0", GPT2))
SOURCES.add("uinst/11_", Source(_unnatural_instructions, Cut({"valid": 10_000}, shortest_response=11), "MIT", GPT2))
