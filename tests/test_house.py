"""The floor plan: who may import whom, and where a reader is told what each file is."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "code" / "todi"
ENTRY_POINTS = "entry points"
# From the ground up. A module imports from floors below its own and from its own floor.
FLOORS = ("ground", "runtime", "criterions", "models", "data", "generation", "teacher", "evaluation", "training",
          ENTRY_POINTS)
GROUND = ("errors", "registry", "options", "schedules", "settings")


def floor_of(module: str) -> str:
    """Of a module's dotted name: its room, or where a file beside the rooms belongs."""
    room = module.split(".")[1] if "." in module else ""
    if room in FLOORS:
        return room
    return "ground" if room in (*GROUND, "") else ENTRY_POINTS


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(file: Path) -> Iterator[str]:
    """Dotted names of this package's modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "todi")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "todi":
            yield node.module
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{file}: a relative import hides its floor"


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("file", modules(), ids=name_of)
def test_no_import_runs_upward(file):
    own = FLOORS.index(floor_of(name_of(file)))
    upward = [module for module in imports(file) if FLOORS.index(floor_of(module)) > own]
    assert not upward, f"{name_of(file)} ({FLOORS[own]}) imports {', '.join(upward)} from above"


def test_an_upward_import_is_seen(tmp_path):
    """The test above can fail."""
    file = tmp_path / "todi" / "runtime" / "bad.py"
    file.parent.mkdir(parents=True)
    file.write_text("def late():\n    from todi.training.trainer import Trainer\n")
    module, = imports(file)
    assert FLOORS.index(floor_of(module)) > FLOORS.index("runtime")
