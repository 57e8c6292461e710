"""The teacher cache: exact, shared, completed, refused, checked; its commands; training from it."""

import dataclasses
import json
import logging
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch
from launching import ROOT, Workshop, run, write_data
from tiny import ARCHITECTURES
from todi import cache as command
from todi import teachers
from todi.config import DataConfig, TeacherConfig
from todi.criterions import DistillationCriterion, build_divergence
from todi.data.batches import StepPlanner, collate
from todi.data.records import load_records
from todi.data.tokenize import encode_examples
from todi.engine.cache import store as store_module
from todi.engine.cache.building import BATCH_TOKENS, alone, fill
from todi.engine.cache.choice import Estimate
from todi.engine.cache.reading import CachedTeacher
from todi.engine.cache.store import CacheStore, CorruptCache
from todi.engine.device import Precision
from todi.engine.distributed import World
from todi.engine.optimizer import build_optimizer
from todi.engine.student import Student
from todi.engine.teacher import LiveTeacher, TeacherSource
from todi.models.families import family_of
from todi.models.loading import add_lora, load_model, load_tokenizer
from todi.options import InputError, run_main
from todi.teachers import Lesson, check_match, choose_cache, describe_choice, fill_cache, load_teacher, open_teacher

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, 1)
SPECIAL = {"gemma3_text": {"final_logit_softcapping": 5.0}}


def lesson_of(workshop: Workshop, family: str = "gpt2", adapter: Path | None = None, train_num: int | None = None,
              **changes: object) -> Lesson:
    """What a tiny teacher of a family says about the workshop's samples."""
    path = workshop.model(f"cache-{family}-teacher", family=family, hidden=48, vocab=320, seed=1,
                          **SPECIAL.get(family, {}))
    teacher = TeacherConfig(teacher_model_path=str(path), teacher_peft_path=adapter and str(adapter))
    data = DataConfig(data_dir=str(workshop.data), max_length=64, max_prompt_length=48, train_num=train_num)
    tokenizer, file = load_tokenizer(str(path)), workshop.data / "train.jsonl"
    examples = encode_examples(load_records(file, train_num), tokenizer, family_of("auto", family), 64, 48)
    lesson = Lesson(teacher, data, Precision("fp32", "test"), torch.float32, tokenizer, examples, file)
    return dataclasses.replace(lesson, **changes)


@pytest.fixture(scope="module")
def lesson(workshop) -> Lesson:
    return lesson_of(workshop)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(store_module, "SHARD_SAMPLES", 5)


@pytest.fixture
def filled(lesson, tmp_path, small_shards) -> Path:
    """A complete cache of 18 samples in 4 shards."""
    fill_cache(lesson, tmp_path / "cache", ALONE, CPU)
    return tmp_path / "cache"


def filled_by(lesson: Lesson, folder: Path, batch_tokens: int) -> CachedTeacher:
    """The teacher source of a new cache whose batches have so many tokens."""
    folder.mkdir()
    live = LiveTeacher(load_teacher(lesson, CPU))
    store = CacheStore.create(folder, lesson.fingerprint, lesson.made_from, lesson.layout, live.head)
    fill(store, live, lesson.examples, lesson.tokenizer.pad_token_id, ALONE, CPU, batch_tokens)
    return CachedTeacher(CacheStore(folder), CPU)


def distil(student: Path, teacher: TeacherSource, lesson: Lesson, batch_size: int) -> tuple[list, dict]:
    """The loss of every micro-batch of three epochs, and the weights after them."""
    model = Student(load_model(str(student), torch.float32, CPU))
    # a large epsilon: Adam would blow up the rounding errors of gradients that are zero in truth
    optimizer = build_optimizer(model, lr=1e-3, betas=(0.9, 0.999), eps=1e-2, weight_decay=0.01)
    criterion = DistillationCriterion(build_divergence("ToDi"), temperature=2.0, kd_rate=0.5)
    planner, losses = StepPlanner(lesson.examples, batch_size, accumulation=2, seed=3), []
    for epoch in range(1, 4):
        for plan in planner.epoch(epoch):
            for samples in plan.micro_batches:
                batch = collate(lesson.examples, samples, lesson.tokenizer.pad_token_id)
                sums, _ = model(batch, criterion, teacher.rows(batch))
                (sums.loss / plan.tokens).backward()
                losses.append(sums.loss.item())
            optimizer.step()
            optimizer.zero_grad()
    return losses, model.state_dict()


def make_adapter(teacher: str, folder: Path) -> Path:
    model = add_lora(load_model(teacher, torch.float32, CPU), family_of("auto", "gpt2"), 4, 8, 0.0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(1))
    model.save_pretrained(folder)
    return folder


class TestExactness:
    @pytest.mark.parametrize("family", ARCHITECTURES)
    def test_three_epochs_are_the_same(self, workshop, tmp_path, family):
        lesson = lesson_of(workshop, family)
        student = workshop.model(f"cache-{family}-student", family=family, seed=2, **SPECIAL.get(family, {}))
        live = LiveTeacher(load_teacher(lesson, CPU))
        alone = filled_by(lesson, tmp_path / "alone", batch_tokens=1)
        losses, weights = distil(student, live, lesson, batch_size=1)
        cached_losses, cached_weights = distil(student, alone, lesson, batch_size=1)
        assert cached_losses == losses
        assert all(torch.equal(cached_weights[name], weight) for name, weight in weights.items())

        batched = filled_by(lesson, tmp_path / "batched", batch_tokens=BATCH_TOKENS["cpu"])
        losses, weights = distil(student, live, lesson, batch_size=4)
        cached_losses, cached_weights = distil(student, batched, lesson, batch_size=4)
        assert cached_losses == pytest.approx(losses, rel=1e-6)
        for name, weight in weights.items():
            torch.testing.assert_close(cached_weights[name], weight, rtol=1e-6, atol=1e-6, msg=name)

    def test_an_adapter_is_merged(self, workshop, lesson, tmp_path):
        adapter = make_adapter(lesson.teacher.teacher_model_path, tmp_path / "adapter")
        adapted = lesson_of(workshop, adapter=adapter)
        cached = filled_by(adapted, tmp_path / "cache", batch_tokens=1)
        live, plain = (LiveTeacher(load_teacher(which, CPU)) for which in (adapted, lesson))
        batch = collate(lesson.examples, [7], 0)
        assert torch.equal(cached.rows(batch).hidden, live.rows(batch).hidden)
        assert not torch.allclose(live.rows(batch).hidden, plain.rows(batch).hidden)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_teachers_and_stores(self, lesson, tmp_path, dtype):
        live = LiveTeacher(load_teacher(lesson, CPU))
        halved = filled_by(dataclasses.replace(lesson, stored_dtype=dtype), tmp_path / "cache", batch_tokens=1)
        batch = collate(lesson.examples, [7], 0)
        assert torch.equal(halved.rows(batch).hidden, live.rows(batch).hidden.to(dtype))
        assert torch.equal(halved.head.weight, live.head.weight)

    def test_a_bf16_teacher(self, lesson, tmp_path):
        lesson = dataclasses.replace(lesson, precision=Precision("bf16", "test"), stored_dtype=torch.bfloat16)
        cached, live = filled_by(lesson, tmp_path / "cache", batch_tokens=1), LiveTeacher(load_teacher(lesson, CPU))
        batch = collate(lesson.examples, [7], 0)
        assert torch.equal(cached.rows(batch).hidden, live.rows(batch).hidden)
        assert cached.head.weight.dtype == torch.bfloat16

    def test_any_batch_of_any_rank(self, lesson, filled):
        cached, live = open_teacher(lesson, filled, ALONE, CPU), LiveTeacher(load_teacher(lesson, CPU))
        for rank in range(3):
            planner = StepPlanner(lesson.examples, batch_size=3, accumulation=1, seed=1, rank=rank, world=3)
            for plan in planner.epoch(2):
                cached.expect([i for ids in plan.micro_batches for i in ids])
                for samples in [*plan.micro_batches, ()]:  # the last one is a filler
                    batch = collate(lesson.examples, samples, 0)
                    torch.testing.assert_close(cached.rows(batch).hidden, live.rows(batch).hidden, rtol=0, atol=1e-5)


class TestFilling:
    def test_what_is_there_stays(self, lesson, filled, monkeypatch):
        before = {path: path.read_bytes() for path in filled.rglob("*") if path.is_file()}
        shutil.rmtree(filled / "shard00001")
        (filled / ".shard00002.unfinished").mkdir()
        kept = filled / "shard00000" / "hidden.bin"
        asked, written, rows = [], kept.stat().st_mtime_ns, LiveTeacher.rows
        monkeypatch.setattr(LiveTeacher, "rows",
                            lambda self, batch: asked.extend(batch.sample_ids.tolist()) or rows(self, batch))
        fill_cache(lesson, filled, ALONE, CPU)
        assert sorted(asked) == [5, 6, 7, 8, 9]
        assert kept.stat().st_mtime_ns == written
        assert {path: path.read_bytes() for path in filled.rglob("*") if path.is_file()} == before

    def test_a_second_run_waits_and_finds_it_done(self, lesson, tmp_path, monkeypatch, small_shards, todi_log):
        folder, loaded = tmp_path / "cache", []
        monkeypatch.setattr("todi.engine.cache.building._RETRY_SECONDS", 0.05)
        monkeypatch.setattr(teachers, "load_teacher", lambda *args: loaded.append(1) or load_teacher(*args))
        waits = threading.Event()
        todi_log.called = lambda line: "waiting for it" in line and waits.set()
        with alone(folder, ALONE):
            second = threading.Thread(target=fill_cache, args=(lesson, folder, ALONE, CPU))
            second.start()
            assert waits.wait(10)
            live = LiveTeacher(load_teacher(lesson, CPU))
            store = CacheStore.create(folder, lesson.fingerprint, lesson.made_from, lesson.layout, live.head)
            fill(store, live, lesson.examples, 0, ALONE, CPU)
        second.join(10)
        assert not second.is_alive()
        assert not loaded

    def test_reading_writes_nothing(self, lesson, filled):
        (filled / "lock").unlink()
        before = {path: path.stat().st_mtime_ns for path in [filled, *filled.rglob("*")]}
        teacher = open_teacher(lesson, filled, ALONE, CPU)
        teacher.rows(collate(lesson.examples, range(18), 0))
        assert {path: path.stat().st_mtime_ns for path in [filled, *filled.rglob("*")]} == before


class TestFingerprint:
    def test_a_cache_of_something_else_is_refused_with_every_difference(self, workshop, lesson, filled, tmp_path):
        other = lesson_of(workshop, "llama", train_num=7, precision=Precision("bf16", "test"),
                          stored_dtype=torch.bfloat16)
        with pytest.raises(InputError) as refused:
            choose(other, str(filled))
        said = str(refused.value)
        for part in ("teacher weights was", "records was 18, is 7", "precision was fp32, is bf16",
                     "stored dtype was fp32, is bf16", "token ids was"):
            assert part in said
        for part in ("tokenizer was", "data was", "max_length was"):
            assert part not in said

    def test_what_it_depends_on(self, workshop, lesson, tmp_path):
        base = lesson.fingerprint
        adapter = make_adapter(lesson.teacher.teacher_model_path, tmp_path / "adapter")
        copy = shutil.copytree(lesson.teacher.teacher_model_path, tmp_path / "copy")
        data = write_data(tmp_path / "data", train=18) / "train.jsonl"
        with data.open("a") as file:
            file.write("\n")  # another file, the same records
        moved = dataclasses.replace(lesson, teacher=TeacherConfig(teacher_model_path=str(copy)))
        assert moved.fingerprint == base
        flip(copy / "model.safetensors", -1)
        changes = {"teacher weights": dataclasses.replace(moved),
                   "teacher adapter": lesson_of(workshop, adapter=adapter),
                   "data": dataclasses.replace(lesson, train_file=data),
                   "max_length": dataclasses.replace(lesson, data=dataclasses.replace(lesson.data, max_length=65)),
                   "token ids": dataclasses.replace(lesson, examples=lesson.examples[::-1])}
        for name, changed in changes.items():
            assert {part for part in base if changed.fingerprint[part] != base[part]} == {name}
            assert changed.shared_folder != lesson.shared_folder

    def test_a_resumed_run_keeps_its_choice(self, lesson, monkeypatch):
        monkeypatch.setattr(Lesson, "estimate", None)  # nothing is weighed again
        for mode in ("off", "on"):
            cache = choose(lesson, mode)
            assert choose(lesson, "auto", earlier=describe_choice(lesson, cache)) == cache


class TestAuto:
    def test_a_single_pass_is_live_and_reads_no_weights(self, lesson, monkeypatch, todi_log):
        monkeypatch.setattr(teachers, "weights_checksum", None)
        assert choose(lesson, "auto", passes=1.0) is None
        assert any("none, each sample is seen once: " in line and "min to fill" in line for line in todi_log)

    @pytest.mark.parametrize(("changed", "reason"), [
        ({}, None), ({"passes": 0.5}, "each sample is seen once"), ({"seconds": 10}, "less than a minute"),
        ({"free_bytes": 19e9}, "more than 50% of the free disk")])
    def test_when_it_pays(self, changed, reason):
        costs = dataclasses.replace(Estimate(bytes=10e9, free_bytes=100e9, seconds=600, passes=3), **changed)
        assert (costs.reason_against() or "") == "" if reason is None else reason in costs.reason_against()
        assert costs.saving == (costs.passes - 1) * costs.seconds

    def test_it_takes_what_is_there(self, lesson, filled, monkeypatch):
        monkeypatch.setattr(teachers, "SHARED_CACHES", filled.parent / "shared")
        lesson.shared_folder.parent.mkdir()
        filled.rename(lesson.shared_folder)
        assert choose(lesson, "auto", passes=1.0) == lesson.shared_folder


class TestCorruption:
    def read_all(self, lesson, folder):
        teacher = open_teacher(lesson, folder, ALONE, CPU)
        for sample in range(18):
            teacher.rows(collate(lesson.examples, [sample], 0))

    @pytest.mark.parametrize("position", [0, -1])
    def test_a_flipped_byte(self, lesson, filled, position):
        flip(filled / "shard00001" / "hidden.bin", position)
        sample = 5 if position == 0 else 9
        with pytest.raises(CorruptCache, match=f"shard00001/hidden.bin: sample {sample} fails its checksum; remove"):
            self.read_all(lesson, filled)
        shutil.rmtree(filled / "shard00001")  # as the message says
        self.read_all(lesson, filled)

    @pytest.mark.parametrize(("file", "said"), [
        ("shard00002/hidden.bin", r"shard00002/hidden.bin: has \d+ bytes and should have"),
        ("shard00002/index.json", "shard00002/hidden.bin: has a damaged index"),
        ("head.safetensors", "head.safetensors fails its checksum"), ("cache.json", "cache.json is damaged")])
    def test_a_file_cut_short_is_named_at_opening(self, lesson, filled, file, said):
        with (filled / file).open("r+b") as opened:
            opened.truncate((filled / file).stat().st_size // 2)
        with pytest.raises(CorruptCache, match=said):
            open_teacher(lesson, filled, ALONE, CPU)


class TestCommands:
    @pytest.fixture(autouse=True)
    def restored_logging(self):
        logger = logging.getLogger("todi")
        handlers, propagates, level = logger.handlers, logger.propagate, logger.level
        yield
        logger.handlers, logger.propagate = handlers, propagates
        logger.setLevel(level)

    @pytest.fixture
    def todi_cache(self, monkeypatch, capsys):
        def call(*words: object) -> tuple[int, str]:
            monkeypatch.setattr(sys, "argv", ["todi.cache", *map(str, words)])
            with pytest.raises(SystemExit) as end:
                run_main(command.main)
            output = "".join(capsys.readouterr())
            if isinstance(end.value.code, str):  # what Python prints before it exits with 1
                return 1, output + end.value.code
            return end.value.code, output
        return call

    def test_build_info_verify(self, lesson, tmp_path, todi_cache, small_shards):
        settings = ["--teacher-model-path", lesson.teacher.teacher_model_path, "--data-dir", lesson.data.data_dir,
                    "--max-length", 64, "--max-prompt-length", 48, "--precision", "fp32"]
        folder = tmp_path / "cache"
        code, said = todi_cache("build", folder, *settings)
        assert code == 0, said
        assert "is complete: 18 samples" in said
        check_match(CacheStore(folder), lesson)
        code, said = todi_cache("info", folder)
        assert (code, "complete; 18 samples, " in said, "teacher weights: " in said) == (0, True, True)
        code, said = todi_cache("verify", folder, "--samples", 9)
        assert (code, "9 samples computed again: 9 equal to the last bit" in said) == (0, True), said

        assert todi_cache("build", folder, *settings[:-1], "bf16")[0] == 2
        flip(folder / "shard00003" / "hidden.bin", 3)
        with (folder / "shard00000" / "hidden.bin").open("ab") as file:
            file.write(b"x")
        code, said = todi_cache("verify", folder)
        assert (code, said.count("error: ")) == (1, 2)
        assert "shard00000/hidden.bin: has " in said
        assert "shard00003/hidden.bin: sample 15 fails its checksum" in said
        assert todi_cache("info", folder)[0] == 1

    def test_verify_finds_another_teachers_numbers(self, lesson, filled, todi_cache):
        hidden = filled / "shard00001" / "hidden.bin"
        numbers = torch.frombuffer(bytearray(hidden.read_bytes()), dtype=torch.float32).view(-1, 48)
        shutil.rmtree(hidden.parent)
        rows = [lesson.examples[i].response_tokens for i in range(5, 10)]
        CacheStore(filled).write(1, numbers * 1.001, rows)
        code, said = todi_cache("verify", filled, "--samples", 18)
        assert (code, said.count("error: sample ")) == (1, 5), said
        assert "error: sample 7: the teacher's hidden states differ by 0.001" in said

    @pytest.mark.parametrize(("words", "said"), [
        (["info", "nowhere"], "error: no teacher cache at nowhere: cache.json is not there"),
        (["verify", "nowhere"], "error: no teacher cache at nowhere"),
        (["build", "nowhere"], "error: --teacher-model-path is required"),
        (["build", "nowhere", "--teacher-model-path", "/no/model", "--data-dir", "/no/data"],
         "error: no such data file: /no/data/train.jsonl\nerror: no model at /no/model"),
        (["built", "nowhere"], "invalid choice: 'built'"), (["info"], "required: folder")])
    def test_bad_input(self, todi_cache, words, said):
        code, output = todi_cache(*words)
        assert code == 2
        assert said in output
        assert all(line.startswith("error: ") for line in output.splitlines())


class TestLaunchers:
    KD = "gpt2/vanilla_kd_gpt2_base"

    @pytest.fixture(scope="class")
    def settings(self, workshop) -> dict[str, object]:
        teacher = workshop.model("cache-launched-teacher", family="gpt2", hidden=48, vocab=320, seed=1)
        student = workshop.model("cache-gpt2-student", family="gpt2", seed=2)
        return {"MODEL_PATH": student, "TEACHER_MODEL_PATH": teacher, "EPOCH": 3, "EVAL_GEN": 0, "LR": 1e-3}

    def test_on_twice_and_off(self, workshop, settings):
        """The second run does not load the teacher; all three come to the same."""
        remains = ROOT / teachers.SHARED_CACHES
        self.remove_caches(remains)
        try:
            eps = ("--adam-eps", "1e-2")
            off = workshop.train(self.KD, "cache off", *eps, **settings | {"TEACHER_CACHE": "off"})
            first = workshop.train(self.KD, "cache on", *eps, **settings | {"TEACHER_CACHE": "on"}).result()
            again = workshop.train(self.KD, "cache on again", *eps, **settings | {"TEACHER_CACHE": "on"}).result()
        finally:
            self.remove_caches(remains)
        losses = [[line["loss"] for line in done.metrics("train")] for done in (off.result(), first, again)]
        assert losses[1] == losses[2]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
        assert (first.checkpoint / "model.safetensors").read_bytes() == \
            (again.checkpoint / "model.safetensors").read_bytes()
        assert "M parameters" in first.output.split("student")[0]
        assert f"teacher {settings['TEACHER_MODEL_PATH']}" not in again.output
        assert "its weights are not loaded" in again.output
        deciding = json.loads((again.folder / "args.json").read_text())["deciding"]
        assert deciding["teacher"] == "cached in fp32"

    @pytest.mark.slow
    def test_two_ranks_fill_it_like_one(self, workshop, settings, tmp_path):
        data = write_data(tmp_path / "data", train=600, dev=2)
        settings = settings | {"DATA_DIR": data, "MAX_STEPS": 2}
        done = workshop.train(self.KD, "cache of two", **settings | {"TEACHER_CACHE": tmp_path / "two", "NPROC": 2})
        alone = workshop.train(self.KD, "cache of one", **settings | {"TEACHER_CACHE": tmp_path / "one"})
        assert done.result().checkpoint
        assert alone.result().checkpoint
        ones, twos = ({str(path.relative_to(tmp_path / name)): path.read_bytes()
                       for path in (tmp_path / name).rglob("*") if path.is_file()} for name in ("one", "two"))
        assert len(ones) == 9  # three shards of two files, cache.json, the head, the lock
        assert ones == twos
        assert "3 of 3 shards" in done.result().output

    def test_another_cache_is_refused_before_weights_are_loaded(self, workshop, settings, filled, tmp_path):
        done = run(self.KD, **workshop.settings | settings | {"TEACHER_CACHE": filled, "SAVE_DIR": tmp_path / "run",
                                                              "MAX_LENGTH": 63})
        assert done.returncode == 2
        assert "max_length was 64, is 63" in done.stdout
        assert not (tmp_path / "run").exists()

    def remove_caches(self, folder: Path) -> None:
        for path in folder.glob("cache-launched-teacher-*"):
            shutil.rmtree(path)


def choose(lesson: Lesson, mode: str, passes: float = 3.0, earlier: str | None = None) -> Path | None:
    return choose_cache(lesson, mode, passes=passes, ranks=1, device=CPU, earlier=earlier)


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


class Lines(list):
    """Log lines; `called` is told of each."""

    called = staticmethod(lambda line: None)


@pytest.fixture
def todi_log():
    """The lines that this project logs."""
    lines, logger = Lines(), logging.getLogger("todi")

    class Keep(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())
            lines.called(record.getMessage())

    keep, level = Keep(), logger.level
    logger.addHandler(keep)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(keep)
    logger.setLevel(level)
