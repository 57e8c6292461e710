"""Bad input of todi.evaluate."""

import pytest
from evaluating import add_adapter, run, run_evaluate
from tiny import tiny_model
from todi import evaluate


class TestBadInput:
    """One clear line for each problem, exit code 2, and no weights loaded."""

    @pytest.fixture(autouse=True)
    def _no_weights(self, monkeypatch):
        monkeypatch.setattr("todi.generation.writing_model.load_model",
                            lambda *_, **__: pytest.fail("weights were loaded"))

    @pytest.mark.parametrize(("words", "message"), [
        (["--model-path", "no/such/folder/here"], "no model at no/such/folder/here"),
        (["--data-dir", "nowhere"], "none of the sets is there; looked for nowhere/dolly/valid.jsonl"),
        (["--sets", "vicuna"], "none of the sets is there"),
        (["--sets"], "--sets needs at least one"),
        (["--sets", "../data/dolly"], "--sets must be the plain name of a folder below --sets-dir, got '../data/"),
        (["--sets", "dolly", "dolly"], "--sets: dolly given more than once"),
        (["--seeds", 10, 20, 10], "--seeds: 10 given more than once"),
        (["--seeds", "ten"], "invalid int value: 'ten'"),
        (["--batch-size", -1], "--batch-size must be at least 0, got -1"),
        (["--limit", 0], "--limit must be at least 1, got 0"),
        (["--max-prompt-length", 40], "--max-prompt-length (40) must be below --max-length (40)"),
        (["--max-length", 513], "has 512 positions"),
        (["--temperature", 0], "--temperature must be above 0, got 0.0"),
        (["--temperature", "nan"], "--temperature must be above 0, got nan"),
        (["--top-p", 0], "--top-p must be in (0, 1], got 0.0"),
        (["--top-k", -1], "--top-k must be at least 0, got -1"),
        (["--num-beams", 4], "--num-beams 4 needs --no-do-sample"),
        (["--precision", "fp8"], "invalid choice: 'fp8'"),
        (["--peft-path", "nothing"], "no LoRA adapter at nothing"),
    ])
    def test_settings(self, monkeypatch, checkpoint, data, tmp_path, capsys, words, message):
        assert run_evaluate(monkeypatch, checkpoint, data, tmp_path / "out", *words) == 2
        assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")
                and message in line], message
        assert not (tmp_path / "out").exists()

    def test_a_set_instead_of_the_folder_of_sets(self, monkeypatch, checkpoint, data, tmp_path, capsys):
        assert run_evaluate(monkeypatch, checkpoint, data, tmp_path / "out", "--sets-dir", data / "dolly") == 2
        error, = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
        assert f"{data}/dolly is a set itself" in error
        assert f"--sets-dir {data} --sets dolly, or SETS_DIR={data} SETS=dolly" in error

    def test_every_problem_is_listed(self, monkeypatch, checkpoint, data, tmp_path, capsys):
        (data / "dolly/valid.jsonl").write_text('{"prompt": "a", "output": "b"}\n{"prompt": "a"}\n[]\n')
        (data / "sinst/11_/valid.jsonl").write_text("")
        words = ["--model-path", tmp_path / "missing", "--top-k", -1]
        assert run_evaluate(monkeypatch, checkpoint, data, tmp_path / "out", *words) == 2
        assert capsys.readouterr().err.splitlines() == [
            "error: --top-k must be at least 0, got -1",
            f"error: no model at {tmp_path}/missing: no such folder or .gguf file, and not the form of a Hub name",
            f"error: {data}/dolly/valid.jsonl:2: lacks output; has prompt",
            f"error: {data}/dolly/valid.jsonl:3: expected an object, got list",
            f"error: {data}/sinst/11_/valid.jsonl has no record",
        ]

    def test_a_model_is_required_and_a_place_for_the_results(self, monkeypatch, data, capsys):
        assert run(monkeypatch, evaluate, "--data-dir", data) == 2
        assert "error: --model-path or --peft-path is required" in capsys.readouterr().err
        assert run(monkeypatch, evaluate, "--data-dir", data, "--model-path", "no/such/folder") == 2
        assert "error: --save-dir is required: no/such/folder is no folder" in capsys.readouterr().err

    @pytest.mark.parametrize(("config", "message"), [
        ('{"base_model_name_or_path": null}', "does not name the base model; give it as --model-path"),
        ('{"base_model_name_or_path": "gone/far/away"}', "no model at gone/far/away"),
        ("[1", "is not a JSON object"),
    ])
    def test_an_adapter_without_its_base(self, monkeypatch, data, tmp_path, capsys, config, message):
        (tmp_path / "adapter_config.json").write_text(config)
        assert run(monkeypatch, evaluate, "--data-dir", data, "--peft-path", tmp_path) == 2
        assert message in capsys.readouterr().err


    def test_an_adapter_of_another_model(self, monkeypatch, checkpoint, data, tmp_path, capsys):
        wide = tiny_model(tmp_path / "wide", "llama", hidden=64)
        add_adapter(wide, tmp_path / "adapter")
        words = ["--data-dir", data, "--peft-path", tmp_path / "adapter", "--model-path", checkpoint]
        assert run(monkeypatch, evaluate, *words) == 2
        error, = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
        assert f"was made for another model than {checkpoint}" in error
        assert "lora_A.weight is (4, 64), the model takes (4, 32)" in error

    @pytest.mark.parametrize("config", ["{}", "[1"])
    def test_a_folder_that_is_no_checkpoint(self, monkeypatch, data, tmp_path, capsys, config):
        (tmp_path / "folder").mkdir()
        assert run_evaluate(monkeypatch, tmp_path / "folder", data, tmp_path / "out") == 2
        (tmp_path / "folder/config.json").write_text(config)
        assert run_evaluate(monkeypatch, tmp_path / "folder", data, tmp_path / "out") == 2
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 2
        assert all(f"cannot read Config of {tmp_path}/folder" in line for line in errors)

    def test_a_set_without_references(self, monkeypatch, checkpoint, data, tmp_path, capsys):
        (data / "dolly/valid.jsonl").write_text('{"prompt": "a", "output": []}\n')
        assert run_evaluate(monkeypatch, checkpoint, data, tmp_path / "out", "--sets", "dolly") == 2
        assert "valid.jsonl:1: `output` must be a string or a non-empty list" in capsys.readouterr().err
