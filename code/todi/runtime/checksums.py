"""Checksums, all SHA-256 in hexadecimal: of a file, of the files of a model, of values.

What they say is in caches and results that are already on users' disks, so none of them may change its answer.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

_WEIGHTS = {".safetensors", ".bin", ".gguf"}
_DESCRIPTIONS = {"config.json", "adapter_config.json"}
_MODEL_FILES = {".safetensors", ".bin", ".gguf", ".json", ".model", ".txt", ".jinja"}
_PIECE = 64 << 20
UNREAD = "not read"  # in place of a checksum that was not taken

_States = tuple[tuple[Path, int, int], ...]  # files, each with its size and when it was changed
_found: dict[_States, str] = {}  # a run asks for a teacher's more than once


def file_checksum(path: str | Path) -> str:
    """Of a file's contents."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def bytes_checksum(content: bytes) -> str:
    """Of the contents of a file with these bytes, as `file_checksum` has it."""
    return hashlib.sha256(content).hexdigest()


def value_checksum(value: Any) -> str:
    """Of a JSON value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def weights_checksum(model: Path) -> str:
    """Of the names and contents of a model's or an adapter's weight files and configuration.

    Pieces of a file are read in parallel: weights are tens of gigabytes.
    """
    states = _states(model)
    if states not in _found:
        with ThreadPoolExecutor() as pool:
            _found[states] = _whole(states, pool.map(_piece_digest, *zip(*_pieces(states), strict=True)))
    return _found[states]


def read_together(models: Sequence[Path], reader: int, readers: int,
                  gather: Callable[[list[bytes]], list[list[bytes]]]) -> None:
    """Has several processes that see the same files read a part each, after which `weights_checksum` reads none.

    Args:
        reader: which of the readers this process is.
        gather: gives to each of them what all have, in their order.
    """
    known = [_states(model) for model in models]
    pieces = [piece for states in known for piece in _pieces(states)]
    with ThreadPoolExecutor() as pool:
        parts = gather(list(pool.map(_piece_digest, *zip(*pieces[reader::readers], strict=True))))
    digests = (parts[number % readers][number // readers] for number in range(len(pieces)))
    _found.update({states: _whole(states, digests) for states in known})


def _whole(states: _States, digests: Iterator[bytes]) -> str:
    """The checksum of files, from those of their pieces one after the other."""
    whole = hashlib.sha256()
    for state in states:
        file, size, _ = state
        whole.update(f"{file.name} {size}\n".encode("utf-8", "surrogateescape"))
        for digest in islice(digests, len(list(_pieces([state])))):
            whole.update(digest)
    return whole.hexdigest()


def weights_sizes(model: Path) -> dict[str, str]:
    """The size of each file that `weights_checksum` reads, by path: what tells most models apart unread."""
    return {str(file): f"{file.stat().st_size} bytes" for file in _weight_files(model)}


def weights_place(model: Path) -> str:
    """Of which files `weights_checksum` would read: the same on two machines where both see the same ones, in a folder
    that they share, which gives each file a number; copies differ in it."""
    states = [(file.name, file.stat()) for file in _weight_files(model)]
    return value_checksum([[name, seen.st_size, seen.st_mtime_ns, seen.st_ino] for name, seen in states])


def _weight_files(model: Path) -> list[Path]:
    return [model] if model.is_file() else sorted(
        file for file in model.iterdir() if file.suffix in _WEIGHTS or file.name in _DESCRIPTIONS)


def model_checksum(model: Path) -> str:
    """Of the names and contents of all that a model or an adapter computes with, its tokenizer included."""
    files = sorted(model.iterdir()) if model.is_dir() else [model]
    described = [f"{file.name} {file_checksum(file)}" for file in files
                 if file.suffix in _MODEL_FILES and file.is_file()]
    return hashlib.sha256("\n".join(described).encode("utf-8", "surrogateescape")).hexdigest()


def _states(model: Path) -> _States:
    return tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in _weight_files(model))


def _pieces(states: Iterable[tuple[Path, int, int]]) -> Iterator[tuple[Path, int]]:
    return ((file, start) for file, size, _ in states for start in range(0, max(1, size), _PIECE))


def _piece_digest(file: Path, start: int) -> bytes:
    with file.open("rb") as opened:
        opened.seek(start)
        return hashlib.sha256(opened.read(_PIECE)).digest()
