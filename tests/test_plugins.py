"""Python files of a user's own that register things."""

import pytest
from evaluating import run
from todi.data import prepare
from todi.data.sources import SOURCES
from todi.errors import InputError
from todi.python_files import load_plugins

SUMS = '''
from todi.data.sources import SOURCES, Cut, Source


def read_sums(raw):
    for a in range(30):
        yield {"instruction": f"What is {a} + 1?", "input": "", "output": str(a + 1)}


SOURCES.add("sums", Source(read_sums, Cut({"valid": 10, "train": None}), licence="CC0-1.0"))
'''


def write(tmp_path, name: str, text: str) -> str:
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def test_a_set_of_ones_own(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(SOURCES, "_entries", dict(SOURCES._entries))
    plugin = write(tmp_path, "my_set.py", SUMS)
    assert run(monkeypatch, prepare, "sums", "--plugins", plugin, "--data-dir", tmp_path / "data") == 0
    sizes = {file.name: len(file.read_text().splitlines()) for file in (tmp_path / "data" / "sums").glob("*.jsonl")}
    assert sizes == {"valid.jsonl": 10, "train.jsonl": 20}
    assert run(monkeypatch, prepare, "sums", "--plugins", tmp_path / "other.py") == 2
    other = tmp_path / "other.py"
    assert capsys.readouterr().err == f"error: no such Python file: {other} (looked for {other})\n"


def test_it_is_run_once_under_a_name_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = '''
from __future__ import annotations
import dataclasses, pathlib, sys

@dataclasses.dataclass
class Point:  # looks its module up by name
    x: int

assert sys.modules[__name__].Point is Point
with open("names", "a") as file:
    print(__name__, file=file)
'''
    (tmp_path / "sub").mkdir()
    first, second = write(tmp_path, "same.py", text), write(tmp_path / "sub", "same.py", text)
    load_plugins([first, "same.py", second])
    load_plugins([first])
    names = (tmp_path / "names").read_text().split()
    assert len(names) == len(set(names)) == 2


def test_what_is_wrong_is_said_of_every_file(tmp_path):
    files = {"a.py": "import todi\n\n\ndef deep():\n    return {}['key']\n\n\ndeep()\n", "b.py": "x = 1\nif x\n",
             "c.py": "import no_such_module\n", "d.txt": "import json\njson.loads('{')\n"}
    paths = [write(tmp_path, name, text) for name, text in files.items()]
    with pytest.raises(InputError) as error:
        load_plugins([*paths, str(tmp_path)])
    assert error.value.problems == [
        f"{paths[0]}:5: KeyError: 'key'",
        f"{paths[1]}:2: SyntaxError: expected ':' (b.py, line 2)",
        f"{paths[2]}:1: ModuleNotFoundError: No module named 'no_such_module'",
        f"{paths[3]}:2: JSONDecodeError: Expecting property name enclosed in double quotes: line 1 column 2 "
        "(char 1)",
        f"no such Python file: {tmp_path} (looked for {tmp_path})"]
    write(tmp_path, "a.py", "")
    load_plugins(paths[:1])  # mended
