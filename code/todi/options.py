"""Frozen dataclasses <-> the command line: one field is one option, one dataclass one titled group.

    @dataclass(frozen=True)
    class DataConfig:
        data_dir: str = option("data/demo", "folder that holds train.jsonl")

    config = parse(DataConfig, ["--data-dir", "data/dolly"])
"""

import argparse
import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

from todi.errors import InputError
from todi.registry import did_you_mean

C = TypeVar("C")


def option(default: Any, help: str, choices: Sequence[str] | None = None, flag: str | None = None,
           may_change: bool = False) -> Any:
    """A dataclass field that is an option of the command line.

    Args:
        default: used when the option is not given.
        help: shown by --help.
        choices: the allowed words, for an option that has a few.
        flag: the option's spelling where it is not the field's name with dashes.
        may_change: at resume; it does not alter what a run computes, so it may change when the run is resumed.
    """
    metadata = {"help": help, "choices": choices, "flag": flag, "may_change": may_change}
    return dataclasses.field(default=default, metadata=metadata)


def parse(config_type: type[C], argv: Sequence[str] | None = None, prog: str | None = None) -> C:
    """Builds `config_type`, a dataclass of options or of such dataclasses, from command-line words.

    Raises:
        InputError: an unknown option (with the nearest known one) or a value of the wrong type.
    """
    parser = _Parser(prog=prog, description=config_type.__doc__, allow_abbrev=False,
                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    _add_options(parser, config_type)
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        raise InputError(_explain_unknown(unknown, parser))
    return _build(config_type, vars(values))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def _add_options(parser: argparse.ArgumentParser, config_type: type) -> None:
    group = parser.add_argument_group(config_type.__name__)
    hints = typing.get_type_hints(config_type)
    for field in dataclasses.fields(config_type):
        if dataclasses.is_dataclass(hints[field.name]):
            _add_options(parser, hints[field.name])
        else:
            flag = field.metadata["flag"] or "--" + field.name.replace("_", "-")
            # argparse names a positional argument by its flag and takes no dest for it
            names = {"dest": field.name} if flag.startswith("-") else {}
            group.add_argument(flag, default=field.default, help=field.metadata["help"], **names,
                               **_argument_type(hints[field.name], field.metadata["choices"]))


def _argument_type(hint: Any, choices: Sequence[str] | None) -> dict[str, Any]:
    """How argparse reads a field of this type: bool, a scalar, an optional scalar, or a tuple of scalars."""
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(hint) is tuple:
        return {"type": typing.get_args(hint)[0], "nargs": "*", "choices": choices}
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    return {"type": hint, "choices": choices}


def _explain_unknown(unknown: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    known = [flag for action in parser._actions for flag in action.option_strings]
    problems = []
    for word in unknown:
        if word.startswith("--"):
            name = word.split("=")[0]
            problems.append(f"unknown option {name}; {did_you_mean(name, known)}--help lists them all")
        else:
            problems.append(f"unexpected argument {word!r}")
    return problems


def _build(config_type: type[C], values: dict[str, Any]) -> C:
    hints = typing.get_type_hints(config_type)
    arguments = {}
    for field in dataclasses.fields(config_type):
        if dataclasses.is_dataclass(hints[field.name]):
            arguments[field.name] = _build(hints[field.name], values)
        else:
            value = values[field.name]
            arguments[field.name] = tuple(value) if isinstance(value, list) else value
    return config_type(**arguments)
