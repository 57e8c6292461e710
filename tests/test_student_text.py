"""Samples that the student writes: what a round is, who writes it, how it goes on."""

import dataclasses
import json
import shutil
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from launching import exhaustive, run, slow
from stopping import KD, TWO_RANKS, finished, gone_on_with, stopped
from tiny import tiny_model, tiny_tokenizer
from todi.criterions import DistillationCriterion, HeadRows, LinearHead, build_divergence
from todi.data.plans import StepShape
from todi.data.records import Record
from todi.data.sample_sources import DatasetSource
from todi.data.tokenize import Example, encode_examples
from todi.errors import InputError
from todi.generation.decoding import Decoding, Response
from todi.generation.sampling import stream_key
from todi.generation.writer import Writer
from todi.models.families import FAMILIES
from todi.options import from_keywords
from todi.runtime.distributed import World
from todi.settings import TrainConfig
from todi.training.mixtures import AdaptiveMixture, FixedMixture
from todi.training.student_text import Rounds, StudentSource, repetition
from transformers import AutoModelForCausalLM

END = 9
RECORDS = 11
EXAMPLES = [Example((1, number, 7, END), 2, number) for number in range(RECORDS)]  # the prompt tells the record


class Pen:
    """Stands in for a student: what it writes tells how often it has been asked, every third text is cut off."""

    def __init__(self):
        self.asked = []

    def __call__(self, prompts, keys):
        self.asked.append((list(prompts), list(keys)))
        return [Response([20 + len(self.asked), 5], cut=number % 3 == 2) for number in range(len(prompts))]


def source(write, mixture=None, *, rank=0, world=1, told=None, reader=None, **rounds):
    shape = StepShape(batch_size=2, accumulation=1, rank=rank, world=world, wanted=2)
    rounds = Rounds(**{"steps": 2, "total_steps": 100, "seed": 3, "replay_size": 1000} | rounds)
    return StudentSource(DatasetSource(EXAMPLES, shape, seed=3), write, [END] * RECORDS, mixture or FixedMixture(1),
                         rounds, reader=reader,
                         tell=lambda step, values: (told if told is not None else []).append((step, values)))


def samples(plan):
    return [example for part in plan.micro_batches for example in part]


def steps_of(wanted, epochs=(1,)):
    return [plan for epoch in epochs for plan in wanted.steps(epoch)]


class TestRounds:
    def test_a_round_answers_the_prompts_of_its_steps_and_is_closed_by_its_end(self):
        writer = Pen()
        plans = steps_of(source(writer))
        order = [example.prompt for example in DatasetSource(EXAMPLES, StepShape(2, 1), seed=3).order(1)]
        assert [prompts for prompts, _ in writer.asked] == [order[:4], order[4:8], order[8:]]
        assert [plan.closes_round for plan in plans] == [False, True, False, True, False, True]
        assert sorted(example.prompt for plan in plans for example in samples(plan)) == sorted(order)
        texts = {example.prompt: example for plan in plans for example in samples(plan)}
        assert [texts[prompt].ids[2:] for prompt in order[:4]] == [(21, 5, END), (21, 5, END), (21, 5), (21, 5, END)]
        assert plans[0].tokens == 6 and plans[1].tokens == 5  # the end counts, and where a text was cut there is none
        numbers = [texts[prompt].sample_id for prompt in order]
        assert numbers == list(range(RECORDS, 2 * RECORDS))  # behind those of the data

    def test_a_round_is_written_after_the_step_before_it(self):
        writer = Pen()
        plans = source(writer).steps(1)
        for done, rounds in ((1, 1), (2, 1), (3, 2)):
            next(plans)
            assert len(writer.asked) == rounds, f"before step {done}"

    def test_nothing_is_written_for_steps_that_the_run_does_not_take(self):
        writer = Pen()
        assert len(steps_of(source(writer, total_steps=3))) == 3
        assert [len(prompts) for prompts, _ in writer.asked] == [4, 2]

    def test_no_two_epochs_write_with_the_same_random_numbers(self):
        writer = Pen()
        steps_of(source(writer), epochs=(1, 2))
        keys = [key for _, keys in writer.asked for key in keys]
        assert len(set(keys)) == len(keys) == 2 * RECORDS

    def test_ranks_share_what_one_alone_has(self):
        alone = [sorted(samples(plan), key=str) for plan in steps_of(source(Pen(), FixedMixture(0.5)))]
        ranks = [steps_of(source(Pen(), FixedMixture(0.5), rank=rank, world=2)) for rank in range(2)]
        assert [sorted(samples(one) + samples(two), key=str) for one, two in zip(*ranks, strict=True)] == alone

    def test_mixed_the_others_keep_the_response_of_the_data(self):
        told = []
        found = [example for plan in steps_of(source(Pen(), FixedMixture(0.5), told=told), epochs=range(1, 41))
                 for example in samples(plan)]
        own = [example for example in found if example.sample_id >= RECORDS]
        assert all(example == EXAMPLES[example.sample_id] for example in found if example.sample_id < RECORDS)
        assert abs(len(own) / len(found) - 0.5) < 0.05
        assert len(own) == sum(values["written"] for _, values in told)


    def test_paired_a_prompt_comes_with_both_responses(self):
        plans = steps_of(source(Pen(), paired=True))
        order = [example.prompt for example in DatasetSource(EXAMPLES, StepShape(2, 1), seed=3).order(1)]
        for number, plan in enumerate(plans):
            prompts = order[2 * number:2 * number + 2]
            assert sorted((one.prompt, one.own) for one in samples(plan)) == sorted(
                (prompt, own) for prompt in prompts for own in (False, True))
            assert plan.samples == 2 * len(prompts)


class Reader:
    """Notes what it is told."""

    def __init__(self):
        self.told, self.forgotten = [], []

    def read(self, number, samples):
        self.told.append((number, [example.sample_id for example in samples]))

    def forget_before(self, number):
        self.forgotten.append(number)


class TestReading:
    def test_every_round_is_read_when_it_begins(self):
        reader = Reader()
        plans = source(Pen(), FixedMixture(0.5), reader=reader).steps(1)
        trained = [sorted(example.sample_id for plan in islice(plans, 2) for example in samples(plan))
                   for _ in range(3)]
        assert [number for number, _ in reader.told] == [0, 2, 4]
        assert [sorted(ids) for _, ids in reader.told] == trained

    def test_what_comes_again_is_left_out(self):
        reader, writer = Reader(), Pen()
        steps_of(source(writer, FixedMixture(1, replayed=0.6), replay_size=4, reader=reader), epochs=(1, 2))
        found = [sample for _, ids in reader.told for sample in ids]
        assert len(found) == len(set(found)) == sum(len(prompts) for prompts, _ in writer.asked) < 2 * RECORDS

    @pytest.mark.parametrize("done", (2, 3, 7))
    def test_a_run_that_goes_on_has_all_read_that_may_come(self, done):
        def make(reader):
            return source(Pen(), FixedMixture(0.7, replayed=0.5), replay_size=4, reader=reader)

        first, second = Reader(), Reader()
        begun = make(first)
        list(islice((plan for epoch in (1, 2) for plan in begun.steps(epoch)), done))
        again = make(second)
        again.load_state_dict(json.loads(json.dumps(begun.state_dict())))
        list(again.steps(1 + done // 6, done % 6))
        told = {(number, sample) for number, ids in first.told for sample in ids}
        texts = [*begun.latest, *begun.round.texts.values()]
        before = {(number, sample) for number, ids in second.told for sample in ids if number <= begun.round.first}
        assert {(text.step, text.example.sample_id) for text in texts} <= before <= told

    def test_it_forgets_what_no_state_has(self):
        """Of the two that are kept and of the one that is about to be."""
        reader = Reader()
        made = source(Pen(), FixedMixture(1), replay_size=0, reader=reader)
        for _ in made.steps(1):
            made.state_dict()
        assert reader.forgotten == [0, 0, 2, 2]
        assert sorted(number for number, _ in reader.told) == [0, 2, 4]


class TestReplay:
    def test_texts_come_again_once_there_are_so_many(self):
        told, writer = [], Pen()
        plans = steps_of(source(writer, FixedMixture(1, replayed=0.6), replay_size=6, told=told), epochs=(1, 2, 3))
        assert [values["replayed"] for _, values in told[:2]] == [0, 0]  # six texts are there before the third round
        again = sum(values["replayed"] for _, values in told)
        assert 0.4 < again / (3 * RECORDS - 8) < 0.8
        found = [example for plan in plans for example in samples(plan)]
        assert len(found) == 3 * RECORDS == again + sum(len(prompts) for prompts, _ in writer.asked)
        assert len({example.sample_id for example in found}) == sum(len(prompts) for prompts, _ in writer.asked)
        assert told[0][1]["lag"] == 0.5  # of two steps the first is trained on what was written just before
        assert all(values["lag"] > 1 for _, values in told if values["replayed"] > 2)

    def test_the_oldest_go(self):
        writer = Pen()
        made = source(writer, FixedMixture(1, replayed=0.5), replay_size=4)
        steps_of(made, epochs=(1, 2))
        assert [text.response[0] for text in made.latest] == sorted(text.response[0] for text in made.latest)
        assert len(made.latest) == 4 and made.latest[-1].response[0] == 20 + len(writer.asked)


class TestState:
    @pytest.mark.parametrize("done", range(1, 6))
    def test_it_goes_on_within_a_round(self, done):
        """What is left of the round is not written again; what comes after is written with the same keys."""
        def make(writer):
            return source(writer, FixedMixture(0.8, replayed=0.5), replay_size=3)

        whole, first, second = Pen(), Pen(), Pen()
        wanted = steps_of(make(whole), epochs=(1, 2))
        before = make(first)
        begun = list(islice(before.steps(1), done))
        after = make(second)
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        second.asked = list(first.asked)  # so that it writes on as the one before
        found = [*begun, *after.steps(1, done), *after.steps(2)]
        assert found == wanted
        assert second.asked == whole.asked

    def test_of_a_run_on_the_data_alone_until_now(self):
        made = source(Pen())
        made.load_state_dict({})
        assert len(list(made.steps(1, 3))) == 3

    def test_an_adaptive_mixture_is_in_it(self):
        made, other = (source(Pen(), AdaptiveMixture()) for _ in range(2))
        for loss in (2.0, 2.2):
            made.observe({"dev/loss": loss})
        other.load_state_dict(made.state_dict())
        assert other.mixture == AdaptiveMixture(0.1, 2.2)


def test_an_adaptive_mixture_rises_with_the_loss_on_dev():
    """DistiLLM, section 3.2: against the loss at the last rise, which does not move when the loss falls."""
    mixture, shares = AdaptiveMixture(), []
    for loss in (2.0, 1.5, 2.05, 2.11, 2.2, 2.22, 1.0):
        mixture.observe({"dev/loss": loss, "dev/rouge_l": 1})
        mixture.observe({"train/loss": 100})
        shares.append(round(mixture.shares(0.3)[0], 6))
    assert shares == [0, 0, 0, 0.1, 0.1, 0.2, 0.2]
    assert mixture.shares(0.3)[1] == 0.3


@pytest.mark.parametrize("responses, share", [([(1, 2, 3, 4)], 0), ([(1, 2, 3)], 0), ([], 0), ([(1,) * 8], 0.8),
                                              ([(1, 2, 3, 4, 1, 2, 3, 4), (1, 2, 3, 4)], 1 / 6)])
def test_repetition(responses, share):
    assert repetition(responses) == pytest.approx(share)


def test_it_writes_what_transformers_writes(tmp_path):
    """Greedily, until a stop or the limits; and is in training as before."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path, "llama")).train()
    prompts, stops = [(5, 6, 7), (8, 9), (10, 11, 12, 13)], frozenset(range(0, 300, 30))
    decoding = Decoding(max_length=12, max_new_tokens=9, top_k=1)
    writer = Writer(model, SimpleNamespace(pad_token_id=0), decoding, 2, World(0, 1, 0, 1))
    found = writer.write(prompts, [stream_key("x", i) for i in range(3)], stops)
    assert model.training
    for prompt, response in zip(prompts, found, strict=True):
        limit = min(9, 12 - len(prompt))
        theirs = model.eval().generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=limit, pad_token_id=0,
                                       eos_token_id=sorted(stops))[0, len(prompt):].tolist()
        assert response == Response([token for token in theirs if token not in stops], cut=theirs[-1] not in stops)


@pytest.mark.parametrize("given, said", [
    ({"samples": "student"}, "--samples student needs --kd-rate 1, got 0.5"),
    ({"samples": "mixed", "criterion": "cross_entropy"}, "--samples mixed needs --criterion vanilla_kd"),
    ({"round_steps": 3}, "--round-steps needs --samples student, mixed, adaptive or paired"),
    ({"samples": "student", "student_share": 0.3, "kd_rate": 1}, "--student-share needs --samples mixed"),
    ({"samples": "adaptive", "replay": 0.3, "kd_rate": 1}, "--replay needs --samples student or mixed: adaptive"),
    ({"samples": "paired", "replay": 0.3, "kd_rate": 1}, "--replay needs --samples student or mixed: paired"),
    ({"student_kd_objective": "ToDi"}, "--student-kd-objective needs --samples student, mixed, adaptive or paired"),
    ({"samples": "mixed", "kd_rate": 1, "student_kd_params": ["beta=1"]}, "needs --student-kd-objective"),
    ({"samples": "nobody"}, "--samples must be dataset, student, mixed, adaptive or paired, got 'nobody'")])
def test_settings_that_do_not_go_together(given, said):
    with pytest.raises(InputError, match=said) as refused:
        from_keywords(TrainConfig, {"model_path": "m", "teacher_model_path": ["t"], **given})
    assert len(refused.value.problems) == 1


# --- one divergence for the data, another for what the student writes

@pytest.mark.parametrize("own", [(True, False, True, False), (False, False, False, False), (True,) * 4])
@pytest.mark.parametrize("names", [("skewed_forward_kl", "skewed_reverse_kl_detached"), ("SE_KD", "reverse_kl")])
def test_the_loss_is_that_of_the_data_plus_that_of_the_students_text(own, names):
    generator, counts = torch.Generator().manual_seed(0), (3, 0, 5, 2)
    hidden, weight, theirs, teacher_weight = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((10, 4), (13, 4), (10, 6), (13, 6)))
    labels, leaves = torch.arange(10), [hidden.requires_grad_(), weight.requires_grad_()]
    data, student = (DistillationCriterion(build_divergence(name), 2.0, 1.0, chunk_size=3) for name in names)

    def rows_of(wrote):
        chosen = [one == wrote for one, count in zip(own, counts, strict=True) for _ in range(count)]
        return torch.tensor(chosen).nonzero().squeeze(1)

    found = dataclasses.replace(data, own=student)(hidden, LinearHead(weight), labels,
                                                   HeadRows(theirs, LinearHead(teacher_weight)), counts, own)
    expected: dict[str, torch.Tensor] = {}
    for criterion, wrote in ((data, False), (student, True)):
        rows = rows_of(wrote)
        part = criterion(hidden[rows], LinearHead(weight), labels[rows],
                         HeadRows(theirs[rows], LinearHead(teacher_weight)),
                         [count for count, one in zip(counts, own, strict=True) if one == wrote])
        expected = {name: value + expected.get(name, 0) for name, value in part.items()}
    torch.testing.assert_close(dict(found), expected)
    torch.testing.assert_close(torch.autograd.grad(found["loss"], leaves),
                               torch.autograd.grad(expected["loss"], leaves))


# --- through a launcher

ON_POLICY = {"SAMPLES": "student", "KD_RATE": 1, "ROUND_STEPS": 2, "SAMPLE_TOKENS": 12, "EVAL_GEN": 0}


def told(outcome, kind):
    return [line for line in outcome["metrics"] if line["kind"] == kind]


def without_speed(outcome):
    """Tokens a second of a round are no result."""
    return outcome | {"metrics": [{name: value for name, value in line.items() if name != "tokens_per_second"}
                                  for line in outcome["metrics"]]}


@pytest.mark.parametrize("more", [exhaustive({}), slow({"SAMPLES": "mixed", "REPLAY": 0.5, "REPLAY_SIZE": 8}),
                                  exhaustive(TWO_RANKS)])
def test_a_run_that_is_stopped_in_a_round_goes_on_bit_by_bit(settings, tmp_path, more):
    settings = settings | ON_POLICY | {"ROUND_STEPS": 3} | more
    stopped(tmp_path / "stopped", settings)  # after the fifth step, the second of a round
    assert without_speed(gone_on_with(tmp_path / "stopped", settings)) == without_speed(
        finished(tmp_path / "whole", **settings))


@pytest.mark.slow
def test_two_ranks_do_what_one_does(workshop, settings, tmp_path):
    models = {variable: workshop.model(f"on-policy-{variable}", family="llama", hidden=hidden, seed=hidden)
              for variable, hidden in (("MODEL_PATH", 32), ("TEACHER_MODEL_PATH", 48))}  # without dropout
    settings = settings | models | ON_POLICY | {"EPOCH": 2}
    alone, two = (finished(tmp_path / str(len(more)), **settings | more) for more in ({}, TWO_RANKS))
    for name in ("response_tokens", "repetition", "cut_share", "empty_share", "lag", "written"):
        assert [line[name] for line in told(alone, "round")] == [line[name] for line in told(two, "round")], name
    losses = [[line["loss"] for line in told(outcome, "train")] for outcome in (alone, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 6


DISTILLM_2 = {"SAMPLES": "paired", "KD_OBJ": "skewed_forward_kl", "STUDENT_KD_OBJ": "skewed_reverse_kl_detached"}


@pytest.mark.parametrize("more", [{}, *map(slow, ({"ZERO_STAGE": 3, **TWO_RANKS}, DISTILLM_2 | {"PACKING": "off"})),
                                  *map(exhaustive, ({"PEFT": "lora"}, {"SAMPLES": "adaptive", "EPOCH": 3},
                                                    {"PACKING": "off", "ZERO_STAGE": 0}))])
def test_it_trains(settings, tmp_path, more):
    done = run(KD, **settings | ON_POLICY | {"EPOCH": 1, "SAVE_DIR": tmp_path} | more)
    assert done.returncode == 0, done.stdout
    lines = list(map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()))
    rounds = [line for line in lines if line["kind"] == "round"]
    if "SAMPLES" not in more:
        assert [line["step"] for line in rounds] == [0, 2]
        assert all(0 < line["response_tokens"] <= 12 for line in rounds)
        assert rounds[0]["samples"] == rounds[0]["written"] == 16 and rounds[1]["written"] == 2
    assert len([line for line in lines if line["kind"] == "train"]) == 3 * int(more.get("EPOCH", 1))


def test_a_prompt_alone_has_no_end(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path)
    alone, whole = (encode_examples([Record("Write a number:", references)], tokenizer, FAMILIES["gpt2"], 64, 48)[0]
                    for references in ((), ("",)))
    assert (*alone.ids, tokenizer.eos_token_id) == whole.ids
    assert (alone.response_tokens, whole.response_tokens) == (0, 1)


@pytest.mark.slow
def test_prompts_may_come_alone(workshop, settings, tmp_path):
    """The student writes the same to them as to those that have responses; those cannot be trained on."""
    shutil.copytree(workshop.data, tmp_path / "alone")
    records = map(json.loads, (tmp_path / "alone/train.jsonl").read_text().splitlines())
    (tmp_path / "alone/train.jsonl").write_text(
        "".join(json.dumps({"prompt": record["prompt"]}) + "\n" for record in records))
    common = settings | ON_POLICY | {"EPOCH": 1}
    whole = finished(tmp_path / "whole", **common)
    alone = finished(tmp_path / "run", **common | {"DATA_DIR": tmp_path / "alone"})
    assert without_speed(alone)["metrics"] == without_speed(whole)["metrics"]
    refused = run(KD, **common | {"DATA_DIR": tmp_path / "alone", "SAMPLES": "mixed", "SAVE_DIR": tmp_path / "mixed"})
    assert refused.returncode == 2 and refused.stdout.count("lacks output") == 18, refused.stdout
