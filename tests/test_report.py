"""todi.report: several checkpoints side by side, against a baseline, and as a chart."""

import json

import pytest
from evaluating import run, run_evaluate
from todi import report


class TestReport:
    def test_puts_checkpoints_side_by_side(self, monkeypatch, checkpoint, data, tmp_path, capsys):
        for name, words in {"a": ["--sets", "dolly"], "b": ["--temperature", 0.5]}.items():
            assert run_evaluate(monkeypatch, checkpoint, data, tmp_path / name, "--seeds", 1, 2, *words) == 0
        capsys.readouterr()
        assert run(monkeypatch, report, tmp_path / "a", tmp_path / "b", "--names", "ToDi", "half") == 0
        screen = capsys.readouterr().out
        assert "the rows do not compare: they were made with different temperature" in screen
        header, _, first, second, _, made = screen.splitlines()[-6:]
        assert made == "fp32, batches of 256 on 1 process"
        assert header.split() == ["|", "ROUGE-L", "|", "dolly", "|", "sinst/11_", "|", "average", "|"]
        assert first.startswith("| ToDi ") and first.split("|")[3].strip() == "–"
        mean = json.loads((tmp_path / "b/eval/results.json").read_text())["average"]["rouge_l"]
        assert second.startswith("| half ") and f"{mean:.2f} ±" in second.split("|")[4]

    def test_against_a_baseline_with_a_chart(self, monkeypatch, checkpoint, data, tmp_path, capsys):
        for name, words in {"a": [], "b": ["--temperature", 0.5]}.items():
            assert run_evaluate(monkeypatch, checkpoint, data, tmp_path / name, "--seeds", 1, 2, *words) == 0
        capsys.readouterr()
        chart = tmp_path / "charts/scores.png"
        words = [tmp_path / "a", tmp_path / "b", "--names", "one", "half", "--baseline", tmp_path / "a"]
        assert run(monkeypatch, report, *words, "--output", chart) == 0
        *_, header, _, row, _ = capsys.readouterr().out.splitlines()
        assert header.split() == ["|", "less", "one", "|", "dolly", "|", "sinst/11_", "|", "average", "|"]
        mean = {name: json.loads((tmp_path / name / "eval/results.json").read_text())["average"]["rouge_l"]
                for name in "ab"}
        assert row.startswith("| half ")
        assert row.split("|")[4].split()[0] == f"{mean['b'] - mean['a']:+.2f}"
        assert "p = " in row
        assert chart.read_bytes().startswith(b"\x89PNG")

    def test_a_baseline_of_other_examples(self, monkeypatch, checkpoint, data, tmp_path, capsys):
        def refused(name, *words):
            assert run_evaluate(monkeypatch, checkpoint, data, tmp_path / name, *words) == 0
            capsys.readouterr()
            assert run(monkeypatch, report, tmp_path / name, "--baseline", tmp_path / "base") == 2
            return capsys.readouterr().err.splitlines()
        assert run_evaluate(monkeypatch, checkpoint, data, tmp_path / "base", "--seeds", 1, 2) == 0
        assert run(monkeypatch, report, tmp_path / "base", "--baseline", tmp_path / "base") == 2
        assert "error: nothing to compare with --baseline" in capsys.readouterr().err
        here, base = tmp_path, tmp_path / "base"
        assert refused("sets", "--seeds", 1, 2, "--sets", "dolly") == [
            f"error: {here}/sets has the sets dolly, the baseline {base} dolly, sinst/11_: only the same sets compare"]
        assert refused("seeds", "--seeds", 1) == [
            f"error: {name}: {here}/seeds has the seeds 1, the baseline {base} 1, 2" for name in ("dolly", "sinst/11_")]
        assert refused("fewer", "--seeds", 1, 2, "--limit", 2) == [
            f"error: dolly: {here}/fewer has 2 examples, the baseline {base} 3"]
        (data / "dolly/valid.jsonl").write_text((data / "dolly/valid.jsonl").read_text().replace("number 1", "word"))
        assert refused("others", "--seeds", 1, 2) == [
            f"error: dolly: 1 of 3 examples of {here}/others are others in the baseline {base}"]

    @pytest.mark.parametrize(("words", "message"), [
        ([], "name at least one folder with results"),
        (["nowhere"], "no results in nowhere"),
        (["bad"], "bad/eval/results.json is not a file of results"),
        (["bad", "bad"], "two rows would have the same name: bad, bad"),
        (["bad", "--names", "a", "b"], "--names has 2 names for 1 folders"),
        (["bad", "--output", "chart.doc"], "--output chart.doc: a picture is one of .png, .pdf, .svg"),
    ])
    def test_bad_input(self, monkeypatch, tmp_path, capsys, words, message):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "bad/eval").mkdir(parents=True)
        (tmp_path / "bad/eval/results.json").write_text('{"sets": 3}')
        assert run(monkeypatch, report, *words) == 2
        assert f"error: {message}" in capsys.readouterr().err
