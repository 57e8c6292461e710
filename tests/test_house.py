"""The floor plan: who may import whom, and where a reader is told what each file is."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "code" / "todi"
ENTRY_POINTS = "entry points"
# From the ground up. A module imports from floors below its own and from its own floor.
FLOORS = ("ground", "runtime", "criterions", "models", "data", "generation", "teacher", "evaluation", "training",
          ENTRY_POINTS)
GROUND = ("errors", "python_files", "registry", "options", "schedules", "settings")


def floor_of(module: str) -> str:
    """Of a module's dotted name: its room, or where a file beside the rooms belongs."""
    room = module.split(".")[1] if "." in module else ""
    if room in FLOORS:
        return room
    return "ground" if room in (*GROUND, "") else ENTRY_POINTS


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def all_imports(file: Path) -> Iterator[str]:
    """Dotted names of the modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import hides its floor"
            yield node.module


def imports(file: Path) -> Iterator[str]:
    """Those of `all_imports` that are this package's."""
    return (module for module in all_imports(file) if module.split(".")[0] == "todi")


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


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def names(requirements: Iterable[str]) -> set[str]:
    """What is required, in the spelling of package indices."""
    return {re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower() for requirement in requirements}


def packages(files: Iterable[Path], own: Iterable[str]) -> set[str]:
    """The packages that files import. Args: own: names of modules that are no package's."""
    roots = {module.split(".")[0] for file in files for module in all_imports(file)}
    installed = packages_distributions()
    return names(installed.get(root, [root])[0] for root in roots - sys.stdlib_module_names - set(own))


def test_what_is_imported_is_declared():
    declared = {extra: names([*PROJECT["dependencies"], *EXTRAS[extra]]) for extra in EXTRAS}
    undeclared = packages(modules(), ["todi"]) - declared["monitors"] - declared["gpu"]
    assert not undeclared, f"the package imports {', '.join(undeclared)}, which pyproject.toml does not name"
    folders = ("tests", "benchmarks", "data/demo", "examples")
    others = [file for folder in folders for file in (ROOT / folder).glob("*.py")]
    undeclared = packages(others, ["todi", *(file.stem for file in others)]) - declared["test"]
    assert not undeclared, f"tests or tools import {', '.join(undeclared)}, which pyproject.toml does not name"


def test_a_package_that_is_imported_is_seen(tmp_path):
    file = tmp_path / "bad.py"
    file.write_text("import ast, yaml, own\ndef late():\n    from no_such_package.part import thing\n")
    assert packages([file], own=["own"]) == {"pyyaml", "no-such-package"}


def test_one_version_of_each_package_is_tested_and_locked():
    """requirements.txt, the tests' own list and uv.lock agree; the lock is of today's ranges and the public index."""
    pins = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert names(pins) == names(PROJECT["dependencies"])
    more = re.search(r"^set_up (.*)", (ROOT / "scripts" / "test.sh").read_text(), re.MULTILINE)[1].split()
    assert names(more) == names(EXTRAS["test"])
    text = (ROOT / "uv.lock").read_text()
    assert set(re.findall(r"\w+://[^/\"]*", text)) == {"https://pypi.org", "https://files.pythonhosted.org"}
    packages = {package["name"]: package for package in tomllib.loads(text)["package"]}
    assert {pin: packages[name]["version"] for pin in [*pins, *more] for name in names([pin])} == \
        {pin: pin.partition(";")[0].split("==")[1] for pin in [*pins, *more]}
    ranges = {entry["name"] + entry["specifier"] for entry in packages["todi"]["metadata"]["requires-dist"]}
    wanted = [*PROJECT["dependencies"], *(word for words in EXTRAS.values() for word in words)]
    assert ranges == {word.partition(";")[0] for word in wanted}


def mapped() -> list[str]:
    """The paths in the map of docs/architecture.md, from the root; the line of a package is that of its __init__.py."""
    tree = (ROOT / "docs" / "architecture.md").read_text().split("```")[1]
    folders, paths = [], []
    for line in tree.strip().splitlines():
        indent, name = re.match(r"((?:  )*)(\S+) +\S", line).groups()
        folders[len(indent) // 2:] = [name]
        path = "".join(folders)
        paths.append(f"{path}__init__.py" if (ROOT / path / "__init__.py").is_file() else path)
    return paths


def test_the_map_names_every_file_once():
    paths = mapped()
    there = [file for file in PACKAGE.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert sorted(path for path in paths if path.startswith("code/")) == \
        sorted(str(file.relative_to(ROOT)) for file in there)
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_the_map_has_the_rooms_in_the_order_of_their_floors():
    packages = [Path(path).parent.name for path in mapped() if path.endswith("__init__.py")]
    assert [name for name in packages if name not in GROUND] == ["todi", *FLOORS[1:-1]]
