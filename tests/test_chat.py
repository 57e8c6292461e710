"""Chat data: records with messages, the tokenizer's template, training and evaluation on it."""

import datetime
import json
from types import SimpleNamespace

import pytest
import torch
from evaluating import generations, run, run_evaluate
from launching import run as launch
from tiny import EOS, tiny_model, tiny_tokenizer
from todi import cache, generate
from todi.cache import read_teacher_spec
from todi.data import template_date
from todi.data.chat import render
from todi.data.records import Message, Record, load_records
from todi.data.template_date import TemplateDate, check_same_date
from todi.data.tokenize import encode_examples, end_id
from todi.errors import InputError
from todi.models.families import FAMILIES
from todi.models.loading import load_tokenizer
from todi.options import parse
from todi.settings import CacheConfig, TrainConfig
from todi.training.train_inputs import read_inputs

TEMPLATE = ("{% for turn in messages %}"
            "{% if turn.role == 'system' and not loop.first %}{{ raise_exception('system comes first') }}{% endif %}"
            "<|{{ turn.role }}|>{{ turn.content }}<|end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")

SYSTEM = {"role": "system", "content": "Be short."}


def chat_tokenizer(folder):
    """A tiny tokenizer with a chat template; saved in `folder` and loaded from it."""
    tokenizer = tiny_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|end|>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return load_tokenizer(str(folder))


def turns(*contents):
    """Messages of user and assistant, in turn."""
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(contents)]


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class TestRecords:
    def test_the_last_message_is_the_reference(self, tmp_path):
        system = {"role": "system", "content": "Be short."}
        record, = load_records(write(tmp_path / "a.jsonl", {"messages": [system, *turns("Hi", "Yes?", "Why?", "So.")]}))
        assert record.references == ("So.",)
        assert record.messages == (Message("system", "Be short."), Message("user", "Hi"), Message("assistant", "Yes?"),
                                   Message("user", "Why?"))

    @pytest.mark.parametrize(("messages", "said"), [
        ([], "`messages` must be a list of at least two objects"),
        (["Hi", "Yes?"], "`messages` must be a list of at least two objects"),
        (turns("Hi"), "`messages` must be a list of at least two objects"),
        (turns("Hi", "Yes?", "Why?"), "the last message must be the assistant's, not the user's"),
        ([{"role": "human", "content": "Hi"}, *turns("Hi", "Yes?")],
         "message 1 has the role 'human'; allowed: system, user, assistant"),
        ([{"content": "Hi"}, *turns("Hi", "Yes?")], "message 1 has the role None"),
        (turns("Hi", " "), "`content` of message 2 must be a non-empty string"),
        (turns("Hi", ["Yes?"]), "`content` of message 2 must be a non-empty string"),
        (turns("Hi", "Ye\ud83d"), r"`content` of message 2 has half of a character, \ud83d, at place 3"),
    ])
    def test_a_bad_conversation_is_named(self, tmp_path, messages, said):
        path = write(tmp_path / "a.jsonl", {"messages": turns("Hi", "Yes?")}, {"messages": messages})
        with pytest.raises(InputError) as error:
            load_records(path)
        assert error.value.problems[0].startswith(f"{path}:2: {said}")

    def test_conversations_without_a_response(self, tmp_path):
        path = write(tmp_path / "a.jsonl", {"messages": turns("Hi")}, {"messages": turns("Hi", "Yes?")})
        assert load_records(path, responses=False) == [Record("", (), (Message("user", "Hi"),)),
                                                       Record("", ("Yes?",), (Message("user", "Hi"),))]
        with pytest.raises(InputError, match=r"a.jsonl:1: `messages` must be a list of at least two objects"):
            load_records(path)

    @pytest.mark.parametrize(("messages", "said"), [
        ([], "`messages` must be a list of at least one object"),
        ([SYSTEM], "the last message must be the user's or the assistant's, not the system's"),
        ([{"role": "assistant", "content": "Yes?"}], "nothing comes before the assistant's message"),
    ])
    def test_nothing_to_answer(self, tmp_path, messages, said):
        path = write(tmp_path / "a.jsonl", {"messages": messages})
        with pytest.raises(InputError, match=f"a.jsonl:1: {said}"):
            load_records(path, responses=False)

    def test_kinds_do_not_mix(self, tmp_path):
        path = write(tmp_path / "a.jsonl", {"prompt": "a", "output": "b"}, {"messages": turns("Hi", "Yes?")})
        with pytest.raises(InputError, match=r":2: a file has either `prompt` and `output` or `messages`"):
            load_records(path)


class TestTemplate:
    def test_prompt_and_response_are_the_templated_conversation(self, tmp_path):
        tokenizer = chat_tokenizer(tmp_path)
        messages = turns("Hi", "Yes?", "Which number?", "The number is 7.")
        records = render(load_records(write(tmp_path / "a.jsonl", {"messages": messages})), tokenizer, "a.jsonl")
        assert records[0].prompt == "<|user|>Hi<|end|>\n<|assistant|>Yes?<|end|>\n<|user|>Which number?<|end|>\n" \
                                    "<|assistant|>"
        example, = encode_examples(records, tokenizer, FAMILIES["gpt2"], 512, 256)
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        assert tokenizer.decode(example.ids) + "\n" == whole
        assert tokenizer.decode(example.ids[example.prompt_length:]) == "The number is 7.<|end|>"
        assert example.ids[-1] == end_id(records[0], tokenizer) != tokenizer.eos_token_id

    def test_a_template_without_an_end_of_turn_ends_by_eos(self, tmp_path):
        tokenizer = chat_tokenizer(tmp_path)
        tokenizer.chat_template = TEMPLATE.replace("<|end|>", "")
        record, = render(load_records(write(tmp_path / "a.jsonl", {"messages": turns("Hi", "Yes?")})), tokenizer, "a")
        assert record.end == EOS

    def test_bos_is_not_doubled(self, tmp_path):
        tokenizer = chat_tokenizer(tmp_path)
        tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
        records = render(load_records(write(tmp_path / "a.jsonl", {"messages": turns("Hi", "Yes?")})), tokenizer, "a")
        example, = encode_examples(records, tokenizer, FAMILIES["gemma3"], 512, 256)
        assert example.ids.count(tokenizer.bos_token_id) == 1 == example.ids[:1].count(tokenizer.bos_token_id)

    def test_plain_records_need_no_template(self, tmp_path):
        records = load_records(write(tmp_path / "a.jsonl", {"prompt": "a", "output": "b"}))
        assert render(records, tiny_tokenizer(tmp_path), "a.jsonl") == records

    def test_no_template_and_a_refused_conversation(self, tmp_path):
        late = {"messages": [*turns("Hi", "Yes?")[:1], {"role": "system", "content": "No."}, *turns("Hi", "Yes?")[1:]]}
        records = load_records(write(tmp_path / "a.jsonl", {"messages": turns("Hi", "Yes?")}, late))
        with pytest.raises(InputError, match=r"a.jsonl: the chat template of .* refuses conversation 2: system comes"):
            render(records, chat_tokenizer(tmp_path / "chat"), "a.jsonl")
        with pytest.raises(InputError, match=r"a.jsonl has `messages`, but the tokenizer of .* has no chat template"):
            render(records, tiny_tokenizer(tmp_path / "plain"), "a.jsonl")

    @pytest.mark.parametrize(("template", "said"), [
        ("{% for m in messages %}{{ m.content }", "unexpected '}'"),
        ("{% for m in messages %}{{ m.content + 1 }}{% endfor %}", "TypeError: can only concatenate str"),
        ({"tool_use": TEMPLATE}, "This model has multiple chat templates with no default"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content | upper }}\n{% endfor %}",
         "it leaves out or changes what the assistant says"),
        ("{% for m in messages if m.role != 'assistant' %}[{{ m.content }}]{% endfor %}",
         "it leaves out or changes what the assistant says"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content[0]['text'] }}\n{% endfor %}",
         "it leaves out what the system says"),
        ("{% for m in messages if m.role != 'system' %}[{{ m.content }}]{% endfor %}", "it leaves out what the system"),
        ("{{ messages[0].content[:0] }}", "it makes an empty prompt of it"),
        (TEMPLATE.replace("|>{{", "|>\ud83d{{"), r"what it makes of it has half of a character, \ud83d, at place"),
    ])
    def test_a_template_that_does_not_say_what_is_said(self, tmp_path, template, said):
        tokenizer = chat_tokenizer(tmp_path / "chat")
        tokenizer.chat_template = template
        records = load_records(write(tmp_path / "a.jsonl", {"messages": [SYSTEM, *turns("Hi", "Yes?")]}))
        with pytest.raises(InputError) as error:
            render(records, tokenizer, "a.jsonl")
        problem, = error.value.problems
        who = f"a.jsonl: the chat template of {tokenizer.name_or_path}"
        assert problem.startswith(f"{who} refuses conversation 1: {said}")
        assert "\n" not in problem

    def test_the_data_s_own_conversation_finds_the_end(self, tmp_path):
        """A template may ask for a system message, or for the assistant's to be trimmed."""
        tokenizer = chat_tokenizer(tmp_path / "chat")
        tokenizer.chat_template = ("{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"
                                   + TEMPLATE.replace("turn.content", "turn.content | trim"))
        records = load_records(write(tmp_path / "a.jsonl", {"messages": [SYSTEM, *turns("Hi", "Yes? ")]}))
        assert render(records, tokenizer, "a.jsonl")[0].end == "<|end|>"

    def test_who_speaks_is_looked_at_anew(self, tmp_path):
        tokenizer = chat_tokenizer(tmp_path / "chat")
        tokenizer.chat_template = TEMPLATE.replace("{% for turn in messages %}",
                                                   "{% for turn in messages if turn.role != 'system' %}")
        records = load_records(write(tmp_path / "a.jsonl", {"messages": turns("Hi", "Yes?")},
                                     {"messages": [SYSTEM, *turns("Hi", "Yes?")]}))
        with pytest.raises(InputError, match="refuses conversation 2: it leaves out what the system says"):
            render(records, tokenizer, "a.jsonl")

    def test_a_prompt_that_does_not_say_who_goes_on(self, tmp_path, caplog):
        tokenizer = chat_tokenizer(tmp_path / "chat")
        records = load_records(write(tmp_path / "a.jsonl", {"messages": turns("Hi", "Yes?")}))
        render(records, tokenizer, "a.jsonl")
        assert not caplog.records
        tokenizer.chat_template = TEMPLATE.replace("{% if add_generation_prompt %}<|assistant|>{% endif %}", "")
        render(records, tokenizer, "a.jsonl")
        assert "writes '<|assistant|>' before a response, but not at the end of a prompt" in caplog.text


@pytest.fixture
def chat(tmp_path):
    """A model with a chat template, and a set of chat data below data/."""
    tokenizer = chat_tokenizer(tmp_path / "model")
    lines = [{"messages": turns("Hi", "Yes?", f"Which number, {i}?", f"The number is {i}.")} for i in range(6)]
    for split in ("train", "dev", "valid"):
        write(tmp_path / f"data/chat/{split}.jsonl", *lines)
    return tiny_model(tmp_path / "model", "llama", vocab=len(tokenizer))


def evaluated(monkeypatch, checkpoint, tmp_path, *words):
    return run_evaluate(monkeypatch, checkpoint, tmp_path / "data", tmp_path / "out", "--sets", "chat", "--seeds", 1,
                        "--max-length", 64, "--max-prompt-length", 48, *words)


def test_evaluation(monkeypatch, chat, tmp_path, capsys):
    assert evaluated(monkeypatch, chat, tmp_path) == 0
    written = generations(tmp_path / "out")["chat/seed1.jsonl"]
    assert [line["references"] for line in written] == [[f"The number is {i}."] for i in range(6)]
    assert written[0]["prompt"].endswith("<|user|>Which number, 0?<|end|>\n<|assistant|>")

    tiny_tokenizer(chat)  # the same without a template
    (chat / "chat_template.jinja").unlink()
    capsys.readouterr()
    assert evaluated(monkeypatch, chat, tmp_path) == 2
    assert "chat has `messages`, but the tokenizer of" in capsys.readouterr().err


def test_chat_and_plain_sets_are_mixed(chat, tmp_path):
    write(tmp_path / "data/plain/train.jsonl", *[{"prompt": f"Number {i}:", "output": f" {i}"} for i in range(5)])
    config = parse(TrainConfig, ["--model-path", str(chat), "--criterion", "cross_entropy", "--train-num", "4",
                                 "--data-dir", str(tmp_path / "data/plain"), str(tmp_path / "data/chat")])
    inputs = read_inputs(config, torch.device("cpu"))
    assert [record.prompt for record in inputs.train[:4]] == [f"Number {i}:" for i in range(4)]
    assert [record.end for record in inputs.train] == [""] * 4 + ["<|end|>"] * 4
    assert inputs.train_sizes == [4, 4]
    assert len(inputs.dev) == 6


class TestDate:
    """Of templates that write today's."""

    DATED = "{% if strftime_now is defined %}Today is {{ strftime_now('%d %b %Y') }}.{% endif %}" + TEMPLATE

    @pytest.fixture
    def dated(self, chat):
        """The folder of a model whose template writes the date."""
        (chat / "chat_template.jinja").write_text(self.DATED)
        return chat

    @pytest.fixture
    def today(self, monkeypatch):
        """Sets the calendar."""
        def set_calendar(day: str) -> None:
            date = SimpleNamespace(today=lambda: datetime.date.fromisoformat(day),
                                   fromisoformat=datetime.date.fromisoformat)
            monkeypatch.setattr(template_date, "datetime", SimpleNamespace(date=date, datetime=datetime.datetime))
        set_calendar("2026-07-30")
        return set_calendar

    def read(self, model, tmp_path, *words):
        config = parse(TrainConfig, ["--model-path", str(model), "--criterion", "cross_entropy", "--data-dir",
                                     str(tmp_path / "data/chat"), "--save-dir", str(tmp_path / "run"), *words])
        inputs = read_inputs(config, torch.device("cpu"))
        assert {record.prompt.partition("<|")[0] for record in inputs.train} == {
            record.prompt.partition("<|")[0] for record in inputs.dev}
        return inputs.template_date, inputs.train[0].prompt.partition("<|")[0]

    def test_a_run_keeps_the_date_of_its_first_start(self, dated, today, tmp_path):
        assert self.read(dated, tmp_path) == ("2026-07-30", "Today is 30 Jul 2026.")
        (tmp_path / "run").mkdir()
        (tmp_path / "run/args.json").write_text(json.dumps({"deciding": {"template_date": "2026-07-30"}}))
        today("2026-07-31")
        assert self.read(dated, tmp_path) == ("2026-07-30", "Today is 30 Jul 2026.")
        assert self.read(dated, tmp_path, "--resume", "never") == ("2026-07-31", "Today is 31 Jul 2026.")
        assert self.read(dated, tmp_path, "--template-date", "2024-02-29") == ("2024-02-29", "Today is 29 Feb 2024.")
        (tmp_path / "run/args.json").write_text(json.dumps({"deciding": {"template_date": "today"}}))
        assert self.read(dated, tmp_path) == ("2026-07-31", "Today is 31 Jul 2026.")

    def test_a_template_without_one_has_none(self, chat, today, tmp_path):
        assert self.read(chat, tmp_path, "--template-date", "2024-02-29") == ("today", "")

    @pytest.mark.parametrize(("date", "said"), [("2026-02-30", "--template-date 2026-02-30: day "),
                                                ("yesterday", "--template-date must be today or 2026-01-31")])
    def test_a_date_that_is_none(self, chat, tmp_path, date, said):
        with pytest.raises(InputError, match=said):
            self.read(chat, tmp_path, "--template-date", date)

    def test_transformers_has_its_clock_back(self, dated, today):
        tokenizer, messages = load_tokenizer(str(dated)), turns("Hi")
        date = TemplateDate("2024-02-29")
        with date.in_force():
            assert tokenizer.apply_chat_template(messages, tokenize=False).startswith("Today is 29 Feb 2024.")
        now = tokenizer.apply_chat_template(messages, tokenize=False)
        assert datetime.date.today().strftime("%Y") in now.partition("<|")[0]

    def test_an_evaluation(self, monkeypatch, dated, today, tmp_path, capsys):
        def about():
            made_with = json.loads((tmp_path / "out/eval/chat/made_with.json").read_text())["made_with"]
            settings = json.loads((tmp_path / "out/eval/results.json").read_text())["settings"]
            return made_with.get("template_date"), settings.get("template_date")
        assert evaluated(monkeypatch, dated, tmp_path) == 0
        assert about() == ("2026-07-30", "2026-07-30")
        assert generations(tmp_path / "out")["chat/seed1.jsonl"][0]["prompt"].startswith("Today is 30 Jul 2026.")
        today("2026-07-31")
        assert evaluated(monkeypatch, dated, tmp_path) == 0
        assert "every set and seed is there already" in capsys.readouterr().out
        assert evaluated(monkeypatch, dated, tmp_path, "--template-date", "2026-07-31") == 0
        assert "made with other data, template_date and is done again" in capsys.readouterr().out
        assert about() == ("2026-07-31", "2026-07-31")

    def test_teacher_text(self, monkeypatch, dated, today, tmp_path, capsys):
        """It is of the day of its first start; training puts its own day into the template."""
        def write_text(*words):
            return run(monkeypatch, generate, "--model-path", dated, "--data-dir", tmp_path / "data/chat", "--save-dir",
                       tmp_path / "text", "--max-length", 64, "--max-prompt-length", 48, "--no-drop-cut", *words)
        assert write_text() == 0
        made_with = json.loads((tmp_path / "text/made_with.json").read_text())["made_with"]
        assert made_with["template_date"] == "2026-07-30"
        today("2026-07-31")
        assert write_text() == 0
        assert "is there already" in capsys.readouterr().out
        assert write_text("--template-date", "2026-07-31") == 2
        assert "template_date 2026-07-30, where this run has 2026-07-31; other prompts" in capsys.readouterr().err

    def test_an_evaluation_without_one(self, monkeypatch, chat, today, tmp_path):
        assert evaluated(monkeypatch, chat, tmp_path) == 0
        assert "template_date" not in (tmp_path / "out/eval/chat/made_with.json").read_text()

    def test_a_cache(self, dated, today, tmp_path):
        def spec(model, *words):
            config = parse(CacheConfig, ["build", str(tmp_path / "cache"), "--teacher-model-path", str(model),
                                         "--data-dir", str(tmp_path / "data/chat"), "--precision", "fp32", *words])
            return read_teacher_spec(config, torch.device("cpu"))
        first, again = spec(dated), spec(dated, "--template-date", "2026-07-30")
        assert first.fingerprint == again.fingerprint and first.data == again.data
        assert first.fingerprint["template_date"] == first.made_from["template_date"] == "2026-07-30"
        today("2026-07-31")
        assert spec(dated).fingerprint["token ids"] != first.fingerprint["token ids"]
        (dated / "chat_template.jinja").write_text(TEMPLATE)
        assert "template_date" not in spec(dated).fingerprint

    def test_a_cache_is_gone_on_with_on_another_day(self, monkeypatch, dated, today, tmp_path, capsys):
        words = ["build", tmp_path / "cache", "--teacher-model-path", dated, "--data-dir", tmp_path / "data/chat",
                 "--precision", "fp32"]
        assert run(monkeypatch, cache, *words) == 0
        today("2026-07-31")
        assert run(monkeypatch, cache, *words) == run(monkeypatch, cache, "verify", tmp_path / "cache") == 0
        assert run(monkeypatch, cache, *words, "--template-date", "2026-07-31") == 2
        assert "template_date was 2026-07-30, is 2026-07-31" in capsys.readouterr().err

    def test_ranks_with_two_dates(self):
        world = SimpleNamespace(gather=lambda date: [date, "2026-07-31"])
        check_same_date("2026-07-31", world)
        with pytest.raises(InputError, match="different dates for the chat template, 2026-07-30 and 2026-07-31"):
            check_same_date("2026-07-30", world)


@pytest.mark.slow
def test_training(monkeypatch, chat, tmp_path):
    done = launch("smollm2/sft_smollm2", "--model-type", "auto", MODEL_PATH=chat, PRECISION="fp32",
                  DATA_DIR=tmp_path / "data/chat", SAVE_DIR=tmp_path / "run", MAX_LENGTH=64, MAX_PROMPT_LENGTH=48,
                  EPOCH=30, LR="1e-2", EVAL_GEN=0)
    assert done.returncode == 0, done.stdout
    checkpoint, = (tmp_path / "run").glob("epoch*")
    assert evaluated(monkeypatch, checkpoint, tmp_path, "--no-do-sample") == 0
    written = generations(tmp_path / "out")["chat/seed1.jsonl"]
    assert all(line["response"].startswith("The number is") and not line["cut"] for line in written), written
