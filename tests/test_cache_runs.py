"""The teacher cache as a user meets it: the commands of todi.cache, and launchers that train from one."""

import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch
from launching import ROOT, run, write_data
from stopping import Launched
from teachers import ALONE, flip
from todi import cache as command
from todi.errors import run_main
from todi.teacher.cache_files import CacheStore
from todi.teacher.filling import filling_alone
from todi.teacher.opening import check_match
from todi.teacher.spec import SHARED_CACHES


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

    def test_build_info_verify(self, spec, tmp_path, todi_cache, small_shards):
        settings = ["--teacher-model-path", spec.path, "--data-dir", *spec.data.data_dir,
                    "--max-length", 64, "--max-prompt-length", 48, "--precision", "fp32"]
        folder = tmp_path / "cache"
        code, said = todi_cache("build", folder, *settings)
        assert code == 0, said
        assert "is complete: 18 samples" in said
        check_match(CacheStore(folder), spec)
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

    def test_of_two_data_folders(self, spec, tmp_path, todi_cache):
        more = write_data(tmp_path / "more", train=3)
        code, said = todi_cache("build", tmp_path / "cache", "--teacher-model-path", spec.path,
                                "--data-dir", *spec.data.data_dir, more, "--max-length", 64, "--precision", "fp32",
                                "--max-prompt-length", 48)
        assert (code, "is complete: 21 samples" in said) == (0, True), said
        code, said = todi_cache("verify", tmp_path / "cache", "--samples", 21)
        assert (code, "21 samples computed again: 21 equal to the last bit" in said) == (0, True), said

    def test_verify_finds_another_teachers_numbers(self, spec, filled, todi_cache):
        hidden = filled / "shard00001" / "hidden.bin"
        numbers = torch.frombuffer(bytearray(hidden.read_bytes()), dtype=torch.float32).view(-1, 48)
        shutil.rmtree(hidden.parent)
        rows = [spec.examples[i].response_tokens for i in range(5, 10)]
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
        remains = ROOT / SHARED_CACHES
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
        assert "its weights are not in memory" in again.output
        deciding = json.loads((again.folder / "args.json").read_text())["deciding"]
        assert deciding["teacher"] == "cached in fp32"

    @pytest.mark.slow
    def test_two_runs_at_once_share_one_pass(self, workshop, settings, tmp_path):
        """Both are seen waiting for this test; then one has the pass to itself, and the other has its cache."""
        cache = tmp_path / "cache"
        settings = workshop.settings | settings | {"MAX_STEPS": 2, "TEACHER_CACHE": cache}
        with filling_alone(cache, ALONE):
            runs = [Launched(**settings, KD_OBJ=name, SAVE_DIR=tmp_path / name) for name in ("ToDi", "reverse_kl")]
            for launched in runs:
                assert launched.wait_for(f"filling the teacher cache {cache}; waiting for it"), launched.output
        assert [launched.end() for launched in runs] == [0, 0], [launched.output for launched in runs]
        teacher = f"teacher {settings['TEACHER_MODEL_PATH']}"
        assert sorted(teacher in launched.output for launched in runs) == [False, True]

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
        assert len(ones) == 8  # three shards of two files, cache.json, the head
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
