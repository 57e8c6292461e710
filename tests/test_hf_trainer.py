"""ToDiTrainer against the objective written down once more, from the logits of whole batches."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from evaluating import run
from launching import write_data
from peft import LoraConfig, get_peft_model
from tiny import tiny_model, tiny_tokenizer
from todi import cache as cache_command
from todi.criterions import DIVERGENCES, build_divergence
from todi.errors import InputError
from todi.hf_teachers import encode_file
from todi.hf_trainer import ToDiTrainer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    TrainingArguments,
)

KD_RATE, TEMPERATURE = 0.3, 2.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A student, a teacher whose vocabulary is padded, and data."""
    folder = tmp_path_factory.mktemp("trainer")
    for name, shape in {"student": {"seed": 2}, "teacher": {"hidden": 48, "seed": 1, "vocab": 320}}.items():
        tokenizer = tiny_tokenizer(folder / name)
        tiny_model(folder / name, **{"vocab": len(tokenizer)} | shape)
    write_data(folder / "data", train=16, dev=7)
    return folder


@pytest.fixture
def tokenizer(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture
def student(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "student")


@pytest.fixture
def teacher(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "teacher")


@pytest.fixture
def rows(folder, tokenizer):
    return encode_file(folder / "data" / "train.jsonl", tokenizer, model_type="gpt2", max_length=64,
                       max_prompt_length=48)


def make(tmp_path, model, tokenizer, rows, batch=4, accumulation=2, steps=2, **more):
    names = {"eval_batch": "per_device_eval_batch_size", "smoothing": "label_smoothing_factor",
             "save_after": "save_steps"}
    arguments = {names[name]: more.pop(name) for name in names if name in more}
    arguments = TrainingArguments(
        str(tmp_path / "out"), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
        max_steps=steps, learning_rate=1e-2, logging_steps=1, report_to=[], use_cpu=True,
        save_strategy="steps" if "save_steps" in arguments else "no", disable_tqdm=True,
        train_sampling_strategy="sequential", **arguments)
    settings = {"kd_rate": KD_RATE, "kd_temperature": TEMPERATURE} | more
    collator = DataCollatorForSeq2Seq(tokenizer)
    return ToDiTrainer(model, arguments, train_dataset=rows, data_collator=collator, **settings)


def written_down(model, teacher, batch, objective, **params):
    """Loss per label, from logits in float64."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits, theirs = (one.double()(**inputs).logits[:, :-1] for one in (model, teacher))
    labels = batch["labels"][:, 1:]
    counts = labels != -100
    vocabulary = min(logits.shape[-1], theirs.shape[-1])
    logits, theirs = logits[counts][:, :vocabulary], theirs[counts][:, :vocabulary]
    ce = torch.nn.functional.cross_entropy(logits, labels[counts])
    kd = build_divergence(objective, **params)(logits, theirs, TEMPERATURE, labels[counts]).mean()
    return ((1 - KD_RATE) * ce + KD_RATE * kd).item()


@pytest.mark.parametrize("objective", [name for name in DIVERGENCES if not DIVERGENCES[name].selection])
def test_every_divergence(tmp_path, student, teacher, tokenizer, rows, objective):
    """Padding on the right, prompts without a label, vocabularies of different sizes."""
    trainer = make(tmp_path, student, tokenizer, rows, teacher=teacher, objective=objective)
    batch = trainer.data_collator(rows[:5])
    loss = trainer.compute_loss(student, batch)
    assert loss.requires_grad
    expected = written_down(copy.deepcopy(student), copy.deepcopy(teacher), batch, objective)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_rows_are_selected_from_each_sample(tmp_path, student, teacher, tokenizer, rows, packed):
    """However samples lie in a batch: the rows of all of them are those of each by itself."""
    trainer = make(tmp_path, student, tokenizer, rows, teacher=teacher, objective="SE_KD", kd_params={"share": 0.3})
    batch = DataCollatorWithFlattening()(rows[:5]) if packed else trainer.data_collator(rows[:5])
    student, teacher, kept = copy.deepcopy(student).double(), copy.deepcopy(teacher).double(), []
    for row in rows[:5]:
        ids, counts = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:] != -100
        with torch.no_grad():
            logits, theirs = (model(input_ids=ids).logits[0, :-1][counts] for model in (student, teacher))
        logits, theirs = (side[:, :student.config.vocab_size] for side in (logits, theirs))
        q = (logits / TEMPERATURE).softmax(-1)
        surest_last = (q * q.log()).sum(-1).argsort()[:math.ceil(0.3 * len(q))]
        kept.append(build_divergence("forward_kl")(logits, theirs, TEMPERATURE)[surest_last].sum() / 0.3)
    sums = trainer._sums(trainer.model, batch, trainer.teacher)
    assert sums["kd"].item() == pytest.approx(sum(kept).item(), rel=1e-5)
    assert sums["tokens"] == (batch["labels"] != -100).sum()


SCHEDULED = {"TAID": ("kd_t", {"t_rate": 0.5}), "ToDi_scheduled": ("kd_beta", {"beta_end": 4.0}),
             "AdaKD": ("kd_share", {"share_momentum": 0.5, "share_rate": 0.2, "share_tolerance": 1e-4})}


@pytest.mark.parametrize("objective", SCHEDULED)
def test_a_schedule_moves_with_the_steps_and_is_in_checkpoints(tmp_path, folder, teacher, tokenizer, rows, objective):
    """A run, the same in other micro-batches, and the same gone on with from a checkpoint: equal losses and values."""
    moved, params = SCHEDULED[objective]

    def trained(name, batch, checkpoint=None):
        model = AutoModelForCausalLM.from_pretrained(folder / "student")
        trainer = make(tmp_path / name, model, tokenizer, rows, batch, 8 // batch, steps=6, teacher=teacher,
                       save_after=3, objective=objective, kd_params=params)
        trainer.train(resume_from_checkpoint=checkpoint)
        lines = [line for line in trainer.state.log_history if "loss" in line]
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
        return [[line[key] for key in ("loss", "kd", moved)] for line in lines]

    whole = trained("whole", 8)
    checkpoint = tmp_path / "whole" / "out" / "checkpoint-3"
    assert len({value for _, _, value in whole}) > 2
    for found in (trained("cut", 2), trained("resumed", 8, str(checkpoint))):
        assert found == [pytest.approx(line, rel=1e-5) for line in whole]
    if objective != "ToDi_scheduled":  # whose state is the number of the step
        saved = json.loads((checkpoint / "trainer_state.json").read_text())
        del saved["stateful_callbacks"]["ToDiTrainer schedule"]
        (checkpoint / "trainer_state.json").write_text(json.dumps(saved))
        assert trained("forgotten", 8, str(checkpoint))[3:] != [pytest.approx(line, rel=1e-5) for line in whole[3:]]


def test_a_step_is_divided_once_however_it_is_cut(tmp_path, folder, tokenizer, rows, teacher):
    """8 x 1, 4 x 2, 1 x 8: the same losses and the same weights."""
    found = []
    for batch in (8, 4, 1):
        model = AutoModelForCausalLM.from_pretrained(folder / "student")
        trainer = make(tmp_path, model, tokenizer, rows, batch, 8 // batch, teacher=teacher)
        trainer.train()
        lines = [line for line in trainer.state.log_history if "loss" in line]
        assert [set(line) >= {"loss", "kd", "ce", "accuracy"} for line in lines] == [True, True]
        found.append(([line["loss"] for line in lines], model.transformer.h[0].attn.c_attn.weight.detach()))
    for losses, weight in found[1:]:
        assert losses == pytest.approx(found[0][0], rel=1e-6)
        assert torch.allclose(weight, found[0][1], atol=1e-6)


def test_the_log_has_the_parts_of_the_loss(tmp_path, student, teacher, tokenizer, rows):
    trainer = make(tmp_path, student, tokenizer, rows, teacher=teacher)
    trainer.train()
    for line in (line for line in trainer.state.log_history if "loss" in line):
        assert line["loss"] == pytest.approx((1 - KD_RATE) * line["ce"] + KD_RATE * line["kd"], rel=1e-5)


def test_sft(tmp_path, student, tokenizer, rows):
    """Without a teacher it is the model's own loss."""
    trainer = make(tmp_path, student, tokenizer, rows, objective="cross_entropy")
    batch = trainer.data_collator(rows[:5])
    own = student(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss
    assert trainer.compute_loss(student, batch).item() == pytest.approx(own.item(), rel=1e-5)
    trainer.train()
    assert "kd" not in trainer.state.log_history[0]


def test_label_smoothing_is_the_arguments(tmp_path, student, tokenizer, rows):
    plain, smooth = (make(tmp_path, student, tokenizer, rows, objective="cross_entropy", smoothing=share)
                     for share in (0.0, 0.3))
    batch = plain.data_collator(rows[:5])
    logits = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), label_smoothing=0.3)
    assert smooth.compute_loss(student, batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_lora_trains_the_adapter_alone(tmp_path, student, teacher, tokenizer, rows):
    model = get_peft_model(student, LoraConfig(task_type="CAUSAL_LM", r=4, fan_in_fan_out=True))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make(tmp_path, model, tokenizer, rows, teacher=teacher)
    trainer.train()
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert changed and all("lora_" in name for name in changed)
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "adapter_config.json").is_file()


class TestEvaluation:
    def test_the_loss_does_not_depend_on_the_batches(self, tmp_path, student, teacher, tokenizer, rows):
        """7 samples of different lengths in batches of 2, 3 and 7."""
        batch = DataCollatorForSeq2Seq(tokenizer)(rows[:7])
        expected = written_down(copy.deepcopy(student), copy.deepcopy(teacher), batch, "ToDi")
        for size in (2, 3, 7):
            trainer = make(tmp_path, student, tokenizer, rows, teacher=teacher, eval_dataset=rows[:7], eval_batch=size)
            metrics = trainer.evaluate()
            assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
            assert {"eval_kd", "eval_ce", "eval_accuracy"} <= metrics.keys()

    def test_a_metric_gets_logits(self, tmp_path, student, teacher, tokenizer, rows):
        def metric(predictions):
            hits = predictions.predictions[:, :-1].argmax(-1) == predictions.label_ids[:, 1:]
            return {"hits": float(np.mean(hits[predictions.label_ids[:, 1:] != -100]))}

        trainer = make(tmp_path, student, tokenizer, rows, teacher=teacher, eval_dataset=rows[:7], eval_batch=3,
                       compute_metrics=metric)
        metrics = trainer.evaluate()
        assert metrics["eval_hits"] == pytest.approx(metrics["eval_accuracy"])


class TestCache:
    @pytest.fixture
    def cache(self, folder, tmp_path):
        """As `python -m todi.cache build` makes one."""
        words = ["build", tmp_path / "cache", "--teacher-model-path", folder / "teacher", "--data-dir", folder / "data",
                 "--precision", "fp32", "--max-length", 64, "--max-prompt-length", 48]
        with pytest.MonkeyPatch.context() as patch:
            assert run(patch, cache_command, *words) == 0
        return tmp_path / "cache"

    def test_it_gives_what_the_teacher_gives(self, tmp_path, folder, tokenizer, rows, teacher, cache):
        found = []
        for source in (teacher, cache):
            model = AutoModelForCausalLM.from_pretrained(folder / "student")
            trainer = make(tmp_path, model, tokenizer, rows, teacher=source, eval_dataset=rows[:3])
            trainer.train()
            found.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
        assert len(found[0]) == 2 and found[1] == pytest.approx(found[0], rel=1e-6)
        metrics = trainer.evaluate()  # a cache has no sample of an evaluation set
        assert metrics["eval_loss"] == pytest.approx(metrics["eval_ce"])

    def test_other_samples_are_refused(self, tmp_path, student, tokenizer, rows, cache):
        with pytest.raises(InputError, match="is of other samples than train_dataset"):
            make(tmp_path, student, tokenizer, rows[1:], teacher=cache)

    def test_batches_must_say_which_samples_they_have(self, tmp_path, student, tokenizer, rows, cache):
        trainer = make(tmp_path, student, tokenizer, rows, teacher=cache)
        batch = trainer.data_collator([{name: row[name] for name in ("input_ids", "labels")} for row in rows[:2]])
        with pytest.raises(InputError, match="every batch needs sample_ids"):
            trainer.compute_loss(student, batch)


class TestRefusals:
    @pytest.mark.parametrize(("given", "objective"), [(False, "ToDi"), (True, "cross_entropy")])
    def test_a_divergence_needs_a_teacher(self, tmp_path, student, teacher, tokenizer, rows, given, objective):
        with pytest.raises(InputError, match="a divergence needs a teacher"):
            make(tmp_path, student, tokenizer, rows, teacher=teacher if given else None, objective=objective)

    def test_an_unknown_divergence(self, tmp_path, student, teacher, tokenizer, rows):
        with pytest.raises(ValueError, match="did you mean ToDi"):
            make(tmp_path, student, tokenizer, rows, teacher=teacher, objective="TodDi")

    def test_data_parallel(self, tmp_path, student, teacher, tokenizer, rows, monkeypatch):
        monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
        with pytest.raises(InputError, match="2 GPUs in one process"):
            make(tmp_path, student, tokenizer, rows, teacher=teacher)

    def test_a_teacher_with_another_tokenizer(self, tmp_path, folder, student, tokenizer, rows):
        other = AutoTokenizer.from_pretrained(folder / "teacher")
        other.add_tokens(["<other>"])
        path = tmp_path / "other"
        tiny_model(path, vocab=len(other))
        other.save_pretrained(path)
        with pytest.raises(InputError, match="different tokenizers"):
            make(tmp_path, student, tokenizer, rows, teacher=path, processing_class=tokenizer)


def test_the_model_stays_a_model_of_transformers(tmp_path, student, teacher, tokenizer, rows):
    """Its forward does what it did, and a copy has a forward of its own."""
    batch = DataCollatorForSeq2Seq(tokenizer)(rows[:3])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    before = student(**inputs)
    make(tmp_path, student, tokenizer, rows, teacher=teacher)
    after = student(**inputs)
    assert after.logits.equal(before.logits) and after.loss.equal(before.loss)
    twin = copy.deepcopy(student)
    with torch.no_grad():
        twin.transformer.wte.weight.zero_()
    assert student(**inputs).logits.equal(before.logits) and not twin(**inputs).logits.any()


def test_shifted_labels_are_taken_as_they_are(tmp_path, student, teacher, tokenizer, rows):
    trainer = make(tmp_path, student, tokenizer, rows, teacher=teacher)
    batch = dict(trainer.data_collator(rows[:4]))
    shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    assert trainer.compute_loss(student, batch | {"shift_labels": shifted}).equal(trainer.compute_loss(student, batch))
