"""The documentation: what README.md and docs/ say is typed in and run; links and names of files lead somewhere."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from launching import ROOT, Run, environment, in_tiers, write_data
from todi.criterions import DIVERGENCES, build_divergence
from todi.schedules import SCHEDULES
from todi.settings import LAUNCHER_VARIABLES
from todi.settings.page import page
from todi.training.optimizer import build_schedule
from transformers import get_polynomial_decay_schedule_with_warmup

DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md"))]
SECTIONS = dict(text.split("\n", 1) for text in (DOCS / "extending.md").read_text().split("\n## ")[1:])
SOON = ("A divergence",)  # run with the short tests
# No more than that: paths, and what they name, are the page's own.
SMALL = {"EPOCH": 4, "MAX_STEPS": 12, "BATCH_SIZE": 4, "GRAD_ACC": 2, "MAX_LENGTH": 64, "MAX_PROMPT_LENGTH": 48,
         "PRECISION": "fp32", "EVAL_GEN": 0, "LOG_INTERVAL": 1, "LR": 1e-2, "LORA_RANK": 4, "KD_RATE": 1}


def blocks(section: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", SECTIONS[section], re.MULTILINE | re.DOTALL)


def make_checkout(root: Path, workshop) -> Path:
    """A checkout as a page's reader has it, but with tiny models and data; its code and launchers are ours."""
    root.mkdir(exist_ok=True)
    for name in ("code", "scripts", "requirements.txt"):
        (root / name).symlink_to(ROOT / name)
    teacher, small = workshop.model("gpt2-teacher", hidden=48, seed=1), workshop.model("gpt2-student", seed=2)
    llama = workshop.model("llama-student", family="llama")
    models = {"model_hub/gpt2/gpt2-base": small, "model_hub/gpt2/gpt2-medium": small, "model_hub/mine/small": small,
              "model_hub/gpt2/gpt2-xlarge": teacher, "model_hub/mine/large": teacher,
              "outputs/gpt2/gpt2-xlarge/sft/run/epoch1_step3_loss1.0000": teacher,
              "outputs/my_other_teacher": workshop.model("gpt2-other", hidden=48, seed=3),
              "model_hub/qwen3/qwen3-0.6b": workshop.model("qwen3", family="qwen3", head_dim=8),
              "model_hub/llama2/llama2-7b": workshop.model("llama-teacher", family="llama", hidden=48, seed=1),
              "model_hub/tinyllama/tinyllama-1.1b": llama, "model_hub/gemma3/gemma3-270m": llama,
              "model_hub/smollm2/smollm2-135m-instruct": workshop.model("llama-deep", family="llama", layers=30)}
    for place, model in models.items():
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).symlink_to(model)
    write_data(root / "data" / "dolly", train=24, dev=4, valid=4)
    write_data(root / "data" / "mine", train=12, dev=4, valid=4)
    return root


@pytest.fixture(scope="module")
def checkout(workshop, tmp_path_factory) -> Path:
    root = make_checkout(tmp_path_factory.mktemp("checkout"), workshop)
    for split in ("dev", "valid"):  # as the page of mixed data has it
        (root / "data" / "mine" / f"{split}.jsonl").unlink()
    return root


@pytest.fixture(scope="module")
def runs(checkout) -> Callable[[str], Run]:
    """A section of docs/extending.md, done by a reader who types in what it says."""
    @cache
    def follow(section: str) -> Run:
        for code in blocks(section, "python"):
            (checkout / re.match(r"# (\w+\.py)\n", code)[1]).write_text(code)
        commands, = blocks(section, "bash")
        done = subprocess.run(["bash", "-ec", commands], cwd=checkout, env=environment(SMALL), text=True, timeout=600,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        saved = re.findall(r"saved checkpoint (.+)/epoch", done.stdout)
        return Run(checkout / (saved or ["nowhere"])[-1], done.returncode, done.stdout)

    return follow


@pytest.mark.parametrize("section", in_tiers(SECTIONS, always=SOON, slowly=SECTIONS))
def test_a_section_is_short_and_its_commands_run(runs, section):
    assert runs(section).checkpoint.is_dir()
    assert all(code.count("\n") <= 16 for code in blocks(section, "python"))


def kd(run: Run) -> list[float]:
    return [line["kd"] for line in run.metrics("train")]


def test_a_divergence(runs):
    run = runs("A divergence")
    assert "kd^obj=top_k_kl" in run.folder.name
    assert 0 < kd(run)[-1] < 0.9 * kd(run)[0]


@pytest.mark.slow
def test_an_objective_of_parts(runs):
    run = runs("An objective of parts")
    shares = [line["kd_t"] for line in run.metrics("train")]
    assert shares[0] == 0.2 and shares == sorted(shares) and 0.9 < shares[-1] < 1


@pytest.mark.slow
def test_a_logger(runs):
    run = runs("A logger")
    first = run.metrics("train")[0]
    assert "outputs/logged starts at step 0\n" in run.output
    assert re.search(rf"^outputs/logged 1 {{.*'train/loss': {first['loss']!r},", run.output, re.MULTILINE)
    assert re.search(r"^outputs/logged 12 {.*'dev/loss': ", run.output, re.MULTILINE)
    assert "outputs/logged has ended\n" in run.output


@pytest.mark.slow
def test_a_second_teacher(runs):
    run, alone = (runs(section) for section in ("A second teacher", "A logger"))
    assert re.findall(r"^.* teacher (\S+): ", run.output, re.MULTILINE) == [
        "model_hub/gpt2/gpt2-xlarge", "outputs/my_other_teacher"]
    assert "the mean of 2, weighted 3 : 1" in run.output
    assert kd(run)[0] != pytest.approx(kd(alone)[0], rel=1e-3)


@pytest.mark.slow
def test_a_callable_teacher(runs):
    """It says what the model says that it wraps."""
    run, live = (runs(section) for section in ("A callable teacher", "A logger"))
    assert kd(run) == pytest.approx(kd(live), rel=1e-3)


@pytest.mark.slow
def test_mixed_data(runs):
    run = runs("Mixed data")
    assert "an epoch has 36 samples: 27 of data/dolly (which has 24), 9 of data/mine (which has 12)" in run.output
    assert [line["step"] for line in run.metrics("dev")] == [5, 10, 12]


@pytest.mark.slow
def test_a_hidden_state_term(runs):
    lines = runs("A hidden-state term").metrics("train")
    assert all(lines[-1][name] < lines[0][name] for name in ("hidden_states", "cosine"))
    assert lines[0]["loss"] == pytest.approx(lines[0]["kd"] + 0.1 * lines[0]["hidden_states"] + lines[0]["cosine"])


@pytest.mark.slow
def test_a_model_family(runs):
    run = runs("A model family")
    assert run.folder.parents[1].name == "qwen3-0.6b"
    adapter = json.loads((run.checkpoint / "adapter_config.json").read_text())
    assert sorted(adapter["target_modules"]) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert "license: apache-2.0" in (run.checkpoint / "README.md").read_text()


@pytest.mark.slow
def test_a_data_set(runs, checkout):
    run = runs("A data set")
    sizes = {file.stem: len(file.read_text().splitlines()) for file in (checkout / "data" / "sums").glob("*.jsonl")}
    assert sizes == {"train": 700, "dev": 100, "valid": 100}
    line = json.loads((checkout / "data" / "sums" / "train.jsonl").read_text().splitlines()[0])
    assert "Below is an instruction" in line["prompt"]
    assert int(line["output"]) == sum(map(int, re.findall(r"\d+", line["instruction"])))
    assert "700 samples in steps of 8" in run.output


# What a page's reader puts in place of what it writes in capitals.
PLACEHOLDERS = {"CKPT_PATH": "outputs/a_run/checkpoint", "OTHER_PATH": "outputs/another/checkpoint",
                "LORA_ADAPTER_PATH": "outputs/adapter/checkpoint", "RUN_DIR": "outputs/a_run",
                "TEACHER": "model_hub/gpt2/gpt2-xlarge", "DIR": "outputs/my_cache"}
QUICK = {"SEEDS": 1, "LIMIT": 20, "DEV_NUM": 4, "EVAL_GEN": 0, "MAX_STEPS": 2, "TOKENIZER": "words"}
# With what besides some pages are typed in, each page in a checkout of its own.
BESIDES = {"docs/several-devices.md": {"DRY_RUN": 1}, "docs/teacher-text.md": {"DROP_CUT": 0}}
QUICKLY = "README.md"  # of all pages the one that every run of the tests types in
LESS_QUICKLY = [f"docs/{name}.md" for name in ("training", "library", "resume", "on-policy", "teacher-text")]
WITH_PYTHON = ["README.md"]  # whose Python is a program that is run too
# Run by tests of their own: the quickstart below, and this suite.
APART = ("bash scripts/quickstart.sh", "bash scripts/test.sh")


def python_of(file: Path) -> str:
    """The Python of a page, as one program."""
    return "".join(re.findall(r"^```python\n(.*?)^```", file.read_text(), re.MULTILINE | re.DOTALL))


def typed(file: Path) -> str:
    """The commands of a page, as its reader types them in."""
    commands = "".join(re.findall(r"^```bash\n(.*?)^```", file.read_text(), re.MULTILINE | re.DOTALL))
    commands = "".join(line for line in commands.splitlines(keepends=True) if not line.startswith(APART))
    for name, meant in PLACEHOLDERS.items():
        commands = re.sub(rf"(?<![\w$=]){name}(?!\w)", meant, commands)
    return commands


TYPED = [str(file.relative_to(ROOT)) for file in (ROOT / "README.md", *sorted(DOCS.glob("*.md")))
         if typed(file) and file.name != "extending.md"]  # whose sections are typed in above


def write_sources(raw: Path) -> None:
    """Files of the published sets' sources, of few records, but as many of Dolly as its splits need."""
    alike = {"instruction": "Do it.", "context": "", "response": "done", "category": "open_qa"}
    sentence = " ".join(["word"] * 12)
    lines = {"databricks-dolly-15k.jsonl": [alike | {"instruction": f"Do {i}."} for i in range(1600)],
             "user_oriented_instructions.jsonl": [{"id": "1", "motivation_app": "a", "instruction": "Reply.",
                                                   "instances": [{"input": "Hello", "output": "Hi"}]}],
             "vicuna/question.jsonl": [{"question_id": 1, "text": "Why?", "category": "generic"}],
             "vicuna/answer-gpt-3.5-turbo.jsonl": [{"question_id": 1, "text": "So."}],
             "natural-instructions/tasks/task1_a.json": [
                 {"Definition": ["Define."], "Instances": [{"input": "i", "output": [sentence]}]}],
             "unnatural-instructions/core_data.jsonl": [
                 {"instruction": "Say.", "instances": [{"input": "i", "constraints": "None.", "output": sentence}]}]}
    for name, items in lines.items():
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        (raw / name).write_text("".join(json.dumps(item) + "\n" for item in items))
    (raw / "natural-instructions/splits/default").mkdir(parents=True)
    (raw / "natural-instructions/splits/default/test_tasks.txt").write_text("task1_a\n")


@pytest.fixture(scope="module")
def follow(workshop, tmp_path_factory) -> Callable[[str], subprocess.CompletedProcess]:
    """Types a page in, as a reader who has models, data, two runs that are done, and an adapter."""
    small, llama = workshop.model("gpt2-student", seed=2), workshop.model("llama-student", family="llama")
    made = {"a_run": workshop.train("gpt2/sft_gpt2_base", "docs 1", MODEL_PATH=small),
            "another": workshop.train("gpt2/sft_gpt2_base", "docs 2", MODEL_PATH=small),
            "adapter": workshop.train("tinyllama/sft_tinyllama", "docs 3", MODEL_PATH=llama)}
    for run in made.values():
        assert run.result().checkpoint.is_dir()

    def follow(name: str) -> subprocess.CompletedProcess:
        root = make_checkout(tmp_path_factory.mktemp("reader") / "checkout", workshop)
        for place, run in made.items():
            shutil.copytree(run.result().folder, root / "outputs" / place)
            (root / "outputs" / place / run.result().checkpoint.name).rename(root / "outputs" / place / "checkpoint")
        write_sources(root / "data" / "raw")
        write_sources(root / "downloads")
        variables = environment(SMALL | QUICK | BESIDES.get(name, {})) | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(root / "code"),
            "DS_ACCELERATOR": "cpu"}
        (root / "page.py").write_text(python_of(ROOT / name))
        commands = typed(ROOT / name) + ("python page.py" if name in WITH_PYTHON else "")
        return subprocess.run(["bash", "-exc", commands], cwd=root, env=variables, text=True, timeout=1200,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    return follow


@pytest.fixture(scope="module")
def typed_in(workshop, follow, request) -> dict[str, Future[subprocess.CompletedProcess]]:
    """All other pages that are asked for, several at a time."""
    asked = [item.callspec.params["name"] for item in request.session.items
             if getattr(item, "originalname", "") == "test_commands_run"]
    return {name: workshop.pool.submit(follow, name) for name in asked}


@pytest.mark.slow
def test_the_commands_of_the_readme_run(follow):
    done = follow(QUICKLY)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("name", in_tiers([name for name in TYPED if name != QUICKLY], slowly=LESS_QUICKLY))
def test_commands_run(typed_in, name):
    done = typed_in[name].result()
    assert done.returncode == 0, done.stdout[-3000:]


def test_pages_are_found():
    assert {QUICKLY, *LESS_QUICKLY, *BESIDES} <= set(TYPED)


@pytest.mark.slow
def test_the_quickstart(workshop, tmp_path):
    """On a tiny model with as many layers; what it installs is there."""
    root = make_checkout(tmp_path / "checkout", workshop)
    (root / "data" / "demo").symlink_to(ROOT / "data" / "demo")
    python = root / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (root / ".venv" / ".installed").write_text((ROOT / "requirements.txt").read_text().rstrip("\n"))

    def run() -> str:
        done = subprocess.run(["bash", "scripts/quickstart.sh"], cwd=root, env=environment({}), text=True, timeout=1800,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode == 0, done.stdout[-3000:]
        return done.stdout

    first, second = run(), run()
    end = first.split("== ROUGE-L on ")[1]  # each evaluation prints a table of its own before
    tables = [line.split("|")[1].strip() for line in end.splitlines() if line.startswith("| ")]
    rows = ["student, pruned", "student, SFT", "student, forward_kl", "student, ToDi", "teacher"]
    assert [name for name in tables if "--" not in name] == [
        "ROUGE-L", *rows, "less student, ToDi", *(name for name in rows if name != "student, ToDi")]
    assert end.count("p = ") == 8  # of the set and of the average
    assert (root / "outputs/quickstart/curves.png").read_bytes().startswith(b"\x89PNG")
    assert second.count("already there") == second.count("== ") - 1
    assert second.split("== ROUGE-L on ")[1] == end


def test_the_gradients_of_the_page():
    """docs/objectives.md, "Gradients": each line is evaluated and compared with autograd."""
    lines = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|$", (DOCS / "objectives.md").read_text(), re.MULTILINE)
    written = [name for name, _ in lines]
    assert written == [name for name in DIVERGENCES if name in written] and len(written) >= 10
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 5, 11, dtype=torch.float64)
    temperature = 2.0
    log_p, log_q = (teacher / temperature).log_softmax(-1), (student / temperature).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    ascending, order = p.sort(-1)
    gap = (ascending - q.gather(-1, order)).abs()
    head = (gap * (ascending.cumsum(-1) > 0.5)).sum(-1, keepdim=True)
    weights = {"ToDi": (log_p - log_q).sigmoid(), "adaptive_kl": head / gap.sum(-1, keepdim=True)}
    for name, formula in lines:
        logits = student.clone().requires_grad_()
        build_divergence(name)(logits, teacher, temperature=temperature).sum().backward()
        h = eval(formula, {"p": p, "q": q, "log_q": log_q, "r": log_q - log_p, "log": torch.log, "sign": torch.sign,
                           "a": 0.1, "w": weights.get(name), **build_divergence(name).params})
        torch.testing.assert_close((h - q * h.sum(-1, keepdim=True)) / temperature, logits.grad)


def test_the_site_has_every_page():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    named = re.findall(r"[\w-]+\.md", json.dumps(nav))
    assert sorted(named) == sorted(file.name for file in DOCS.glob("*.md"))


# A tree names files by their place in it (tests/test_house.py); a reader's own and llama.cpp's are nowhere.
FILE = re.compile(r"(?<![\w./>$-])(?!my_|convert_|file\.py)(?:[\w.-]+/)*[\w-]+\.(?:py|sh|md|toml|lock)\b")


def names_of_files(text: str) -> set[str]:
    trees = re.findall(r"^```\n.*?^```", text, re.MULTILINE | re.DOTALL)
    for tree in trees:
        text = text.replace(tree, "")
    return set(FILE.findall(text))


def headings(text: str) -> set[str]:
    """As links name them."""
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
            for title in re.findall(r"^#+ (.*)", text, re.MULTILINE)}


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.name)
def test_links_and_names_lead_somewhere(file):
    text = file.read_text()
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        place = (file.parent / target) if target else file
        assert place.exists(), target
        assert not anchor or anchor in headings(place.read_text()), f"{target}#{anchor}"
    bases = (ROOT, file.parent, ROOT / "code", ROOT / "code" / "todi")
    assert not [name for name in names_of_files(text) if not any((base / name).exists() for base in bases)]
    modules = re.findall(r"(?:-m|from|import) (todi[\w.]*\w)", text)
    places = [ROOT / "code" / module.replace(".", "/") for module in modules]
    assert not [place for place in places if not (place.is_dir() or place.with_suffix(".py").is_file())]


def test_a_name_that_leads_nowhere_is_seen():
    assert names_of_files("`nowhere/gone.py`, my_own.py and\n```\n  tree.py\n```\n[x](other.md)") == {
        "nowhere/gone.py", "other.md"}


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.name)
def test_variables_are_there(file):
    """Those that a command sets are declared."""
    known = {*LAUNCHER_VARIABLES, *re.findall(r"`([A-Z][A-Z_]+)`", page()), "RAW_DIR", "TOKENIZER"}
    commands = "\n".join(re.findall(r"^```bash\n(.*?)^```", file.read_text(), re.MULTILINE | re.DOTALL))
    given = set(re.findall(r"(?:^|\s)([A-Z][A-Z_]+)=", commands))
    assert given <= known


def test_the_published_schedule(monkeypatch):
    """What docs/published.md has for it is what the published code takes."""
    code, = re.findall(r"^```python\n(.*?)^```", (DOCS / "published.md").read_text(), re.MULTILINE | re.DOTALL)
    monkeypatch.setattr(SCHEDULES, "_entries", dict(SCHEDULES._entries))
    exec(code, {})

    def rates(build) -> list[float]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=5e-4)
        schedule, found = build(optimizer), []
        for _ in range(41):
            found.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        return found
    assert rates(lambda optimizer: build_schedule(optimizer, "polynomial", total_steps=40, warmup_steps=0, lr=5e-4,
                                                  lr_min=1e-7)) == pytest.approx(
        rates(lambda optimizer: get_polynomial_decay_schedule_with_warmup(optimizer, 0, 40, power=0.5)))
