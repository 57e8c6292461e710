"""Teacher text: what todi.generate writes, killed and started again, over ranks, refused, and trained on."""

import dataclasses
import json
import shlex
import shutil

import pytest
import torch
from evaluating import add_adapter, run
from launching import ROOT, slow, write_data
from launching import run as launch
from test_chat import chat_tokenizer, turns, write
from tiny import tiny_model
from todi import generate
from todi.data.records import load_records
from todi.generation import text_files
from todi.generation.decoding import Decoding, Response, stop_ids, to_training_texts
from todi.generation.decoding import generate as decode
from todi.generation.sampling import stream_key
from todi.generation.text_files import Selection, TextFolder
from todi.generation.writer import Layout
from todi.options import parse
from todi.runtime.checksums import UNREAD, file_checksum
from todi.runtime.locks import claimed
from todi.runtime.storage import write_bytes, write_text
from todi.settings import GenerateConfig, TrainConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

LENGTHS = ("--max-length", 64, "--max-prompt-length", 32)
SETTINGS = {"PRECISION": "fp32", "MAX_LENGTH": 64, "MAX_PROMPT_LENGTH": 32}  # the same, for a launcher


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A tiny model that ends some of its responses within a few tokens."""
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = chat_tokenizer(folder)
    tiny_model(folder, "llama", vocab=len(tokenizer), seed=3)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 3
        model.lm_head.weight[tokenizer.convert_tokens_to_ids("<|end|>")] *= 3
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path):
    """A folder of nine prompts of three lengths, and a dev set."""
    return write_data(tmp_path / "prompts", train=9, dev=2)


@pytest.fixture
def written(monkeypatch, teacher, prompts, tmp_path):
    """Runs todi.generate into tmp_path / name; its exit code."""
    def written(name, *words, data=(prompts,), model=teacher):
        return run(monkeypatch, generate, "--model-path", model, "--data-dir", *data, "--save-dir", tmp_path / name,
                   "--precision", "fp32", *LENGTHS, *words)
    return written


@pytest.fixture
def no_weights(monkeypatch):
    """Loading weights fails the test."""
    def no_weights():
        monkeypatch.setattr("todi.generation.writing_model.load_model",
                            lambda *_, **__: pytest.fail("weights were loaded"))
    return no_weights


def die():
    raise KeyboardInterrupt


def files(folder):
    """All that lies there, to the byte."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def lines(folder):
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


def counts(folder):
    return json.loads((folder / "made_with.json").read_text())["responses"]


class TestWhatIsWritten:
    def test_what_the_model_says_to_each_prompt_alone(self, written, teacher, prompts, tmp_path):
        assert written("text", "--seeds", 1, 2) == 0
        model, tokenizer = AutoModelForCausalLM.from_pretrained(teacher), AutoTokenizer.from_pretrained(teacher)
        records, decoding = load_records(prompts / "train.jsonl"), Decoding(max_length=64, max_new_tokens=64)
        expected, responses = [], []
        for seed in (1, 2):
            for index, record in enumerate(records):
                ids = tokenizer(record.prompt, add_special_tokens=False)["input_ids"][:32]
                response, = decode(model, [ids], [stream_key("teacher text", seed, index)], decoding=decoding,
                                   eos_ids=stop_ids(model, tokenizer, records), pad_id=0, batch_size=1)
                text, = to_training_texts([response], tokenizer)
                responses.append(response)
                if not response.cut and text.strip():
                    expected.append({"prompt": record.prompt, "output": text})
        assert lines(tmp_path / "text") == expected
        assert any(line["output"] != line["output"].strip() for line in expected), "the teacher's own space stays"
        cut = sum(response.cut for response in responses)
        found = counts(tmp_path / "text")
        assert 0 < cut < 18 and 0 < len(expected) < 18
        assert (found["written"], found["kept"], found["dropped"]["cut"]) == (18, len(expected), cut)
        assert found["cut_share"] == cut / 18
        assert found["kept"] + sum(found["dropped"].values()) == 18
        assert (tmp_path / "text/dev.jsonl").read_bytes() == (prompts / "dev.jsonl").read_bytes()

    def test_it_says_what_made_it(self, written, prompts, tmp_path, capsys):
        assert written("text", "--temperature", 0.9, "--seeds", 3) == 0
        record = json.loads((tmp_path / "text/made_with.json").read_text())
        made_with = record["made_with"]
        assert (made_with["temperature"], made_with["seeds"], made_with["precision"]) == (0.9, [3], "fp32")
        assert made_with["no_repeat_ngram_size"] == 0
        assert all(len(made_with[name]) == 64 for name in ("model", "prompts", "dev.jsonl"))
        assert record["selection"] == {"drop_cut": True, "least_tokens": 1, "most_tokens": None}
        assert record["layouts"] == [{"batch_size": 256, "processes": 1}]
        assert record["files"] == {name: file_checksum(tmp_path / "text" / name)
                                   for name in ("train.jsonl", "dev.jsonl")}
        assert record["files"]["dev.jsonl"] == made_with["dev.jsonl"]
        found = record["responses"]
        assert f"{found['kept']} responses of 9 ({found['dropped']['cut']} cut" in capsys.readouterr().out
        assert sorted(files(tmp_path / "text")) == ["dev.jsonl", "made_with.json", "train.jsonl"]

    def test_neither_order_nor_text_depends_on_the_batch_size(self, written, tmp_path):
        for size in (1, 4, 64):
            assert written(f"{size}", "--seeds", 1, 2, "--batch-size", size) == 0
        alone = files(tmp_path / "1")
        for name in ("train.jsonl", "dev.jsonl"):
            assert files(tmp_path / "4")[name] == files(tmp_path / "64")[name] == alone[name]
        assert counts(tmp_path / "1") == counts(tmp_path / "4")

    @pytest.mark.slow
    def test_nor_on_the_number_of_ranks(self, written, teacher, prompts, tmp_path):
        assert written("alone", "--batch-size", 3) == 0
        common = {"MODEL_PATH": teacher, "TEACHER_MODEL_PATH": teacher, "DATA_DIR": prompts, "NPROC": 2, **SETTINGS,
                  "EVAL_BATCH_SIZE": 2, "TEXT_DIR": tmp_path / "ranks", "SAVE_DIR": tmp_path / "run", "MAX_STEPS": 1,
                  "EVAL_GEN": 0}
        done = launch("smollm2/seqkd_smollm2", "--model-type", "auto", **common)
        assert done.returncode == 0, done.stdout
        assert "device: cpu x 2" in done.stdout
        assert lines(tmp_path / "ranks") == lines(tmp_path / "alone")

    def test_greedy_takes_one_seed_and_beams_are_searched(self, written, tmp_path):
        words = ["--no-do-sample", "--no-drop-cut", "--seeds", 5, 6]
        assert written("greedy", *words) == written("beams", *words, "--num-beams", 3) == 0
        assert counts(tmp_path / "greedy")["written"] == counts(tmp_path / "beams")["written"] == 9
        assert lines(tmp_path / "greedy") != lines(tmp_path / "beams")

    def test_an_adapter_is_merged_into_the_base_that_it_names(self, monkeypatch, written, teacher, prompts, tmp_path):
        add_adapter(teacher, tmp_path / "adapter")
        assert written("base") == 0
        assert run(monkeypatch, generate, "--peft-path", tmp_path / "adapter", "--data-dir", prompts, "--save-dir",
                   tmp_path / "adapted", "--precision", "fp32", *LENGTHS) == 0
        assert (tmp_path / "adapted/train.jsonl").read_bytes() != (tmp_path / "base/train.jsonl").read_bytes()

    def test_several_folders_and_one_without_dev(self, written, prompts, tmp_path):
        more = write_data(tmp_path / "more", train=2)
        (prompts / "dev.jsonl").write_text((prompts / "dev.jsonl").read_text().rstrip("\n"))
        last = write_data(tmp_path / "last", train=1, dev=1)
        assert written("text", "--no-drop-cut", "--limit", 4, data=(prompts, more, last)) == 0
        assert counts(tmp_path / "text")["written"] == 4 + 2 + 1
        assert len(load_records(tmp_path / "text/dev.jsonl")) == 2 + 1


class TestPrompts:
    def test_without_responses(self, written, prompts, tmp_path):
        assert written("with", "--no-drop-cut") == 0
        bare = write(tmp_path / "bare/train.jsonl", *[{"prompt": record.prompt}
                                                      for record in load_records(prompts / "train.jsonl")])
        assert written("without", "--no-drop-cut", data=(bare.parent,)) == 0
        assert lines(tmp_path / "without") == lines(tmp_path / "with")
        assert not (tmp_path / "without/dev.jsonl").exists()

    def test_conversations(self, written, tmp_path):
        """The model's last message is added; training puts the template around it again."""
        answered, open_ended = turns("Hi", "Yes?", "Which number?", "7."), turns("Hi", "Yes?", "Which number?")
        for name, messages in (("answered", answered), ("open", open_ended)):
            write(tmp_path / name / "train.jsonl", *[{"messages": messages}] * 6)
            assert written(f"{name} text", "--no-drop-cut", data=(tmp_path / name,)) == 0
        found = lines(tmp_path / "open text")
        assert found == lines(tmp_path / "answered text")
        assert all(line["messages"][:3] == open_ended for line in found)
        assert len({line["messages"][3]["content"] for line in found}) > 1, "each prompt has its own stream"
        assert len(load_records(tmp_path / "open text/train.jsonl")) == len(found)


class TestSelection:
    @pytest.mark.parametrize(("ids", "cut", "text", "selection", "reason"), [
        ([1, 2], False, "ab", Selection(), None),
        ([1, 2], True, "ab", Selection(), "cut"),
        ([1, 2], True, "ab", Selection(drop_cut=False), None),
        ([], False, "", Selection(), "empty"),
        ([1], False, " \n", Selection(drop_cut=False), "empty"),
        ([1, 2], False, "ab", Selection(least_tokens=3), "too short"),
        ([1, 2], False, "ab", Selection(least_tokens=2, most_tokens=2), None),
        ([1, 2], False, "ab", Selection(most_tokens=1), "too long"),
        ([1, 2], True, "ab", Selection(most_tokens=1), "cut"),
    ])
    def test_why_a_response_is_left_out(self, ids, cut, text, selection, reason):
        assert selection.reason_against(Response(ids, cut), text) == reason

    def test_by_length(self, written, tmp_path):
        assert written("all", "--seeds", 1, 2, 3) == 0
        assert written("some", "--seeds", 1, 2, 3, "--least-tokens", 3, "--most-tokens", 12) == 0
        kept, every = lines(tmp_path / "some"), lines(tmp_path / "all")
        assert 0 < len(kept) < len(every)
        assert [line for line in every if line in kept] == kept
        dropped = counts(tmp_path / "some")["dropped"]
        assert len(every) - len(kept) == dropped.get("too short", 0) + dropped.get("too long", 0)

    def test_none_is_kept_and_nothing_is_lost(self, written, no_weights, tmp_path, capsys):
        assert written("text", "--least-tokens", 500) == 1
        assert "error: no response is kept of 9 (" in capsys.readouterr().err
        assert list(files(tmp_path / "text")) == [".unfinished.jsonl"]
        no_weights()
        assert written("text", "--no-drop-cut") == 0
        assert counts(tmp_path / "text")["written"] == 9


class TestGoingOn:
    def test_a_killed_run_ends_with_the_same_bytes(self, monkeypatch, written, tmp_path):
        words = ["--seeds", 1, 2, "--batch-size", 1]
        assert written("whole", *words) == 0
        add, rounds = TextFolder.add, []

        def counted(self, responses):
            rounds.append(len(responses))
            add(self, responses)

        def killed(self, responses):
            counted(self, responses) if len(rounds) < 2 else die()
        monkeypatch.setattr(TextFolder, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            written("killed", *words)
        unfinished = tmp_path / "killed/.unfinished.jsonl"
        unfinished.write_text(unfinished.read_text() + "\n[[1, 0, [3")  # as a kill in the middle of a line leaves it
        monkeypatch.setattr(TextFolder, "add", counted)
        assert written("killed", *words) == 0
        assert rounds == [4, 4, 4, 4, 2]  # of four batches
        assert files(tmp_path / "killed") == files(tmp_path / "whole")

    @pytest.mark.parametrize("name", ["train.jsonl", "made_with.json"])
    def test_killed_while_it_puts_files_in_place(self, monkeypatch, written, no_weights, tmp_path, name):
        assert written("whole") == 0
        with monkeypatch.context() as patch:
            for function in (write_bytes, write_text):
                patch.setattr(text_files, function.__name__, lambda path, content, function=function:
                              die() if path.name == name else function(path, content))
            with pytest.raises(KeyboardInterrupt):
                written("killed")
        no_weights()
        assert written("killed") == 0
        assert files(tmp_path / "killed") == files(tmp_path / "whole")

    def test_what_is_finished_is_left_alone(self, written, no_weights, tmp_path, capsys):
        assert written("text") == 0
        before = files(tmp_path / "text")
        no_weights()
        assert written("text", "--batch-size", 2) == 0
        assert "text is there already, made with the same settings" in capsys.readouterr().out
        assert files(tmp_path / "text") == before
        (tmp_path / "text/train.jsonl").write_text('{"prompt": "a", "output": "b"}\n')
        assert written("text") == 0
        assert "train.jsonl was changed after it was written" in capsys.readouterr().out
        assert len(lines(tmp_path / "text")) == 1

    def test_a_file_that_is_gone_is_written_again(self, written, tmp_path):
        assert written("text") == 0
        before = files(tmp_path / "text")
        (tmp_path / "text/train.jsonl").unlink()
        assert written("text") == 0
        assert files(tmp_path / "text") == before


class TestRefusals:
    """One clear line for each problem, exit code 2, and no weights loaded."""

    @pytest.mark.parametrize(("words", "said"), [
        (["--temperature", 0.5], "temperature 1.0, where this run has 0.5"),
        (["--seeds", 3], "seeds [10], where this run has [3]"),
        (["--limit", 4], "other prompts"),
        (["--no-drop-cut"], "drop_cut True, where this run has False"),
    ])
    def test_text_that_was_made_otherwise(self, written, no_weights, tmp_path, capsys, words, said):
        assert written("text") == 0
        before = files(tmp_path / "text")
        no_weights()
        capsys.readouterr()
        for more in ([], ["--check-only"]):
            assert written("text", *words, *more) == 2
            error, = capsys.readouterr().err.splitlines()
            assert error == (f"error: {tmp_path}/text holds text that was made with {said}. Choose another --save-dir "
                             "(TEXT_DIR), or remove that folder")
        assert files(tmp_path / "text") == before

    def test_another_model_and_an_unfinished_run(self, monkeypatch, written, teacher, tmp_path, capsys):
        other = shutil.copytree(teacher, tmp_path / "other")
        tiny_model(other, "llama", vocab=len(AutoTokenizer.from_pretrained(teacher)), seed=4)
        with monkeypatch.context() as patch:
            patch.setattr(TextFolder, "finish", lambda *_: die())
            with pytest.raises(KeyboardInterrupt):
                written("text")
        assert written("text", model=other) == 2
        assert "text holds text that was made with another model. Choose" in capsys.readouterr().err

    @pytest.mark.parametrize(("then", "now", "said"), [
        ("abc", UNREAD, None), (None, None, None), (None, UNREAD, "another adapter"), ("abc", None, "another adapter")])
    def test_what_is_seen_of_an_adapter_that_is_not_read(self, tmp_path, then, now, said):
        write(tmp_path / "made_with.json", {"made_with": {"model": "abc", "adapter": then}, "files": {},
                                            "selection": dataclasses.asdict(Selection())})
        refusal = TextFolder(tmp_path, {"model": UNREAD, "adapter": now}, Selection(), b"", Layout(1, 1)).refusal()
        assert (said in refusal) if said else refusal is None

    def test_data_that_was_not_written_here(self, written, prompts, no_weights, capsys):
        before = files(prompts)
        no_weights()
        assert written("prompts") == 2
        error, = capsys.readouterr().err.splitlines()
        assert error == (f"error: {prompts} has a train.jsonl that was not written by todi.generate; choose another "
                         "--save-dir (TEXT_DIR)")
        assert files(prompts) == before

    @pytest.mark.parametrize("record", [{"made_with": {"temperature": 1.0}, "loss": 2.0, "seeds": {}}, [], "x"])
    def test_a_record_that_is_of_others(self, written, tmp_path, capsys, record):
        """An evaluation has one of this name too."""
        write(tmp_path / "text/made_with.json", record)
        assert written("text") == 2
        assert f"{tmp_path}/text has a made_with.json that was not written by todi.generate" in capsys.readouterr().err

    def test_another_run_in_the_same_folder(self, written, tmp_path, capsys):
        with claimed(tmp_path / "text"):
            assert written("text") == 2
        assert f"another run is writing to {tmp_path}/text" in capsys.readouterr().err

    @pytest.mark.parametrize(("words", "said"), [
        (["--model-path", "no/such/folder/here"], "no model at no/such/folder/here"),
        (["--data-dir", "nowhere"], "no such data file: nowhere/train.jsonl"),
        (["--data-dir"], "--data-dir needs at least one"),
        (["--data-dir", "a", "a"], "--data-dir: a given more than once"),
        (["--save-dir", ""], "--save-dir is required"),
        (["--save-dir", "/dev/null/text"], "--save-dir /dev/null/text: /dev/null is no folder"),
        (["--seeds", 1, 1], "--seeds: 1 given more than once"),
        (["--num-beams", 2], "--num-beams 2 needs --no-do-sample"),
        (["--max-length", 513], "has 512 positions"),
        (["--max-length", 32], "--max-prompt-length (32) must be below --max-length (32)"),
        (["--least-tokens", 5, "--most-tokens", 4], "--most-tokens (4) must not be below --least-tokens (5)"),
        (["--least-tokens", 0], "--least-tokens must be at least 1, got 0"),
        (["--sets", "dolly"], "unknown option --sets; did you mean --seeds?"),
    ])
    def test_bad_input(self, written, no_weights, tmp_path, capsys, words, said):
        no_weights()
        assert written("text", *words) == 2
        shown = capsys.readouterr().err.splitlines()
        assert all(line.startswith("error: ") for line in shown) and any(said in line for line in shown), shown
        assert not (tmp_path / "text").exists()

    def test_a_model_must_be_named(self, monkeypatch, prompts, capsys):
        assert run(monkeypatch, generate, "--data-dir", prompts, "--save-dir", prompts / "text") == 2
        assert capsys.readouterr().err == "error: --model-path or --peft-path is required\n"

    def test_everything_at_once(self, written, no_weights, prompts, tmp_path, capsys):
        no_weights()
        (prompts / "dev.jsonl").write_text('{"prompt": "a"}\n')
        (prompts / "train.jsonl").write_text('{"output": "a"}\n')
        assert written("text", "--temperature", 0, model="nowhere/at/all") == 2
        assert capsys.readouterr().err.splitlines() == [
            "error: --temperature must be above 0, got 0.0",
            "error: no model at nowhere/at/all: no such folder or .gguf file, and not the form of a Hub name",
            f"error: {prompts}/train.jsonl:1: lacks prompt; has output",
            f"error: {prompts}/dev.jsonl:1: lacks output; has prompt"]

    def test_two_forms(self, written, no_weights, prompts, tmp_path, capsys):
        no_weights()
        write(tmp_path / "chat/train.jsonl", {"messages": turns("Hi")})
        assert written("text", data=(prompts, tmp_path / "chat")) == 2
        assert f"{tmp_path}/chat/train.jsonl has `messages`, {prompts}/train.jsonl `prompt`" in capsys.readouterr().err

    def test_a_check_loads_no_weights_and_makes_no_folder(self, written, no_weights, tmp_path):
        no_weights()
        assert written("text", "--check-only") == 0
        assert not (tmp_path / "text").exists()


LAUNCHERS = sorted(str(path.relative_to(ROOT / "scripts").with_suffix(""))
                   for path in (ROOT / "scripts").glob("*/seqkd_*.sh"))


class TestLaunchers:
    def test_every_family_has_one(self):
        families = {path.parent.name for path in (ROOT / "scripts").glob("*/vanilla_kd_*.sh")}
        assert {launcher.split("/")[0] for launcher in LAUNCHERS} == families
        assert len(LAUNCHERS) == len(families)

    @pytest.mark.parametrize("launcher", LAUNCHERS)
    def test_a_dry_run_prints_both_commands(self, launcher):
        """The teacher is that of the family's distillation, the student is trained as by SFT on the data."""
        def printed(launcher, *words, **variables):
            lines = launch(launcher, *words, DRY_RUN=1, **variables).stdout.splitlines()
            kinds = {"todi.train": TrainConfig, "todi.generate": GenerateConfig}
            return [parse(kinds[module], options) for _, _, module, *options in map(shlex.split, lines)]

        distils, = printed(launcher.replace("seqkd", "vanilla_kd"))
        tunes, = printed(launcher.replace("seqkd", "sft"))
        writes, trains = printed(launcher, "--dev-num", "3", TOP_K=5, SEED=7)
        assert writes.problems() == trains.problems() == []
        assert ((writes.model_path,), (writes.peft_path,)) == (
            distils.teacher.teacher_model_path, distils.teacher.adapters)
        assert trains.student == tunes.student
        assert trains.data.data_dir == (writes.save_dir,)
        assert (writes.decoding.top_k, trains.run.seed, trains.data.dev_num) == (5, 7, 3)
        assert (trains.objective.criterion, trains.optim.lr) == ("cross_entropy", tunes.optim.lr)

    @pytest.mark.parametrize(("words", "variables", "said"), [
        (["--data-dir", "x"], {}, "--data-dir would be trained on in place of the teacher's text; set DATA_DIR"),
        ([], {"CRITERION": "vanilla_kd"}, "this launcher trains with CRITERION=cross_entropy, got vanilla_kd"),
        ([], {"TEACHER_CALLABLE": "mine.py:logits"}, "text is written by one model"),
    ])
    def test_what_would_train_on_something_else(self, words, variables, said):
        done = launch("gpt2/seqkd_gpt2_base", *words, DRY_RUN=1, **variables)
        assert done.returncode == 2
        assert said in done.stdout

    @pytest.fixture
    def settings(self, workshop, prompts, tmp_path):
        return {"TEACHER_MODEL_PATH": workshop.model("gpt2-teacher", hidden=48, seed=1), "DATA_DIR": prompts,
                "MODEL_PATH": workshop.model("gpt2-student", seed=2), "DROP_CUT": 0, "EPOCH": 2, "EVAL_GEN": 0,
                "TEXT_DIR": tmp_path / "the text", "SAVE_DIR": tmp_path / "run", **SETTINGS}

    @pytest.mark.parametrize("asked", [["--check-only"], slow([])])
    def test_a_look_before_there_is_a_text(self, settings, tmp_path, asked):
        done = launch("gpt2/seqkd_gpt2_base", *asked, **settings, **({} if asked else {"DOCTOR": 1}))
        assert done.returncode == 0, done.stdout
        assert done.stdout.endswith(f"the training will be looked at when {tmp_path}/the text/train.jsonl is there\n")
        assert not (tmp_path / "the text").exists() and not (tmp_path / "run").exists()

    @pytest.mark.slow
    def test_it_writes_once_and_trains(self, settings, tmp_path):
        done = launch("gpt2/seqkd_gpt2_base", **settings)
        assert done.returncode == 0, done.stdout
        args = json.loads((tmp_path / "run/args.json").read_text())
        assert args["settings"]["data"]["data_dir"] == [str(tmp_path / "the text")]
        assert len(list((tmp_path / "run").glob("epoch*"))) == 1
        made = files(tmp_path / "the text")
        done = launch("gpt2/seqkd_gpt2_base", **settings)
        assert done.returncode == 0, done.stdout
        assert "the text is there already" in done.stdout and "has finished" in done.stdout
        assert files(tmp_path / "the text") == made
        done = launch("gpt2/seqkd_gpt2_base", DOCTOR=1, **settings)
        assert done.returncode == 0 and "memory: about" in done.stdout, done.stdout
