"""Instruction sets from local raw files; a source that is out of reach."""

import hashlib
import json
import socket

import pytest
from evaluating import run
from launching import run as launch
from tiny import tiny_model, tiny_tokenizer
from todi.data import prepare, sources
from todi.data.records import load_records
from todi.data.templates import alpaca_prompt

LONG = "one two three four five six seven eight nine ten eleven"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*_, **__):
        raise socket.gaierror("Name or service not known")
    monkeypatch.setattr(sources.urllib.request, "urlopen", refuse)


def write_lines(path, *items):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


def prepared(monkeypatch, tmp_path, *words):
    code = run(monkeypatch, prepare, *words, "--tokenizer", "words", "--raw-dir", tmp_path / "raw", "--data-dir",
               tmp_path / "data")
    assert code == 0
    return {file.relative_to(tmp_path / "data").as_posix(): [json.loads(line) for line in file.open()]
            for file in sorted((tmp_path / "data").rglob("*.jsonl"))}


def test_dolly_is_split_at_random_and_without_long_prompts(monkeypatch, tmp_path):
    items = [{"instruction": f"Do {i}", "context": "word " * 300 if i % 100 == 7 else "a text" * (i % 2),
              "response": f"done {i}", "category": "open_qa"} for i in range(1700)]
    write_lines(tmp_path / "raw/databricks-dolly-15k.jsonl", *items)
    made = prepared(monkeypatch, tmp_path, "dolly")
    assert {name: len(lines) for name, lines in made.items()} == {
        "dolly/dev.jsonl": 1000, "dolly/train.jsonl": 183, "dolly/valid.jsonl": 500}  # 17 prompts are too long
    everything = [line["instruction"] for lines in made.values() for line in lines]
    assert len(set(everything)) == len(everything) == 1683
    first = made["dolly/valid.jsonl"][0]
    assert list(first) == ["topic", "instruction", "input", "output", "prompt"]
    assert first["prompt"] == alpaca_prompt(first["instruction"], first["input"])
    assert {record.references[0].split()[0] for record in load_records(tmp_path / "data/dolly/train.jsonl")} == {"done"}

    about = json.loads((tmp_path / "data/dolly/sources.json").read_text())
    for name, what in about["files"].items():
        assert what["sha256"] == hashlib.sha256((tmp_path / "data/dolly" / name).read_bytes()).hexdigest()
    assert list(about["sources"]) == ["databricks-dolly-15k.jsonl"]
    assert prepared(monkeypatch, tmp_path, "dolly") == made
    other = prepared(monkeypatch, tmp_path, "dolly", "--seed", 11, "--limit", 20)
    assert {len(lines) for lines in other.values()} == {20}
    assert other["dolly/valid.jsonl"] != made["dolly/valid.jsonl"][:20]


def test_the_other_sets(monkeypatch, tmp_path):
    raw = tmp_path / "raw"
    write_lines(raw / "user_oriented_instructions.jsonl", {
        "id": "user_oriented_task_0", "motivation_app": "Gmail", "instruction": "Reply.",
        "instances": [{"input": "Hello", "output": "Hi"}]})
    write_lines(raw / "vicuna/question.jsonl", {"question_id": 2, "text": "Why?", "category": "generic"},
                {"question_id": 1, "text": "Who?", "category": "generic"})
    write_lines(raw / "vicuna/answer-gpt-3.5-turbo.jsonl", {"question_id": 1, "text": "Me."},
                {"question_id": 2, "text": "So."})
    ni = raw / "natural-instructions"
    for name in ("task1_a", "task2_b", "task3_train"):
        write_lines(ni / f"tasks/{name}.json", {"Definition": [f"Define {name}."], "Instances": [
            {"input": f"i{i}", "output": [f"{LONG} {i}", "short"] if i % 2 else ["short"]} for i in range(103)]})
    (ni / "splits/default").mkdir(parents=True)
    (ni / "splits/default/test_tasks.txt").write_text("task1_a\ntask2_b\n")
    write_lines(raw / "unnatural-instructions/core_data.jsonl", {"instruction": "Say.", "instances": [
        {"input": f"i{i}", "constraints": "None.", "output": LONG} for i in range(10_003)]},
        {"instruction": "Short.", "instances": [{"input": "i", "output": "short"}]})

    made = prepared(monkeypatch, tmp_path, "self-inst", "vicuna", "sinst/11_", "UINST/11_")
    assert made["self-inst/valid.jsonl"] == [{
        "topic": "Gmail", "instruction": "Reply.", "input": "Hello", "output": "Hi",
        "prompt": alpaca_prompt("Reply.", "Hello")}]
    assert [(line["instruction"], line["output"]) for line in made["vicuna/valid.jsonl"]] == [
        ("Why?", "So."), ("Who?", "Me.")]
    natural = made["sinst/11_/valid.jsonl"]
    assert len(natural) == 100  # of two tasks, half of 100 each
    assert natural[0] == {"topic": "task1_a", "instruction": "Define task1_a.", "input": "i1",
                          "output": [f"{LONG} 1", "short"], "prompt": alpaca_prompt("Define task1_a.", "i1")}
    unnatural = made["uinst/11_/valid.jsonl"]
    assert len(unnatural) == 10_000
    assert [line["input"] for line in unnatural] == [f"i{i}" for i in range(10_000)]  # the first


def test_a_source_out_of_reach_says_where_to_put_what(monkeypatch, tmp_path, capsys):
    words = ["self-inst", "sinst/11_", "uinst/11_", "--tokenizer", "words", "--raw-dir", tmp_path / "raw",
             "--data-dir", tmp_path / "data"]
    assert run(monkeypatch, prepare, *words) == 2
    first, second, third = capsys.readouterr().err.splitlines()
    github = "https://raw.githubusercontent.com"
    assert first == (
        f"error: cannot download {github}/yizhongw/self-instruct/main/human_eval/user_oriented_instructions.jsonl "
        f"(Name or service not known); put user_oriented_instructions.jsonl at "
        f"{tmp_path}/raw/user_oriented_instructions.jsonl")
    assert second.endswith(f"or a checkout of https://github.com/allenai/natural-instructions at {tmp_path}/raw/"
                           "natural-instructions")
    assert third.endswith(f"put core_data.jsonl at {tmp_path}/raw/unnatural-instructions/core_data.jsonl")
    assert not (tmp_path / "data").exists()
    assert not [path for path in (tmp_path / "raw").rglob("*") if path.is_file()]


def test_published_sets_count_gpt2s_tokens(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "raw/user_oriented_instructions.jsonl", *[
        {"motivation_app": "Gmail", "instruction": text, "instances": [{"input": "", "output": "Hi"}]}
        for text in ("Reply.", "q" * 200, "w " * 200)])
    words = ["self-inst", "--raw-dir", tmp_path / "raw", "--data-dir", tmp_path / "data"]
    assert run(monkeypatch, prepare, *words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: no model at model_hub/gpt2/gpt2-base")
    assert "bash scripts/models/fetch.sh gpt2-base brings them" in said and said.count("\n") == 1
    assert not (tmp_path / "data").exists()

    tiny_tokenizer(tmp_path / "model_hub/gpt2/gpt2-base")
    tiny_model(tmp_path / "model_hub/gpt2/gpt2-base")
    assert run(monkeypatch, prepare, *words) == 0
    assert len(load_records(tmp_path / "data/self-inst/valid.jsonl")) == 1  # 200 letters or words are 200 tokens
    about = json.loads((tmp_path / "data/self-inst/sources.json").read_text())
    assert about["settings"]["tokenizer"] == "model_hub/gpt2/gpt2-base"
    assert run(monkeypatch, prepare, *words, "--tokenizer", "words") == 0
    assert len(load_records(tmp_path / "data/self-inst/valid.jsonl")) == 3


@pytest.mark.parametrize(("words", "message"), [
    ([], "name at least one set of dolly, self-inst, vicuna, sinst/11_, uinst/11_"),
    (["doly"], "unknown set 'doly'; did you mean dolly? allowed: dolly"),
    (["dolly", "--limit", 0], "--limit must be at least 1, got 0"),
    (["dolly", "--tokenizer", "no/such/folder/here"], "no model at no/such/folder/here"),
])
def test_bad_settings(monkeypatch, tmp_path, capsys, words, message):
    assert run(monkeypatch, prepare, *words, "--raw-dir", tmp_path) == 2
    assert f"error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(("lines", "message"), [
    ('{"instruction": "a"}\n', "not of the form of dolly (KeyError('category'))"),
    ("[]\n", "databricks-dolly-15k.jsonl:1: expected an object, got list"),
    ("{\n", "databricks-dolly-15k.jsonl:1: not JSON"),
    ("", "databricks-dolly-15k.jsonl in PLACE: no item of dolly is left"),
    ('{"instruction": "a", "context": "", "response": "b", "category": "c"}\n' * 1500,
     "databricks-dolly-15k.jsonl in PLACE: 1500 items of dolly are too few for its splits, which would have train 0 of "
     "at least 1"),
    ('{"instruction": "a", "context": "", "response": "b", "category": "c"}\n' * 600,
     "600 items of dolly are too few for its splits, which would have dev 100 of 1000, train 0 of at least 1"),
    ("[" * 100_000 + "\n", "databricks-dolly-15k.jsonl"),
    ('{"instruction": "a", "context": "", "response": "b \\ud83d", "category": "c"}\n',
     "the item with the instruction 'a' has half of a character, \\ud83d, at place 3"),
    ('{"instruction": "a", "context": "", "response": null, "category": "b"}\n', "not of the form of dolly"),
])
def test_raw_files_of_another_form(monkeypatch, tmp_path, capsys, lines, message):
    (tmp_path / "databricks-dolly-15k.jsonl").write_text(lines)
    assert run(monkeypatch, prepare, "dolly", "--tokenizer", "words", "--raw-dir", tmp_path, "--data-dir",
               tmp_path / "data") == 2
    said = capsys.readouterr().err
    assert message.replace("PLACE", str(tmp_path)) in said
    assert said.startswith("error: ") and said.count("\n") == 1
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(("name", "url"), [("x.jsonl", "no url"), ("x.jsonl", "http://[x"), ("x.jsonl", "htp://x"),
                                           ("x.jsonl", "http://a b/c"), ("x.jsonl", ""), ("x\0.jsonl", "http://x"),
                                           ("x.jsonl", None), ("", "http://x"), ("../x.jsonl", "file:///nowhere")])
def test_a_source_with_a_bad_address(monkeypatch, tmp_path, capsys, name, url):
    monkeypatch.undo()  # no address is looked up before it is read
    monkeypatch.setitem(sources.SOURCES._entries, "bad", ("bad", sources.Source(
        lambda raw: raw.lines(name, url), sources.Cut({"valid": None}), "none")))
    assert run(monkeypatch, prepare, "bad", "--raw-dir", tmp_path / "raw", "--data-dir", tmp_path / "data") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and str(tmp_path) in said
    assert ": : " not in said and "error:  in" not in said


@pytest.mark.slow
def test_from_a_shell(tmp_path):
    write_lines(tmp_path / "user_oriented_instructions.jsonl", *[
        {"motivation_app": "Gmail", "instruction": "Reply.", "instances": [{"input": "", "output": "Hi"}]}] * 3)
    done = launch("data/prepare", "self-inst", RAW_DIR=tmp_path, DATA_DIR=tmp_path / "data", LIMIT=2, TOKENIZER="words")
    assert done.returncode == 0, done.stdout
    assert "self-inst: valid.jsonl 2; 0 of 3 items were left out by length" in done.stdout
