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
# Runs the code cells of a notebook in one process, and shows the value of the last line of each, as Jupyter does.
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
            if value is not None:
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


@pytest.mark.slow
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


# What the page's examples have at hand, as its reader has.
AT_HAND = """
import torch, todi
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, TrainingArguments
student, teacher, model = (AutoModelForCausalLM.from_pretrained(f"model_hub/mine/{size}") for size in
                           ("small", "large", "small"))
tokenizer = AutoTokenizer.from_pretrained("model_hub/mine/small")
tokenizer.pad_token = tokenizer.eos_token
collator = DataCollatorForSeq2Seq(tokenizer)
rows = todi.encode_file("data/mine/train.jsonl", tokenizer, model_type="gpt2")
rows, held_out = rows[4:], rows[:4]
args = TrainingArguments("outputs/hf", max_steps=2, report_to=[], save_strategy="no", use_cpu=True)
ids = torch.arange(3, 12)[None]
hidden, teacher_hidden = (one.base_model(ids).last_hidden_state[0].detach() for one in (student, teacher))
labels = torch.arange(4, 13)
"""
CHECKED = """
assert result.best.is_dir() and result.metrics and set(scores.scores) == {"mine", "average"}
assert sums.tokens == 9 and student.get_output_embeddings().weight.grad.abs().sum() > 0
logits, theirs = torch.randn(2, 5, 30)
p, q = theirs.softmax(-1), logits.softmax(-1)
for beta in (0.2, 0.5, 0.9):  # as TRL has it
    m = beta * p + (1 - beta) * q
    expected = beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1)
    torch.testing.assert_close(build_divergence("gkd", beta=beta)(logits, theirs), expected)
"""


@pytest.mark.slow
def test_the_examples_of_the_page(models, tmp_path):
    """docs/library.md, from its top to its end in one process."""
    page = (ROOT / "docs" / "library.md").read_text()
    (tmp_path / "model_hub" / "mine").mkdir(parents=True)
    for size, model in zip(("small", "large"), models, strict=True):
        (tmp_path / "model_hub" / "mine" / size).symlink_to(model)
    write_data(tmp_path / "data" / "mine", train=12, dev=2, valid=2)
    words, = re.findall(r"^python (-m todi.cache .*)", page, re.MULTILINE)
    run(tmp_path, *words.split())
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5
    (tmp_path / "page.py").write_text("\n".join([AT_HAND, *blocks, CHECKED]))
    run(tmp_path, "page.py")
