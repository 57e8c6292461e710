"""The teacher cache: exact for every family, completed, refused with the differences, checked."""

import dataclasses
import logging
import shutil
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from launching import write_data
from teachers import ALONE, CPU, SPECIAL, filled_by, flip, make_adapter, teacher_spec_of
from tiny import ARCHITECTURES
from todi.criterions import DistillationCriterion, build_divergence
from todi.data.batches import collate
from todi.data.plans import StepShape
from todi.data.sample_sources import DatasetSource
from todi.errors import InputError, StorageError
from todi.models.loading import load_model
from todi.runtime.device import Precision
from todi.teacher import opening
from todi.teacher import spec as spec_module
from todi.teacher.cache_files import CacheStore, CorruptCache
from todi.teacher.choice import Estimate
from todi.teacher.filling import BATCH_TOKENS, fill, filling_alone
from todi.teacher.live import LiveTeacher
from todi.teacher.opening import choose_cache, describe_choice, fill_cache, load_teacher, open_teacher
from todi.teacher.source import TeacherSource
from todi.teacher.spec import TeacherSpec
from todi.training.optimizer import build_optimizer
from todi.training.student import Student


def distil(student: Path, teacher: TeacherSource, spec: TeacherSpec, batch_size: int) -> tuple[list, dict]:
    """The loss of every micro-batch of three epochs, and the weights after them."""
    model = Student(load_model(str(student), torch.float32, CPU))
    # a large epsilon: Adam would blow up the rounding errors of gradients that are zero in truth
    optimizer = build_optimizer(model, lr=1e-3, betas=(0.9, 0.999), eps=1e-2, weight_decay=0.01)
    criterion = DistillationCriterion(build_divergence("ToDi"), temperature=2.0, kd_rate=0.5)
    source, losses = DatasetSource(spec.examples, StepShape(batch_size, accumulation=2), seed=3), []
    for epoch in range(1, 4):
        for plan in source.steps(epoch):
            for samples in plan.micro_batches:
                batch = collate(samples, spec.tokenizer.pad_token_id)
                sums, _ = model(batch, criterion, teacher.rows(batch))
                (sums["loss"] / plan.tokens).backward()
                losses.append(sums["loss"].item())
            optimizer.step()
            optimizer.zero_grad()
    return losses, model.state_dict()


class TestExactness:
    @pytest.mark.parametrize("family", ARCHITECTURES)
    def test_three_epochs_are_the_same(self, workshop, tmp_path, family):
        spec = teacher_spec_of(workshop, family)
        student = workshop.model(f"cache-{family}-student", family=family, seed=2, **SPECIAL.get(family, {}))
        live = LiveTeacher(load_teacher(spec, CPU))
        alone = filled_by(spec, tmp_path / "alone", batch_tokens=1)
        losses, weights = distil(student, live, spec, batch_size=1)
        cached_losses, cached_weights = distil(student, alone, spec, batch_size=1)
        assert cached_losses == losses
        assert all(torch.equal(cached_weights[name], weight) for name, weight in weights.items())

        batched = filled_by(spec, tmp_path / "batched", batch_tokens=BATCH_TOKENS["cpu"])
        losses, weights = distil(student, live, spec, batch_size=4)
        cached_losses, cached_weights = distil(student, batched, spec, batch_size=4)
        assert cached_losses == pytest.approx(losses, rel=1e-6)
        for name, weight in weights.items():
            torch.testing.assert_close(cached_weights[name], weight, rtol=1e-6, atol=1e-6, msg=name)

    def test_an_adapter_is_merged(self, workshop, spec, tmp_path):
        adapter = make_adapter(spec.path, tmp_path / "adapter")
        adapted = teacher_spec_of(workshop, adapter=adapter)
        cached = filled_by(adapted, tmp_path / "cache", batch_tokens=1)
        live, plain = (LiveTeacher(load_teacher(which, CPU)) for which in (adapted, spec))
        batch = collate([spec.examples[7]], 0)
        assert torch.equal(cached.rows(batch).hidden, live.rows(batch).hidden)
        assert not torch.allclose(live.rows(batch).hidden, plain.rows(batch).hidden)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_teachers_and_stores(self, spec, tmp_path, dtype):
        live = LiveTeacher(load_teacher(spec, CPU))
        halved = filled_by(dataclasses.replace(spec, stored_dtype=dtype), tmp_path / "cache", batch_tokens=1)
        batch = collate([spec.examples[7]], 0)
        assert torch.equal(halved.rows(batch).hidden, live.rows(batch).hidden.to(dtype))
        assert torch.equal(halved.head.weight, live.head.weight)

    def test_a_bf16_teacher(self, spec, tmp_path):
        spec = dataclasses.replace(spec, precision=Precision("bf16", "test"), stored_dtype=torch.bfloat16)
        cached, live = filled_by(spec, tmp_path / "cache", batch_tokens=1), LiveTeacher(load_teacher(spec, CPU))
        batch = collate([spec.examples[7]], 0)
        assert torch.equal(cached.rows(batch).hidden, live.rows(batch).hidden)
        assert cached.head.weight.dtype == torch.bfloat16

    @pytest.mark.parametrize("family", ARCHITECTURES)
    def test_packed_and_padded_passes_store_the_same(self, workshop, tmp_path, family):
        spec = teacher_spec_of(workshop, family)
        padded, packed = (filled_by(spec, tmp_path / f"{packed}", 100, packed) for packed in (False, True))
        batch = collate(spec.examples, 0)
        torch.testing.assert_close(packed.rows(batch).hidden, padded.rows(batch).hidden, rtol=1e-6, atol=2e-6)

    def test_any_batch_of_any_rank(self, spec, filled):
        cached, live = open_teacher(spec, filled, ALONE, CPU), LiveTeacher(load_teacher(spec, CPU))
        for rank in range(3):
            source = DatasetSource(spec.examples, StepShape(3, 1, rank, world=3), seed=1)
            for plan in source.steps(2):
                cached.expect([example.sample_id for samples in plan.micro_batches for example in samples])
                for samples in [*plan.micro_batches, ()]:  # the last one is a filler
                    batch = collate(samples, 0)
                    torch.testing.assert_close(cached.rows(batch).hidden, live.rows(batch).hidden, rtol=0, atol=1e-5)


class TestFilling:
    def test_what_is_there_stays(self, spec, filled, monkeypatch):
        before = {path: path.read_bytes() for path in filled.rglob("*") if path.is_file()}
        shutil.rmtree(filled / "shard00001")
        (filled / ".shard00002.unfinished").mkdir()
        kept = filled / "shard00000" / "hidden.bin"
        asked, written, rows = [], kept.stat().st_mtime_ns, LiveTeacher.rows
        monkeypatch.setattr(LiveTeacher, "rows",
                            lambda self, batch: asked.extend(batch.sample_ids.tolist()) or rows(self, batch))
        fill_cache(spec, filled, ALONE, CPU)
        assert sorted(asked) == [5, 6, 7, 8, 9]
        assert kept.stat().st_mtime_ns == written
        assert {path: path.read_bytes() for path in filled.rglob("*") if path.is_file()} == before

    def test_a_second_run_waits_and_finds_it_done(self, spec, tmp_path, monkeypatch, small_shards, todi_log):
        folder, loaded = tmp_path / "cache", []
        monkeypatch.setattr("todi.teacher.filling._RETRY_SECONDS", 0.05)
        monkeypatch.setattr(opening, "load_teacher", lambda *args: loaded.append(1) or load_teacher(*args))
        waits = threading.Event()
        todi_log.called = lambda line: "waiting for it" in line and waits.set()
        with filling_alone(folder, ALONE):
            second = threading.Thread(target=fill_cache, args=(spec, folder, ALONE, CPU))
            second.start()
            assert waits.wait(10)
            live = LiveTeacher(load_teacher(spec, CPU))
            store = CacheStore.create(folder, spec.fingerprint, spec.made_from, spec.layout, live.head)
            fill(store, live, spec.examples, partial(collate, pad_id=0), ALONE, CPU)
        second.join(10)
        assert not second.is_alive()
        assert not loaded

    def test_a_full_disk_is_said_before_the_teacher_is_loaded(self, spec, tmp_path, monkeypatch):
        monkeypatch.setattr(opening, "free_bytes", lambda folder: 1000)
        monkeypatch.setattr(opening, "load_teacher", None)
        with pytest.raises(StorageError, match=r"would take 0\.00 GB, and 0\.00 GB are free"):
            fill_cache(spec, tmp_path, ALONE, CPU)

    def test_reading_writes_nothing(self, spec, filled):
        assert not (filled / "lock").exists()  # it is there only while somebody fills it
        before = {path: path.stat().st_mtime_ns for path in [filled, *filled.rglob("*")]}
        teacher = open_teacher(spec, filled, ALONE, CPU)
        teacher.rows(collate(spec.examples, 0))
        assert {path: path.stat().st_mtime_ns for path in [filled, *filled.rglob("*")]} == before


class TestFingerprint:
    def test_a_cache_of_something_else_is_refused_with_every_difference(self, workshop, spec, filled, tmp_path):
        other = teacher_spec_of(workshop, "llama", train_num=7, precision=Precision("bf16", "test"),
                          stored_dtype=torch.bfloat16)
        with pytest.raises(InputError) as refused:
            choose(other, str(filled))
        said = str(refused.value)
        for part in ("teacher weights was", "records was 18, is 7", "precision was fp32, is bf16",
                     "stored dtype was fp32, is bf16", "token ids was"):
            assert part in said
        for part in ("tokenizer was", "data was", "max_length was"):
            assert part not in said

    def test_what_it_depends_on(self, workshop, spec, tmp_path):
        base = spec.fingerprint
        adapter = make_adapter(spec.path, tmp_path / "adapter")
        copy = shutil.copytree(spec.path, tmp_path / "copy")
        data = write_data(tmp_path / "data", train=18) / "train.jsonl"
        with data.open("a") as file:
            file.write("\n")  # another file, the same records
        moved = dataclasses.replace(spec, path=str(copy))
        assert moved.fingerprint == base
        flip(copy / "model.safetensors", -1)
        changes = {"teacher weights": dataclasses.replace(moved),
                   "teacher adapter": teacher_spec_of(workshop, adapter=adapter),
                   "data": dataclasses.replace(spec, train_files=[data]),
                   "max_length": dataclasses.replace(spec, data=dataclasses.replace(spec.data, max_length=65)),
                   "token ids": dataclasses.replace(spec, examples=spec.examples[::-1])}
        for name, changed in changes.items():
            assert {part for part in base if changed.fingerprint[part] != base[part]} == {name}
            assert changed.shared_folder != spec.shared_folder

    def test_a_resumed_run_keeps_its_choice(self, spec, monkeypatch):
        monkeypatch.setattr(TeacherSpec, "estimate", None)  # nothing is weighed again
        for mode in ("off", "on"):
            cache = choose(spec, mode)
            assert choose(spec, "auto", earlier=describe_choice(spec, cache)) == cache


class TestAuto:
    def test_a_single_pass_is_live_and_reads_no_weights(self, spec, monkeypatch, todi_log):
        spec = dataclasses.replace(spec)  # without a fingerprint that is remembered
        monkeypatch.setattr(spec_module, "weights_checksum", None)
        assert choose(spec, "off") is None
        assert choose(spec, "auto", passes=1.0) is None
        assert any("none, each sample is seen once: " in line and "min to fill" in line for line in todi_log)

    @pytest.mark.parametrize(("changed", "reason"), [
        ({}, None), ({"passes": 0.5}, "each sample is seen once"), ({"seconds": 10}, "less than a minute"),
        ({"free_bytes": 19e9}, "more than 50% of the free disk")])
    def test_when_it_pays(self, changed, reason):
        costs = dataclasses.replace(Estimate(bytes=10e9, free_bytes=100e9, seconds=600, passes=3), **changed)
        assert (costs.reason_against() or "") == "" if reason is None else reason in costs.reason_against()
        assert costs.saving == (costs.passes - 1) * costs.seconds

    def test_it_takes_what_is_there(self, spec, filled, monkeypatch):
        monkeypatch.setattr(spec_module, "SHARED_CACHES", filled.parent / "shared")
        spec.shared_folder.parent.mkdir()
        filled.rename(spec.shared_folder)
        assert choose(spec, "auto", passes=1.0) == spec.shared_folder


class TestCorruption:
    def read_all(self, spec, folder):
        teacher = open_teacher(spec, folder, ALONE, CPU)
        for sample in range(18):
            teacher.rows(collate([spec.examples[sample]], 0))

    @pytest.mark.parametrize("position", [0, -1])
    def test_a_flipped_byte(self, spec, filled, position):
        flip(filled / "shard00001" / "hidden.bin", position)
        sample = 5 if position == 0 else 9
        with pytest.raises(CorruptCache, match=f"shard00001/hidden.bin: sample {sample} fails its checksum; remove"):
            self.read_all(spec, filled)
        shutil.rmtree(filled / "shard00001")  # as the message says
        self.read_all(spec, filled)

    @pytest.mark.parametrize(("file", "said"), [
        ("shard00002/hidden.bin", r"shard00002/hidden.bin: has \d+ bytes and should have"),
        ("shard00002/index.json", "shard00002/hidden.bin: has a damaged index"),
        ("head.safetensors", "head.safetensors fails its checksum"), ("cache.json", "cache.json is damaged")])
    def test_a_file_cut_short_is_named_at_opening(self, spec, filled, file, said):
        with (filled / file).open("r+b") as opened:
            opened.truncate((filled / file).stat().st_size // 2)
        with pytest.raises(CorruptCache, match=said):
            open_teacher(spec, filled, ALONE, CPU)


def choose(spec: TeacherSpec, mode: str, passes: float = 3.0, earlier: str | None = None) -> Path | None:
    return choose_cache(spec, mode, passes=passes, ranks=1, device=CPU, earlier=earlier)


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
