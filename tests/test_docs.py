"""The documentation: what docs/extending.md says is typed in and run; links and names of files lead somewhere."""

import json
import re
import subprocess
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from launching import ROOT, Run, environment, write_data
from todi.schedules import SCHEDULES
from todi.settings import LAUNCHER_VARIABLES, page
from todi.training.optimizer import build_schedule
from transformers import get_polynomial_decay_schedule_with_warmup

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
SECTIONS = dict(text.split("\n", 1) for text in (DOCS / "extending.md").read_text().split("\n## ")[1:])
# No more than that: paths, and what they name, are the page's own.
SMALL = {"EPOCH": 4, "MAX_STEPS": 12, "BATCH_SIZE": 4, "GRAD_ACC": 2, "MAX_LENGTH": 64, "MAX_PROMPT_LENGTH": 48,
         "PRECISION": "fp32", "EVAL_GEN": 0, "LOG_INTERVAL": 1, "LR": 1e-2, "LORA_RANK": 4, "KD_RATE": 1}


def blocks(section: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", SECTIONS[section], re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def checkout(workshop, tmp_path_factory) -> Path:
    """A checkout as the page's reader has it, but with tiny models and data; its code and launchers are ours."""
    root = tmp_path_factory.mktemp("checkout")
    for name in ("code", "scripts"):
        (root / name).symlink_to(ROOT / name)
    teacher = workshop.model("gpt2-teacher", hidden=48, seed=1)
    models = {"model_hub/gpt2/gpt2-base": workshop.model("gpt2-student", seed=2), "model_hub/gpt2/gpt2-xlarge": teacher,
              "outputs/gpt2/gpt2-xlarge/sft/run/epoch1_step3_loss1.0000": teacher,
              "outputs/my_other_teacher": workshop.model("gpt2-other", hidden=48, seed=3),
              "model_hub/qwen3/qwen3-0.6b": workshop.model("qwen3", family="qwen3", head_dim=8)}
    for place, model in models.items():
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).symlink_to(model)
    write_data(root / "data" / "dolly", train=24, dev=4)
    write_data(root / "data" / "mine", train=12)
    return root


@pytest.fixture(scope="module")
def runs(workshop, checkout) -> dict[str, Future[Run]]:
    """Every section of docs/extending.md, done by a reader who types in what it says."""
    def follow(section: str) -> Run:
        for code in blocks(section, "python"):
            (checkout / re.match(r"# (\w+\.py)\n", code)[1]).write_text(code)
        commands, = blocks(section, "bash")
        done = subprocess.run(["bash", "-ec", commands], cwd=checkout, env=environment(SMALL), text=True, timeout=600,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        saved = re.findall(r"saved checkpoint (\S+)/", done.stdout)
        return Run(checkout / (saved or ["nowhere"])[-1], done.returncode, done.stdout)

    return {section: workshop.pool.submit(follow, section) for section in SECTIONS}


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_is_short_and_its_commands_run(runs, section):
    assert runs[section].result().checkpoint.is_dir()
    assert all(code.count("\n") <= 16 for code in blocks(section, "python"))


def kd(run: Run) -> list[float]:
    return [line["kd"] for line in run.metrics("train")]


def test_a_divergence(runs):
    run = runs["A divergence"].result()
    assert "kd^obj=top_k_kl" in run.folder.name
    assert 0 < kd(run)[-1] < 0.9 * kd(run)[0]


def test_a_logger(runs):
    run = runs["A logger"].result()
    first = run.metrics("train")[0]
    assert "outputs/logged starts at step 0\n" in run.output
    assert re.search(rf"^outputs/logged 1 {{.*'train/loss': {first['loss']!r},", run.output, re.MULTILINE)
    assert re.search(r"^outputs/logged 12 {.*'dev/loss': ", run.output, re.MULTILINE)
    assert "outputs/logged has ended\n" in run.output


def test_a_second_teacher(runs):
    run, alone = (runs[section].result() for section in ("A second teacher", "A logger"))
    assert re.findall(r"^.* teacher (\S+): ", run.output, re.MULTILINE) == [
        "model_hub/gpt2/gpt2-xlarge", "outputs/my_other_teacher"]
    assert "the mean of 2, weighted 3 : 1" in run.output
    assert kd(run)[0] != pytest.approx(kd(alone)[0], rel=1e-3)


def test_a_callable_teacher(runs):
    """It says what the model says that it wraps."""
    run, live = (runs[section].result() for section in ("A callable teacher", "A logger"))
    assert kd(run) == pytest.approx(kd(live), rel=1e-3)


def test_mixed_data(runs):
    run = runs["Mixed data"].result()
    assert "an epoch has 36 samples: 27 of data/dolly (which has 24), 9 of data/mine (which has 12)" in run.output
    assert [line["step"] for line in run.metrics("dev")] == [5, 10, 12]


def test_a_hidden_state_term(runs):
    lines = runs["A hidden-state term"].result().metrics("train")
    assert all(lines[-1][name] < lines[0][name] for name in ("hidden_states", "cosine"))
    assert lines[0]["loss"] == pytest.approx(lines[0]["kd"] + 0.1 * lines[0]["hidden_states"] + lines[0]["cosine"])


def test_a_model_family(runs):
    run = runs["A model family"].result()
    assert run.folder.parents[1].name == "qwen3-0.6b"
    adapter = json.loads((run.checkpoint / "adapter_config.json").read_text())
    assert sorted(adapter["target_modules"]) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert "license: apache-2.0" in (run.checkpoint / "README.md").read_text()


def test_a_data_set(runs, checkout):
    run = runs["A data set"].result()
    sizes = {file.stem: len(file.read_text().splitlines()) for file in (checkout / "data" / "sums").glob("*.jsonl")}
    assert sizes == {"train": 700, "dev": 100, "valid": 100}
    line = json.loads((checkout / "data" / "sums" / "train.jsonl").read_text().splitlines()[0])
    assert "Below is an instruction" in line["prompt"]
    assert int(line["output"]) == sum(map(int, re.findall(r"\d+", line["instruction"])))
    assert "700 samples in steps of 8" in run.output


# A tree names files by their place in it (tests/test_house.py); a reader's own are nowhere.
FILE = re.compile(r"(?<![\w./>$-])(?!my_|file\.py)(?:[\w.-]+/)*[\w-]+\.(?:py|sh|md|toml|lock)\b")


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
