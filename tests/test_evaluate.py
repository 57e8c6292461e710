"""The command line of todi.evaluate: what it writes, over ranks, killed and started again."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import launching
import pytest
import torch
from evaluating import SETTINGS, add_adapter, generations, responses, run, run_evaluate
from killing import killer
from tiny import tiny_tokenizer
from todi import evaluate
from todi.evaluation.results import Generation, Layout, annotated_table
from todi.evaluation.rouge import rouge_l
from todi.evaluation.set_files import SetStore
from todi.generation.decoding import Response
from todi.models.adapters import merge_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer


class TestEvaluate:
    def test_writes_what_it_says(self, monkeypatch, checkpoint, data, tmp_path, capsys):
        sets = ["dolly", "vicuna", "sinst/11_"]
        assert run_evaluate(monkeypatch, checkpoint, data, tmp_path / "out", "--sets", *sets, "--seeds", 1, 2) == 0
        screen = capsys.readouterr().out
        assert f"skipped: {data}/vicuna/valid.jsonl" in screen
        assert "are longer than 16 tokens and were cut" in screen

        written = generations(tmp_path / "out")
        assert list(written) == ["dolly/seed1.jsonl", "dolly/seed2.jsonl", "sinst/11_/seed1.jsonl",
                                 "sinst/11_/seed2.jsonl"]
        line = written["dolly/seed2.jsonl"][1]
        assert line["prompt"] == "Write the number 1.Write the number 1."
        assert line["references"] == ["The number", "1"]
        assert line["score"] == pytest.approx(rouge_l([line["response"]], [line["references"]])[0])

        results = json.loads((tmp_path / "out/eval/results.json").read_text())
        for name, count in (("dolly", 3), ("sinst/11_", 2)):
            lines = written[f"{name}/seed1.jsonl"] + written[f"{name}/seed2.jsonl"]
            assert len(lines) == 2 * count
            summary = results["sets"][name]
            assert summary["examples"] == count
            assert summary["rouge_l"] == pytest.approx(sum(line["score"] for line in lines) / len(lines))
            assert summary["response_tokens"] == pytest.approx(sum(line["tokens"] for line in lines) / len(lines))
            assert summary["cut_share"] == pytest.approx(sum(line["cut"] for line in lines) / len(lines))
        assert results["settings"] == {
            "max_length": 40, "max_new_tokens": 256, "max_prompt_length": 16, "do_sample": True, "temperature": 1.0,
            "top_p": 1.0, "top_k": 0, "no_repeat_ngram_size": 6, "num_beams": 1,
            "seeds": [1, 2], "limit": None, "precision": "fp32"}
        assert results["layouts"] == [{"batch_size": 256, "processes": 1}]
        table = annotated_table({"out": results})
        assert table.endswith("|\n\nfp32, batches of 256 on 1 process")
        assert table in screen
        assert (tmp_path / "out/eval/results.md").read_text() == table + "\n"
        assert not list((tmp_path / "out").rglob("*.unfinished"))

    def test_responses_depend_on_neither_batch_size_nor_ranks_nor_other_seeds(self, monkeypatch, checkpoint, data,
                                                                              tmp_path):
        for batch_size, seeds in ((1, [1, 2]), (7, [2, 1]), (64, [2])):
            words = ["--batch-size", batch_size, "--seeds", *seeds]
            assert run_evaluate(monkeypatch, checkpoint, data, tmp_path / f"batch {batch_size}", *words) == 0
        done = launching.run("eval/run_eval", str(checkpoint), "3", "--save-dir", str(tmp_path / "2 ranks"), NPROC=2,
                             DATA_DIR=data, SETS="dolly sinst/11_", SEEDS="1 2", **SETTINGS)
        assert done.returncode == 0, done.stdout
        assert "device: cpu x 2" in done.stdout
        assert done.stdout.count("results are in") == 1
        alone = responses(tmp_path / "batch 1")
        assert list(alone) == ["dolly/seed1.jsonl", "dolly/seed2.jsonl", "sinst/11_/seed1.jsonl",
                               "sinst/11_/seed2.jsonl"]
        assert responses(tmp_path / "batch 7") == responses(tmp_path / "2 ranks") == alone
        assert responses(tmp_path / "batch 64") == {path: alone[path] for path in alone if "seed2" in path}

    def test_the_loss_is_a_mean_over_tokens_of_first_references(self, monkeypatch, checkpoint, data, tmp_path):
        assert run_evaluate(monkeypatch, checkpoint, data, tmp_path / "out", "--batch-size", 2, "--seeds", 1) == 0
        model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
        losses = []
        for index in range(3):
            prompt = tokenizer(f"Write the number {index}." * (index + 1))["input_ids"][:16]
            ids = [*prompt, *tokenizer("The number")["input_ids"], tokenizer.eos_token_id]
            log_probabilities = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            losses += [-log_probabilities[at - 1, ids[at]].item() for at in range(len(prompt), len(ids))]
        results = json.loads((tmp_path / "out/eval/results.json").read_text())
        assert results["sets"]["dolly"]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)

    @pytest.mark.parametrize("processes", [launching.slow(1), launching.slow(2), launching.exhaustive(4)])
    def test_a_killed_run_goes_on_where_it_was(self, monkeypatch, checkpoint, data, tmp_path, processes):
        killed = tmp_path / "killed"
        unfinished = killed / "eval/sinst/11_/.unfinished.jsonl"
        plugin = killer(tmp_path / "killer.py", "generation", processes - 1,
                        when=f"(file := Path({str(unfinished)!r})).is_file() and len(file.open().readlines()) > 2")
        words = ["--save-dir", str(killed), "--max-length", "200"]
        settings = {"DATA_DIR": data, "SETS": "dolly sinst/11_", "SEEDS": "1 2", "NPROC": processes, **SETTINGS}
        records = [{"prompt": f"Write {index}.", "output": f"{index}"} for index in range(4 * processes)]  # two rounds
        (data / "sinst/11_/valid.jsonl").write_text("\n".join(map(json.dumps, records)))
        half = launching.run("eval/run_eval", str(checkpoint), "1", *words, **settings, PLUGINS=plugin)
        assert half.returncode == 128 + signal.SIGKILL, half.stdout
        unfinished.write_text(unfinished.read_text() + "\n[[1, 0, [3")  # as a kill in the middle of a line leaves it
        assert not (killed / "eval/results.json").exists()

        done = launching.run("eval/run_eval", str(checkpoint), "1", *words, **settings)
        assert done.returncode == 0, done.stdout
        assert re.search(r"\d+%.*<", done.stdout), "progress with the time left"
        assert " dolly: rouge-l" not in done.stdout, "the set that was finished"
        assert run_evaluate(monkeypatch, checkpoint, data, tmp_path / "whole", "--sets", "dolly", "sinst/11_",
                            "--seeds", 1, 2, "--batch-size", 1, "--max-length", 200) == 0
        assert responses(killed) == responses(tmp_path / "whole")
        then, now = (json.loads((folder / "eval/results.json").read_text()) for folder in (tmp_path / "whole", killed))
        assert then["sets"] == now["sets"]
        if processes == 1:  # what was written in which batches is the same too
            for name in ("results.json", "dolly/seed2.jsonl", "sinst/11_/seed1.jsonl", "sinst/11_/made_with.json"):
                assert (killed / "eval" / name).read_bytes() == (tmp_path / "whole/eval" / name).read_bytes()
        assert not unfinished.exists()

    def test_what_is_there_is_not_done_again_unless_made_otherwise(self, monkeypatch, checkpoint, data, tmp_path,
                                                                  capsys):
        def run(*words):
            capsys.readouterr()
            code = run_evaluate(monkeypatch, checkpoint, data, tmp_path / "out", "--sets", "dolly", *words)
            return code, capsys.readouterr().out
        first = tmp_path / "out/eval/dolly/seed1.jsonl"
        assert run("--seeds", 1)[0] == 0
        made, text = first.stat().st_mtime_ns, first.read_bytes()
        assert run("--seeds", 1, 2)[0] == 0
        assert first.stat().st_mtime_ns == made
        with monkeypatch.context() as patch:
            patch.setattr("todi.generation.writing_model.load_model",
                          lambda *_, **__: pytest.fail("weights were loaded"))
            code, screen = run("--seeds", 1, 2, "--batch-size", 3)
        assert code == 0
        assert "is there already" in screen
        assert "| out " in screen

        first.write_bytes(text + b"\n")  # touched since
        assert run("--seeds", 1, 2)[0] == 0
        assert first.read_bytes() == text
        code, screen = run("--seeds", 1, "--temperature", 0.5, "--limit", 2)
        assert "dolly: what is there was made with other data, temperature and is done again" in screen
        assert first.read_bytes() != text

    def test_the_results_say_in_what_batches_they_were_written(self, monkeypatch, checkpoint, data, tmp_path):
        def layouts(*words):
            assert run_evaluate(monkeypatch, checkpoint, data, tmp_path / "out", "--sets", "dolly", *words) == 0
            return [tuple(layout.values()) for layout in
                    json.loads((tmp_path / "out/eval/results.json").read_text())["layouts"]]
        assert layouts("--seeds", 1) == [(256, 1)]
        assert layouts("--seeds", 1, "--batch-size", 3) == [(256, 1)]  # is there already
        assert layouts("--seeds", 1, 2, "--batch-size", 3) == [(3, 1), (256, 1)]
        assert (tmp_path / "out/eval/results.md").read_text().endswith(
            "\nfp32, batches of 3 on 1 process and batches of 256 on 1 process\n")
        made = tmp_path / "out/eval/dolly/made_with.json"
        made.write_text(json.dumps({**json.loads(made.read_text()), "layouts": {}}))  # as version 0.1 left it
        assert layouts("--seeds", 1, 2) == []
        assert (tmp_path / "out/eval/results.md").read_text().endswith("\nfp32, batches of a size that was not noted\n")

    def test_an_interrupted_set_says_both_its_batches(self, tmp_path):
        made_with, generation = {"a": 1}, Generation("p", "r", ("r",), 100.0, True, 1, False)
        first = SetStore(tmp_path, "dolly", made_with, Layout(8, 1))
        first.add({(1, 0): Response([3], False)})
        first.add({(1, 1): Response([4], False)})
        second = SetStore(tmp_path, "dolly", made_with, Layout(4, 2))
        assert second.done([1]).rows == {(1, 0): Response([3], False), (1, 1): Response([4], False)}
        second.add({(1, 2): Response([5], True)})
        second.finish({1: [generation] * 3}, loss=1.0)
        assert second.layouts([1]) == SetStore(tmp_path, "dolly", made_with, Layout(1, 1)).layouts([1]) == {
            Layout(8, 1), Layout(4, 2)}

    def test_greedy_needs_one_seed(self, monkeypatch, checkpoint, data, tmp_path):
        words = ["--no-do-sample", "--seeds", 5, 6, "--limit", 1, "--sets", "dolly"]
        assert run_evaluate(monkeypatch, checkpoint, data, tmp_path / "out", *words) == 0
        assert {path: len(lines) for path, lines in generations(tmp_path / "out").items()} == {"dolly/seed5.jsonl": 1}

    def test_an_adapter_gives_what_its_merged_model_gives(self, monkeypatch, checkpoint, data, tmp_path):
        adapter, merged = tmp_path / "adapter", tmp_path / "merged"
        add_adapter(checkpoint, adapter)
        merge_adapter(AutoModelForCausalLM.from_pretrained(checkpoint), str(adapter)).save_pretrained(merged)
        tiny_tokenizer(merged)
        words = ["--data-dir", data, "--seeds", 1, "--precision", "fp32", "--max-length", 40,
                 "--max-prompt-length", 16]
        assert run(monkeypatch, evaluate, "--peft-path", adapter, *words) == 0  # the base is in adapter_config.json
        assert run(monkeypatch, evaluate, "--model-path", merged, *words) == 0  # results go beside the checkpoint
        assert run(monkeypatch, evaluate, "--model-path", checkpoint, *words, "--save-dir", tmp_path / "base") == 0
        assert generations(adapter) == generations(merged) != generations(tmp_path / "base")

    def test_from_a_shell(self, checkpoint, data, tmp_path):
        command = [sys.executable, "-m", "todi.evaluate", "--model-path", str(checkpoint), "--data-dir", str(data),
                   "--save-dir", str(tmp_path / "out"), "--sets", "dolly", "--seed=1"]
        answer = subprocess.run(command, capture_output=True, text=True, cwd=Path(evaluate.__file__).parents[1])
        assert answer.returncode == 2
        assert answer.stderr.splitlines()[-1].startswith("error: unknown option --seed; use --seeds")
