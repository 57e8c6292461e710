"""A user's own Python files, which are no part of any package."""

import sys
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from todi.errors import InputError


@cache
def load_python_file(path: str) -> ModuleType:
    """Runs a Python file, once however often it is asked for. What goes wrong within it is raised as it is.

    Raises:
        InputError: there is no such file.
    """
    file = Path(path)
    if not file.is_file() or file.suffix != ".py":
        raise InputError(f"no such Python file: {path}")
    spec = spec_from_file_location(f"file_{file.stem}", file)
    module = sys.modules[spec.name] = module_from_spec(spec)  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module
