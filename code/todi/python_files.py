"""Python files of a user's own, which are no part of any package."""

import hashlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

from todi.errors import InputError, collecting


def load_plugins(paths: Sequence[str]) -> None:
    """Runs Python files, so that they can register what is a user's own.

    Raises:
        InputError: as `load_python_file`, for each of them.
    """
    problems: list[str] = []
    for path in paths:
        with collecting(problems):
            load_python_file(path)
    if problems:
        raise InputError(problems)


def load_python_file(path: str) -> ModuleType:
    """Runs a Python file as a module with a name of its own, once in a process however often it is asked for.

    Raises:
        InputError: it is not there, or fails; names the line and the reason. It is then run anew when it is asked for
            again.
    """
    file = Path(path).resolve()
    if not file.is_file():
        raise InputError(f"no such Python file: {path} (looked for {file})")
    name = f"todi_file_{hashlib.sha256(os.fsencode(file)).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_loader(name, SourceFileLoader(name, str(file)))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise InputError(f"{path}{_line_in(file, error)}: {type(error).__name__}: {error}") from error
    return module


def _line_in(file: Path, error: Exception) -> str:
    """':LINE', the last one of `file` that the error came through; '' when it came through none."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return f":{error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return f":{lines[-1]}" if lines else ""
