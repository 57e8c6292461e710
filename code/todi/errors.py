"""What can go wrong, as exceptions that say it in a line, and how a program ends with them."""

import codecs
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NoReturn


class RunError(Exception):
    """The run cannot go on; the message says why. Entry points print it and exit with `exit_code`.

    Args:
        problems: everything that is wrong, a sentence each.
    """

    exit_code = 1

    def __init__(self, problems: str | Iterable[str]):
        self.problems = list(map(_on_a_line, [problems] if isinstance(problems, str) else problems))
        super().__init__("\n".join(self.problems))


def _on_a_line(text: str) -> str:
    """A value that is shown may hold a line break, or what a terminal obeys."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


class StorageError(RunError):
    """Something of the run cannot be written. The message names the path and the reason."""


class InputError(RunError):
    """What the user gave cannot be run. Carries every problem that was found."""

    exit_code = 2


@contextmanager
def collecting(problems: list[str]) -> Iterator[None]:
    """Adds what a check raises to `problems` and goes on, so that the user sees all of it at once."""
    try:
        yield
    except InputError as error:
        problems.extend(error.problems)


def run_main(main: Callable[[], None]) -> NoReturn:
    """Runs an entry point and exits: 0, 1 after a failure, or 2 after one line for each problem of the input."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors=_IN_ASCII)
    try:
        main()
    except RunError as error:
        print(*(f"error: {problem}" for problem in error.problems), sep="\n", file=sys.stderr)
        sys.exit(error.exit_code)
    sys.exit(0)


_IN_ASCII = "todi.in_ascii"
_LOOKALIKES = {"±": "+/-", "–": "-", "—": "-", "×": "x", "…": "...", "→": "->"}


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """For a terminal that cannot show a character: what looks like it, or its number."""
    character = error.object[error.start]
    return _LOOKALIKES.get(character) or ascii(character)[1:-1], error.start + 1


codecs.register_error(_IN_ASCII, _in_ascii)
