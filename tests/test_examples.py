"""examples/: run as a reader runs them, on tiny models."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT, write_data
from test_library import environment

EXAMPLES = ROOT / "examples"
# Runs the code cells of a notebook in one process, and shows what the last line of each is, as Jupyter does.
CELLS = """
import ast, json, sys
names = {"__name__": "__main__"}
sys.ps1 = "In : "
for cell in json.load(open(sys.argv[1]))["cells"]:
    if cell["cell_type"] == "code":
        body = ast.parse("".join(cell["source"])).body
        last = body.pop() if isinstance(body[-1], ast.Expr) else None
        exec(compile(ast.Module(body, []), "cell", "exec"), names)
        if last:
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
            print("SHOWN", json.dumps([repr(value), getattr(value, "_repr_html_", str)()]))
"""


def run(folder: Path, *words: object, **variables: str) -> str:
    done = subprocess.run([sys.executable, *map(str, words)], env=environment() | variables, cwd=folder, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def models(workshop) -> tuple[Path, Path]:
    return workshop.model("gpt2-student", seed=2), workshop.model("gpt2-teacher", hidden=48, seed=1)


@pytest.fixture
def records(tmp_path) -> Path:
    return write_data(tmp_path / "data", train=24) / "train.jsonl"


def test_own_loop(models, records, tmp_path):
    output = run(tmp_path, EXAMPLES / "own_loop.py", *models, records, 12)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+), divergence", output)]
    assert len(losses) == 12 and losses[-1] < losses[0]
    assert len([line for line in (EXAMPLES / "own_loop.py").read_text().splitlines() if line.strip()]) <= 50


def test_trainer_script(models, records, tmp_path):
    output = run(tmp_path, EXAMPLES / "trainer_script.py", *models, records, tmp_path / "out", 10)
    losses = [float(loss) for loss in re.findall(r"\{'loss': '([\d.]+)'.*'kd': .*'ce': ", output)]
    assert len(losses) == 2 and losses[1] < losses[0] and "'eval_kd'" in output
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_notebook(tmp_path):
    """Every cell, with fewer steps; its tables and curves are there."""
    (tmp_path / "data").symlink_to(ROOT / "data")
    output = run(tmp_path, "-c", CELLS, EXAMPLES / "notebook.ipynb", STEPS="6")
    shown = [json.loads(line.removeprefix("SHOWN ")) for line in output.splitlines() if line.startswith("SHOWN ")]
    assert len(shown) == 5
    for text, html in (shown[0], shown[1], shown[4]):
        assert "finished. Best checkpoint: epoch" in text and "<table>" in html and "base64" in html
    assert shown[2][0].startswith("{'ToDi': ") and "| ROUGE-L" in shown[3][0]


def test_the_notebook_is_kept_without_output():
    cells = json.loads((EXAMPLES / "notebook.ipynb").read_text())["cells"]
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]
