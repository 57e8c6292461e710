"""Names -> things. The one place where a name of the command line is looked up, and how a user's file adds to it."""

import difflib
import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Generic, TypeVar

from todi.errors import InputError, collecting

T = TypeVar("T")


class Registry(Generic[T]):
    """A case-insensitive, duplicate-refusing mapping from public names to objects.

    Args:
        kind: what the entries are, in the words of an error message ("divergence", "model family").
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, tuple[str, T]] = {}

    def add(self, name: str, entry: T) -> T:
        """Enters `entry` under `name`. Raises ValueError when the name is taken."""
        if name.lower() in self._entries:
            raise ValueError(f"the {self.kind} {name!r} is registered twice")
        self._entries[name.lower()] = (name, entry)
        return entry

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator form of `add`."""
        return lambda entry: self.add(name, entry)

    def __getitem__(self, name: str) -> T:
        """The entry called `name`. Raises ValueError that lists the allowed names and suggests the nearest."""
        return self._lookup(name)[1]

    def canonical(self, name: str) -> str:
        """`name` as it was registered (its spelling and case). Raises ValueError like `[]`."""
        return self._lookup(name)[0]

    def _lookup(self, name: str) -> tuple[str, T]:
        if name.lower() not in self._entries:
            raise ValueError(f"unknown {self.kind} {name!r}; {did_you_mean(name, self)}allowed: {', '.join(self)}")
        return self._entries[name.lower()]

    def __contains__(self, name: str) -> bool:
        return name.lower() in self._entries

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self._entries.values())


def did_you_mean(given: str, allowed: "Registry | list[str]") -> str:
    """'did you mean X? ' for the allowed name nearest to `given`, or '' when none is near."""
    by_lower = {name.lower(): name for name in allowed}
    near = difflib.get_close_matches(given.lower(), by_lower, n=1)
    return f"did you mean {by_lower[near[0]]}? " if near else ""


def load_plugins(paths: Sequence[str]) -> None:
    """Runs Python files, each once in a process, so that they can register what is a user's own.

    Each is a module with a name of its own; a file that stops with an error is run anew when it is asked for again.

    Raises:
        InputError: with each file that is missing or fails, the line and the reason.
    """
    problems: list[str] = []
    for path in paths:
        with collecting(problems):
            _run_plugin(path)
    if problems:
        raise InputError(problems)


def _run_plugin(path: str) -> None:
    file = Path(path).resolve()
    if not file.is_file():
        raise InputError(f"no such plugin: {path}")
    name = f"todi_plugin_{hashlib.sha256(str(file).encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_loader(name, SourceFileLoader(name, str(file)))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise InputError(f"plugin {path}{_line_in(file, error)}: {type(error).__name__}: {error}") from error


def _line_in(file: Path, error: Exception) -> str:
    """':LINE', the last one of `file` that the error came through; '' when it came through none."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return f":{error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return f":{lines[-1]}" if lines else ""
