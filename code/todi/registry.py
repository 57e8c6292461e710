"""Names -> things. The one place where a name of the command line is looked up."""

import difflib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

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


def did_you_mean_beside(path: Path) -> str:
    """The same, for a path that is not there, among what lies beside it: 'did you mean data/mine? '."""
    try:
        beside = {other.name: other for other in path.parent.iterdir()}
    except OSError:  # there is no such place, or it cannot be read
        return ""
    near = difflib.get_close_matches(path.name, beside, n=1)
    return f"did you mean {beside[near[0]]}? " if near else ""
