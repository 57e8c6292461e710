"""Architectures without a record of their own: each trains right, or is refused in a line."""

import json
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, tiny_config
from evaluating import run_evaluate
from launching import write_data
from tiny import tiny_model, tiny_tokenizer
from todi.criterions import DistillationCriterion
from todi.data.batches import collate
from todi.data.records import Message, Record
from todi.data.tokenize import Example, encode_examples, encode_prompts
from todi.errors import InputError
from todi.generation.decoding import Decoding, generate
from todi.generation.padding import check_decoding
from todi.models.checks import check_architecture
from todi.models.families import FAMILIES, Family, family_of
from todi.models.inputs import read_model
from todi.models.loading import load_config, load_model, load_tokenizer
from todi.models.packing import takes_packed, use_packing
from todi.models.probe import check_model
from todi.models.prune import keep_layers, layer_count
from todi.models.tokenizers import start_ids
from todi.runtime.device import choose_precision
from todi.training.student import Student
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

CPU = torch.device("cpu")
FP32 = choose_precision("fp32", CPU)
LENGTHS = (37, 24)  # longer than the windows of tiny models


def save(model_type: str, folder: Path, **special: object) -> Path:
    """A tiny model with a tokenizer."""
    config = tiny_config(model_type, **special)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)  # nothing is left at 0 or 1
        model.save_pretrained(folder)
    tiny_tokenizer(folder)
    return folder


def load(folder: Path) -> torch.nn.Module:
    """As a run loads its student, with all its checks."""
    read_model(str(folder), "auto", None, FP32, 64, False, trained=True)
    model = load_model(str(folder), torch.float32, CPU)
    check_model(model, str(folder), trained=True)
    use_packing(model, str(folder))
    check_decoding(model, str(folder), pad_id=0)
    return model.eval()


def texts() -> list[Example]:
    generator = torch.Generator().manual_seed(3)
    return [Example(tuple(torch.randint(3, 250, (length,), generator=generator).tolist()), prompt_length=9)
            for length in LENGTHS]


def check_loss(model: torch.nn.Module) -> None:
    """Ours of a batch, against cross-entropy of the model's own logits of each text alone; gradients too."""
    expected = torch.zeros(())
    for example in texts():
        ids = torch.tensor([example.ids])
        logits = model(input_ids=ids).logits[0, example.prompt_length - 1:-1]
        expected = expected + torch.nn.functional.cross_entropy(logits, ids[0, example.prompt_length:], reduction="sum")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    theirs = torch.autograd.grad(expected, trained, allow_unused=True, materialize_grads=True)
    for packed in (False, True) if takes_packed(model) else (False,):
        sums, _ = Student(model)(collate(texts(), pad_id=0, packed=packed), DistillationCriterion())
        assert sums["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
        ours = torch.autograd.grad(sums["loss"], trained, allow_unused=True, materialize_grads=True)
        error = sum((our - their).square().sum() for our, their in zip(ours, theirs, strict=True))
        assert error.sqrt() < 1e-3 * sum(their.square().sum() for their in theirs).sqrt()


def check_texts(model: torch.nn.Module) -> None:
    """What is written to prompts in a batch, against the most likely token after each text alone."""
    prompts = [example.prompt for example in texts()] + [texts()[0].ids]
    found = generate(model, prompts, [0, 1, 2], decoding=Decoding(max_length=64, max_new_tokens=4, do_sample=False),
                     eos_ids=(), pad_id=0, batch_size=3)
    for prompt, response in zip(prompts, found, strict=True):
        ids = list(prompt)
        for token in response.ids:
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
            assert logits[token] > logits.max() - 1e-3
            ids.append(token)


def trains_or_is_refused(model_type: str, folder: Path, **special: object) -> str:
    """'' or the line. Whatever else is raised is a fault."""
    try:
        model = load(save(model_type, folder, **special))
    except InputError as error:
        assert all("\n" not in problem for problem in error.problems)
        return error.problems[0].replace(str(folder), "it")
    check_loss(model)
    check_texts(model)
    return ""


@pytest.mark.parametrize("model_type", [
    "mistral",  # sliding windows
    "gemma2",  # soft-capping of scores and logits
    "granite",  # a divisor of logits
    "cohere",  # a factor of logits
    "falcon_h1",  # multipliers and recurrent states
    "mixtral",  # experts
    "gpt_neox", "bloom", "opt",
    "bart", "mamba",  # padding reaches what they write
])
def test_trains_as_its_own_logits_say(tmp_path, model_type):
    assert trains_or_is_refused(model_type, tmp_path) == ""


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_architecture_trains_right_or_is_refused(tmp_path, model_type):
    trains_or_is_refused(model_type, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_pruned_to_all_its_layers_it_is_the_same_or_refused(tmp_path, model_type):
    try:
        model = load_model(str(save(model_type, tmp_path)), torch.float32, CPU).eval()
        pruned = keep_layers(model, range(layer_count(model.config)))
    except InputError:
        return
    ids = torch.tensor([texts()[0].ids])
    torch.testing.assert_close(pruned(input_ids=ids).logits, model(input_ids=ids).logits)


class TestRefused:
    @pytest.mark.parametrize(("special", "said"), [
        ({"output_router_logits": True}, "asks for the load-balancing loss of its router besides the cross-entropy "
                                         r"\(output_router_logits is True\), which is not computed here; set it to"),
        ({"output_router_logits": True, "router_aux_loss_coef": 0.0}, ""),
        ({"router_aux_loss_coef": 0.5}, ""),  # transformers does not add it either
    ])
    def test_a_further_loss(self, tmp_path, special, said):
        folder = str(save("mixtral", tmp_path, **special))
        read_model(folder, "auto", None, FP32, 64, False)  # as a teacher it has no loss
        if said:
            with pytest.raises(InputError, match=said):
                read_model(folder, "auto", None, FP32, 64, False, trained=True)
            with pytest.raises(InputError, match="its own training loss is more than the cross-entropy"):
                check_model(load_model(folder, torch.float32, CPU), folder, trained=True)
            check_model(load_model(folder, torch.float32, CPU), folder)
        else:
            load(tmp_path)

    def test_a_model_that_sees_later_tokens(self, tmp_path):
        for special, seeing in (({"is_decoder": False}, True), ({"is_decoder": True}, False)):
            folder = save("bert", tmp_path / str(seeing), **special)
            assert load_config(str(folder)).is_decoder is not seeing
            said = [f"{folder}: a bert model of this configuration attends to later tokens"] * seeing
            problems = []
            try:
                check_architecture(load_config(str(folder)), str(folder))
            except InputError as error:
                problems = error.problems
            assert [problem[:len(line)] for problem, line in zip(problems, said, strict=True)] == said

    def test_one_whose_configuration_does_not_say_so(self, tmp_path):
        model = load_model(str(tiny_model(tmp_path, "llama")), torch.float32, CPU)
        model.model.layers[0].register_forward_hook(lambda layer, inputs, output: output + output.mean(1, keepdim=True))
        with pytest.raises(InputError, match="its logits depend on later tokens, so it cannot be trained"):
            check_model(model, "tiny")

    def test_logits_that_are_fewer_than_the_rows_of_the_head(self, tmp_path):
        model = load_model(str(tiny_model(tmp_path, "llama")), torch.float32, CPU)
        model.lm_head.register_forward_hook(lambda head, inputs, logits: logits[..., :200])
        with pytest.raises(InputError, match="its head is of a kind that is not supported"):
            check_model(model, "tiny")

    def test_special_tokens_that_it_never_saw_are_not_asked_about(self, tmp_path):
        """A vocabulary often begins with them; what a model makes of them is mostly rounding, in half precision."""
        model = load_model(str(tiny_model(tmp_path, "llama")), torch.float32, CPU)
        with torch.no_grad():
            model.get_input_embeddings().weight[:20] = torch.nan
        check_model(model, "tiny", trained=True)
        check_decoding(model, "tiny", pad_id=30)

    def test_one_that_cannot_be_decoded_in_batches(self, monkeypatch, tmp_path, capsys):
        folder = save("openai-gpt", tmp_path / "gpt")  # it has no cache
        model = load_model(str(folder), torch.float32, CPU)
        check_model(model, "tiny", trained=True)
        with pytest.raises(InputError, match=r"it continues a prompt otherwise than alone \(logits differ by"):
            check_decoding(model, "tiny", pad_id=0)
        data = write_data(tmp_path / "sets" / "dolly", valid=2).parent
        assert run_evaluate(monkeypatch, folder, data, tmp_path / "out", "--sets", "dolly") == 2
        assert "cannot be decoded in batches" in capsys.readouterr().err


class TestStart:
    """What a sequence starts with."""

    @pytest.fixture
    def tokenizer(self, tmp_path):
        """One that puts BOS before a text and EOS behind it, as those of Mistral or Llama 3 put BOS."""
        tokenizer = tiny_tokenizer(tmp_path)
        tokenizer.add_special_tokens({"bos_token": "<s>"})
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A <|endoftext|>", special_tokens=[("<s>", tokenizer.bos_token_id), ("<|endoftext|>", 0)])
        tokenizer.save_pretrained(tmp_path)
        return load_tokenizer(str(tmp_path))

    def test_as_the_tokenizer_has_it_where_there_is_no_record(self, tokenizer):
        bos, record = tokenizer.bos_token_id, Record("Write a", (" response.",))
        assert bos not in (0, None)
        auto = family_of("auto", "mistral")
        plain, = encode_examples([record], tokenizer, FAMILIES["tinyllama"], 64, 48)
        example, = encode_examples([record], tokenizer, auto, 64, 48)
        assert example.ids == (bos, *plain.ids)
        assert example.prompt_length == plain.prompt_length + 1
        assert example.ids[-1] == 0 and example.ids.count(0) == 1
        assert encode_prompts([record], tokenizer, auto, 2) == [[bos, plain.ids[0]]]
        assert encode_prompts([Record("<s>Write a", ("",))], tokenizer, auto, 48) == [[*example.prompt]]

    def test_a_chat_template_has_the_last_word(self, tokenizer):
        record = Record("Write a", (" response.",), (Message("user", "Write a"),), "<|endoftext|>")
        prompt, = encode_prompts([record], tokenizer, family_of("auto", "mistral"), 48)
        assert tokenizer.bos_token_id not in prompt
        prompt, = encode_prompts([record], tokenizer, FAMILIES["gemma3"], 48)
        assert prompt[0] == tokenizer.bos_token_id

    def test_a_tokenizer_that_adds_nothing(self, tmp_path):
        tiny_tokenizer(tmp_path)
        tokenizer = load_tokenizer(str(tmp_path))
        assert start_ids(tokenizer, family_of("auto", "mistral")) == []
        assert start_ids(tokenizer, FAMILIES["gemma3"]) == [0]

    def test_training_and_evaluation_start_alike_and_say_so(self, monkeypatch, tokenizer, tmp_path, caplog):
        folder = tiny_model(tmp_path, "mistral", vocab=len(tokenizer))
        caplog.set_level("INFO", logger="todi")
        read_model(str(folder), "auto", None, FP32, 64, False, trained=True)
        assert f"every sequence starts with <s>, which the tokenizer of {folder} adds" in caplog.text
        data = write_data(tmp_path / "sets" / "dolly", valid=2).parent
        read = []
        monkeypatch.setattr("todi.generation.writer.generate",
                            lambda model, prompts, *rest, **more: read.extend(prompts) or generate(
                                model, prompts, *rest, **more))
        assert run_evaluate(monkeypatch, folder, data, tmp_path / "out", "--sets", "dolly", "--seeds", 1) == 0
        assert [prompt[0] for prompt in read] == [tokenizer.bos_token_id] * 2

    def test_no_bos_where_there_must_be_one(self, tmp_path):
        tokenizer = tiny_tokenizer(tmp_path)
        tokenizer.bos_token = None
        with pytest.raises(InputError, match="has no BOS token, and a gemma3_text model starts with one"):
            start_ids(tokenizer, FAMILIES["gemma3"])

    def test_a_tokenizer_that_changes_a_text_when_it_adds_tokens(self, tmp_path):
        class Odd:
            name_or_path = "odd"

            def __call__(self, text, add_special_tokens):
                return {"input_ids": [9, 1, 9, 2] if add_special_tokens else [1, 2]}
        with pytest.raises(InputError, match="the tokenizer of odd reads a text otherwise when it adds special"):
            start_ids(Odd(), Family("mine", {}, "", prepend_bos=None))


class TestCheckpointing:
    def test_it_changes_nothing(self, tmp_path):
        model = load_model(str(tiny_model(tmp_path, "llama")), torch.float32, CPU).train()
        batch, losses, gradients = collate(texts(), pad_id=0), [], []
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            sums, _ = Student(model)(batch, DistillationCriterion())
            losses.append(sums["loss"].item())
            gradients.append(torch.autograd.grad(sums["loss"], list(model.parameters())))
        assert losses[0] == losses[1]
        assert all(map(torch.equal, *gradients))


def test_a_configuration_that_ties_what_is_not_one(tmp_path):
    file = tiny_model(tmp_path, "llama") / "config.json"
    read_model_of = json.loads(file.read_text())
    assert read_model_of["tie_word_embeddings"] is False
    file.write_text(json.dumps(read_model_of | {"tie_word_embeddings": True}))
    tiny_tokenizer(tmp_path)
    for read in (lambda: read_model(str(tmp_path), "auto", None, FP32, 64, False),
                 lambda: load_model(str(tmp_path), torch.float32, CPU)):
        with pytest.raises(InputError, match="says that lm_head.weight is model.embed_tokens.weight .*they differ"):
            read()
