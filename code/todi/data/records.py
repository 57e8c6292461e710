"""The schema of the data: JSON lines -> records, with every bad line named."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from todi.errors import InputError, collecting
from todi.registry import did_you_mean_beside

MOST_PROBLEMS = 20  # a file of the wrong kind has a problem on every line; nobody reads more than these


ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """A turn of a conversation; `role` is one of `ROLES`."""

    role: str
    content: str


@dataclass(frozen=True)
class Record:
    """One instruction.

    Attributes:
        prompt: the filled-in prompt template; of chat data, empty until `todi.data.chat.render` fills it in.
        references: the acceptable responses; training uses the first. None where none were asked for or given.
        messages: of chat data, the conversation before the response.
        end: the token that ends the response; EOS when empty.
    """

    prompt: str
    references: tuple[str, ...]
    messages: tuple[Message, ...] = ()
    end: str = ""


def load_records(path: str | Path, limit: int | None = None, responses: bool = True) -> list[Record]:
    """Reads a JSON-lines file of objects with `prompt` (a string) and `output` (a string or a list of strings), or of
    objects with `messages`, each with `role` and `content`, the last one the assistant's.

    Blank lines are passed over; any other field is ignored.

    Args:
        limit: read the first so many records alone.
        responses: whether each line must have one. Else `prompt` may come alone, and the last message be the user's.

    Raises:
        InputError: the file is missing, has no record, or has bad lines (all of them, with line numbers).
    """
    path = Path(path)
    if not path.is_file():
        folder = path.parent
        hint = (f"{folder} is a file: give its folder" if folder.is_file() else
                "" if folder.is_dir() else did_you_mean_beside(folder))
        raise InputError(f"no such data file: {path}; {hint}".rstrip("; "))
    records: list[Record] = []
    problems: list[str] = []
    for number, line in _numbered_lines(path):
        if limit is not None and len(records) == limit:
            break
        try:
            record = parse_record(line, responses)
            if records and bool(record.messages) != bool(records[0].messages):
                raise ValueError("a file has either `prompt` and `output` or `messages`, and the first line has the "
                                 "other")
            records.append(record)
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
    if problems:
        raise InputError(readable(problems, f"{path}: {{}} more bad lines"))
    if not records:
        raise InputError(f"{path} has no record")
    return records


def load_sets(files: Sequence[Path], limit: int | None = None, responses: bool = True) -> list[list[Record]]:
    """The records of several files, at most `limit` of each. Raises InputError like `load_records`, for all files."""
    problems: list[str] = []
    sets = []
    for file in files:
        with collecting(problems):
            sets.append(load_records(file, limit, responses))
    if problems:
        raise InputError(problems)
    return sets


def readable(problems: list[str], more: str) -> list[str]:
    """So many of `problems` as somebody would read, and `more` with the number of those that are left out."""
    return [*problems[:MOST_PROBLEMS], *([more.format(len(problems) - MOST_PROBLEMS)]
                                         if len(problems) > MOST_PROBLEMS else [])]


def check_text(what: str, text: str) -> None:
    """Raises ValueError where half of a surrogate pair is in `text`: JSON can say it, but no tokenizer and no file."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])[1:-1]
        raise ValueError(f"{what} has half of a character, {half}, at place {error.start + 1}: something like an emoji "
                         "was cut in two") from None


def _numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    # Bytes, cut at \n alone: str.splitlines() would also cut at U+2028, which JSON strings may hold.
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def parse_record(line: bytes, responses: bool = True) -> Record:
    """A record of a line of JSON, with a response or, without `responses`, perhaps none.

    Raises:
        ValueError: what is wrong with it.
    """
    try:
        fields = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start})") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise ValueError(f"expected an object, got {type(fields).__name__}")
    if "messages" in fields:
        return _parse_chat(fields["messages"], responses)
    missing = [name for name in ("prompt", "output") if name not in fields and (responses or name == "prompt")]
    if missing:
        present = ", ".join(ascii(name)[1:-1] for name in sorted(fields)[:8])
        raise ValueError(f"lacks {' and '.join(missing)}; has {present[:120] or 'nothing'}")
    prompt = fields["prompt"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("`prompt` must be a non-empty string")
    check_text("`prompt`", prompt)
    return Record(prompt, _parse_output(fields["output"]) if "output" in fields else ())


def _parse_output(output: object) -> tuple[str, ...]:
    references = tuple(output) if isinstance(output, list) else (output,)
    if not references or not all(isinstance(text, str) for text in references):
        raise ValueError("`output` must be a string or a non-empty list of strings")
    if not references[0].strip():
        raise ValueError("`output` is empty")
    for text in references:
        check_text("`output`", text)
    return references


def _parse_chat(messages: object, responses: bool) -> Record:
    least = 2 if responses else 1
    if not isinstance(messages, list) or len(messages) < least or not all(isinstance(turn, dict) for turn in messages):
        raise ValueError(f"`messages` must be a list of at least {'two objects' if responses else 'one object'} with "
                         "`role` and `content`")
    for number, turn in enumerate(messages, 1):
        if turn.get("role") not in ROLES:
            raise ValueError(f"message {number} has the role {turn.get('role')!r}; allowed: {', '.join(ROLES)}")
        if not isinstance(turn.get("content"), str) or not turn["content"].strip():
            raise ValueError(f"`content` of message {number} must be a non-empty string")
        check_text(f"`content` of message {number}", turn["content"])
    *before, last = turns = [Message(turn["role"], turn["content"]) for turn in messages]
    if last.role == "user" and not responses:
        return Record("", (), tuple(turns))
    if last.role != "assistant":
        whose = "assistant's" if responses else "user's or the assistant's"
        raise ValueError(f"the last message must be the {whose}, not the {last.role}'s")
    if not before:
        raise ValueError("nothing comes before the assistant's message")
    return Record("", (last.content,), tuple(before))
