"""Settings, declared once: a field of a dataclass is an option of the command line, a variable of the launchers, and
what its value may be.

    @dataclass(frozen=True)
    class DataConfig:
        data_dir: str = option("data/dolly", "folder that holds train.jsonl")
        max_length: int = option(512, "longest prompt + response, in tokens", least=1)

        def rules(self) -> Iterator[str]: ...     # what is wrong between settings, a sentence each; optional

    config = parse(DataConfig, ["--data-dir", "data/mine"])
    problems(config)                              # everything that is wrong with it

A dataclass may hold others: each is a titled group.
"""

import argparse
import dataclasses
import math
import numbers
import os
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from todi.errors import InputError, collecting
from todi.registry import Registry, did_you_mean

C = TypeVar("C")

LONGEST_NAME, _LONGEST_PATH = 255, 4095  # bytes, as file systems have it

# what transformers' TrainingArguments call what settings have here
_IN_TRANSFORMERS = {
    "learning_rate": "lr", "per_device_train_batch_size": "batch_size", "num_train_epochs": "num_epochs",
    "warmup_steps": "warmup_iters", "lr_scheduler_type": "lr_scheduler", "max_grad_norm": "clip_grad",
    "logging_steps": "log_interval", "save_total_limit": "keep_best_n_checkpoints", "output_dir": "save_dir",
    "bf16": "precision", "fp16": "precision"}

Names = str | Sequence[str]


def option(default: Any, help: str, *, least: float | None = None, above: float | None = None,
           below: float | None = None, at_most: float | None = None, choices: Sequence[str] | Registry | None = None,
           pattern: tuple[str, str] | None = None, flag: Names | None = None, env: Names | None = None,
           may_change: bool = False, fixed: bool = False) -> Any:
    """A dataclass field that is a setting. What is said of its value holds for each element of a tuple.

    Args:
        default: used when the setting is not given. None: there is none, and nothing is checked.
        help: shown by --help and in docs/settings.md.
        least, above, below, at_most: the range of a number, which must be finite in any case.
        choices: the allowed words. A registry is asked when a config is checked, so that it may have grown.
        pattern: a regular expression for the whole value, and what a value must be in words.
        flag: spelling on the command line, where it is not the field's name with dashes; without dashes a positional
            argument. Of several the first is shown, the others are older names.
        env: the launchers' variable, where it is not the field's name in capitals; of several the first that is set
            counts, () is none.
        may_change: at resume; it does not alter what a run computes, so it may change when the run is resumed.
        fixed: at resume; a resume state is laid out by it or counted in it, so that nothing can change it.
    """
    metadata = {"help": help, "limits": Limits(least, above, below, at_most), "choices": choices, "pattern": pattern,
                "flag": flag, "env": env, "may_change": may_change, "fixed": fixed}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Limits:
    """The range of a number; bounds that are None are not there."""

    least: float | None = None
    above: float | None = None
    below: float | None = None
    at_most: float | None = None

    def allow(self, value: float) -> bool:
        """Whether `value` is in the range; nan is in none."""
        return ((self.least is None or value >= self.least) and (self.above is None or value > self.above)
                and (self.below is None or value < self.below) and (self.at_most is None or value <= self.at_most))

    def in_words(self, whole: bool) -> str:
        """'at least 1', 'in [0, 1)', or '' where there is no bound; of whole numbers a few by name."""
        if whole and self.least is not None and self.at_most is not None and self.at_most - self.least < 5:
            return _any_of(range(self.least, self.at_most + 1))
        low = self.above if self.least is None else self.least
        high = self.below if self.at_most is None else self.at_most
        if low is not None and high is not None:
            return f"in {'(' if self.least is None else '['}{low}, {high}{')' if self.at_most is None else ']'}"
        bounds = {"at least": self.least, "above": self.above, "below": self.below, "at most": self.at_most}
        return "".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)


@dataclass(frozen=True)
class Option:
    """A declared setting, with what follows from its field's name and type.

    Attributes:
        type: of the value, or of each value of a tuple.
        many: whether it is a tuple.
        flags: spellings on the command line, the one that is shown first.
        variables: of the launchers; the first that is set counts.
    """

    name: str
    type: type
    many: bool
    default: Any
    help: str
    flags: tuple[str, ...]
    variables: tuple[str, ...]
    limits: Limits
    choices: Sequence[str] | Registry | None
    pattern: tuple[str, str] | None
    may_change: bool
    fixed: bool

    @property
    def flag(self) -> str:
        """The spelling that is shown."""
        return self.flags[0]

    @property
    def allowed(self) -> str:
        """What a value must be, in words; '' where its type says all."""
        if self.choices:
            return _any_of(self.choices)
        return self.pattern[1] if self.pattern else self.limits.in_words(whole=self.type is int)

    def problems(self, value: Any) -> Iterator[str]:
        """What is wrong with a value of this option, a sentence each."""
        for one in value if self.many else (value,):
            if one is not None and not self._allows(one):
                yield f"{self.flag} must be {self.allowed}, got {one if self.type in (int, float) else repr(one)}"
            elif isinstance(one, float) and not math.isfinite(one):
                yield f"{self.flag} must be finite, got {one}"
            elif isinstance(one, int) and not -2**63 <= one < 2**63:
                yield f"{self.flag} must be a number of 64 bits, got {one}"

    def read(self, value: Any) -> Any:
        """A value that was given in Python, as the setting has it. Raises InputError where it is of another type."""
        if value is None and self.default is None:
            return None
        if not self.many:
            return self._read_one(value)
        if isinstance(value, Mapping):
            value = [f"{name}={number}" for name, number in value.items()]
        elif isinstance(value, (str, os.PathLike)) or not isinstance(value, Iterable):
            value = [value]
        return tuple(map(self._read_one, value))

    def _read_one(self, value: Any) -> Any:
        if self.type is str and isinstance(value, os.PathLike):
            return os.fspath(value)
        kind = {int: numbers.Integral, float: numbers.Real}.get(self.type, self.type)
        if not isinstance(value, kind) or (isinstance(value, bool) and self.type is not bool):
            raise InputError(f"{self.flag} must be {_TYPES[self.type] or 'text'}{' or several' * self.many}, "
                             f"got {value!r}")
        return self.type(value)

    def _allows(self, value: Any) -> bool:
        if self.type in (int, float):
            return self.limits.allow(value)
        if self.choices:
            return value in self.choices
        return self.pattern is None or re.fullmatch(self.pattern[0], value) is not None


def declared(config_type: type) -> dict[type, list[Option]]:
    """The options of a dataclass and of those within it, in the order of the fields."""
    hints = typing.get_type_hints(config_type)
    found: dict[type, list[Option]] = {config_type: []}
    for field in dataclasses.fields(config_type):
        if dataclasses.is_dataclass(hints[field.name]):
            found |= declared(hints[field.name])
        else:
            found[config_type].append(_option_of(field, hints[field.name]))
    return {group: options for group, options in found.items() if options}


def problems(config: Any) -> list[str]:
    """Everything that is wrong with the settings themselves, in the order of the options: values that their
    declarations do not allow, then what the `rules` of the dataclasses say."""
    hints = typing.get_type_hints(type(config))
    found = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        found += (problems(value) if dataclasses.is_dataclass(value)
                  else _option_of(field, hints[field.name]).problems(value))
    return [*found, *(config.rules() if hasattr(config, "rules") else ())]


def check(config: Any) -> None:
    """Raises InputError with everything that is wrong with the settings."""
    found = problems(config)
    if found:
        raise InputError(found)


def parse(config_type: type[C], argv: Sequence[str] | None = None, prog: str | None = None) -> C:
    """Builds `config_type`, a dataclass of options or of such dataclasses, from command-line words.

    Its `INSTEAD`, where it has one, says of other programs' options what to use in their place.

    Raises:
        InputError: an unknown option (with the nearest known one), a value of the wrong type, or none of a few words.
    """
    parser = _Parser(prog=prog, description=config_type.__doc__, allow_abbrev=False,
                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for group, options in declared(config_type).items():
        arguments = parser.add_argument_group(group.__name__)
        for one in options:
            _add_argument(arguments, one)
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        raise InputError(_explain_unknown(unknown, parser, getattr(config_type, "INSTEAD", {})))
    return _build(config_type, vars(values))


def from_keywords(config_type: type[C], values: Mapping[str, Any], called: Mapping[str, str] | None = None) -> C:
    """Builds `config_type`, like `parse`, from values by the names of the settings.

    A path counts as its text, a single value as a list of it, and {"beta": 0.5} as a list of beta=0.5.

    Args:
        called: settings that have another name where the values are given, for the advice after an unknown one.

    Raises:
        InputError: everything that is wrong: unknown names (with the nearest known one), values of the wrong type, and
            what `check` would find in the rest.
    """
    known = {one.name: one for options in declared(config_type).values() for one in options}
    at_hand = [(called or {}).get(name, name) for name in known]
    instead = getattr(config_type, "INSTEAD", {})
    found = [f"there is no setting {name}; {instead.get(_flag(name)) or _nearest(name, at_hand)}".rstrip("; ")
             for name in values if name not in known]
    taken = {name: one.default for name, one in known.items()}
    for name in filter(known.__contains__, values):
        with collecting(found):
            taken[name] = known[name].read(values[name])
    config = _build(config_type, taken)
    found += problems(config)
    if found:
        raise InputError(found)
    return config


def spell(value: Any) -> str:
    """A value as one would write it: 5e-4, not 0.0005; the values of a tuple with spaces between."""
    if isinstance(value, float):
        digits, exponent = f"{value:.15e}".split("e")
        return min(repr(value), f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}", key=len)
    if isinstance(value, tuple):
        return " ".join(map(spell, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


def markdown_tables(config_type: type, columns: Sequence[str], leave_out: Collection[type] = ()) -> str:
    """Tables of the options of a dataclass, one for each group, under what the group's docstring says.

    Args:
        columns: of variable, option, default, allowed, at resume, meaning.
        leave_out: groups.
    """
    tables = []
    for group, options in declared(config_type).items():
        if group not in leave_out:
            rows = [columns, ["---"] * len(columns), *([_CELLS[name](one) for name in columns] for one in options)]
            title = group.__doc__.split(".")[0]
            tables.append("\n".join([f"### {title}", "", *(f"| {' | '.join(row)} |" for row in rows)]))
    return "\n\n".join(tables)


_TYPES = {int: "a whole number", float: "a number", bool: "yes or no", str: ""}


def _code(words: Iterable[str]) -> str:
    return " ".join(f"`{word}`" for word in words if word)


_CELLS: Mapping[str, Callable[[Option], str]] = {
    "variable": lambda one: _code(one.variables),
    "option": lambda one: _code(one.flags),
    "default": lambda one: _code([spell(one.default)]),
    "allowed": lambda one: ", each ".join(filter(None, ["several" * one.many, one.allowed or _TYPES[one.type]])),
    "at resume": lambda one: "may change" if one.may_change else "fixed" if one.fixed else "with force",
    "meaning": lambda one: one.help,
}


def possible_path(value: str) -> str:
    """`value`. Raises ArgumentTypeError where it is too long for a path: to look for it is an error of the system's."""
    encoded = os.fsencode(value)
    if len(encoded) > _LONGEST_PATH or max(map(len, encoded.split(b"/"))) > LONGEST_NAME:
        raise argparse.ArgumentTypeError(f"must have at most {LONGEST_NAME} bytes between slashes and {_LONGEST_PATH} "
                                         f"in all, got {value[:20]!r}...")
    return value


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def _option_of(field: dataclasses.Field, hint: Any) -> Option:
    said = dict(field.metadata)
    flags = said.pop("flag")
    variables = said.pop("env")
    many = typing.get_origin(hint) is tuple
    if many:
        hint = typing.get_args(hint)[0]
    elif typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    return Option(field.name, hint, many, field.default, **said,
                  flags=(_flag(field.name),) if flags is None else _names(flags),
                  variables=(field.name.upper(),) if variables is None else _names(variables))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _names(names: Names) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _any_of(words: Sequence[Any] | Registry) -> str:
    """'a, b or c'."""
    *others, last = map(str, words)
    return f"{', '.join(others)} or {last}" if others else last


def _add_argument(arguments: argparse._ArgumentGroup, one: Option) -> None:
    reading: dict[str, Any] = {"type": possible_path if one.type is str else one.type,
                               "choices": None if isinstance(one.choices, Registry) else one.choices}
    if one.type is bool:
        reading = {"action": argparse.BooleanOptionalAction}
    elif one.many:
        reading["nargs"] = "*"
    # argparse names a positional argument by its flag and takes no dest for it
    name = {"dest": one.name} if one.flag.startswith("-") else {}
    arguments.add_argument(one.flag, default=one.default, help=one.help, **name, **reading)
    for older in one.flags[1:]:
        arguments.add_argument(older, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **name, **reading)


def _explain_unknown(unknown: Sequence[str], parser: argparse.ArgumentParser, instead: Mapping[str, str]) -> list[str]:
    known = [flag for action in parser._actions for flag in action.option_strings]
    problems = []
    for before, word in zip(["", *unknown], unknown, strict=False):
        name = word.split("=")[0]
        if word.startswith("--"):
            advice = instead.get(name) or f"{_nearest(name, known)}--help lists them all"
            problems.append(f"unknown option {name}; {advice}")
        elif not before.startswith("--") or "=" in before:  # else it is the value of an unknown option
            problems.append(f"unexpected argument {word!r}")
    return problems


def _nearest(name: str, known: list[str]) -> str:
    """As `did_you_mean`, of a setting or its option, by the name that transformers has for it too."""
    meant = _IN_TRANSFORMERS.get(name.lstrip("-").replace("-", "_"), "")
    if name.startswith("--"):
        meant = "--" + meant.replace("_", "-")
    return f"did you mean {meant}? " if meant in known else did_you_mean(name, known)


def _build(config_type: type[C], values: Mapping[str, Any]) -> C:
    hints = typing.get_type_hints(config_type)
    arguments = {}
    for field in dataclasses.fields(config_type):
        if dataclasses.is_dataclass(hints[field.name]):
            arguments[field.name] = _build(hints[field.name], values)
        else:
            value = values[field.name]
            arguments[field.name] = tuple(value) if isinstance(value, list) else value
    return config_type(**arguments)
