"""ROUGE-L, exact match, summaries, bootstrap."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from evaluating import run, run_evaluate
from rouge_score.rouge_scorer import RougeScorer
from todi import report
from todi.evaluation.bootstrap import interval, paired_difference
from todi.evaluation.results import Generation, average, example_scores, is_set_name, markdown_table, summarise
from todi.evaluation.rouge import exact_match, rouge_l
from todi.evaluation.rouge_tokens import characters, choose_tokenizer, words


class TestRouge:
    def test_equals_rouge_score_on_the_best_reference(self):
        choose = random.Random(0)
        words = ["running", "runs", "ran", "cats", "cat", "the", "a", "of,", "Budget", "budgets", "12", "naïve"]
        responses = [" ".join(choose.choices(words, k=choose.randint(0, 12))) for _ in range(300)]
        references = [[" ".join(choose.choices(words, k=choose.randint(0, 12))) for _ in range(choose.randint(1, 4))]
                      for _ in responses]
        scorer = RougeScorer(["rougeL"], use_stemmer=True)
        expected = [100 * max(scorer.score(text, response)["rougeL"].fmeasure for text in texts)
                    for response, texts in zip(responses, references, strict=True)]
        assert rouge_l(responses, references) == pytest.approx(expected, abs=1e-9)
        assert len(set(expected)) > 20
        assert rouge_l(responses, references, processes=2) == rouge_l(responses, references, processes=1)

    @pytest.mark.parametrize("text", [
        "北京是中国的首都。", "Столица России — Москва.", "عاصمة مصر هي القاهرة.", "東京は日本の首都です。",
        "नमस्ते दुनिया", "서울은 한국의 수도이다.", "Η Αθήνα είναι πρωτεύουσα.", "สวัสดีครับ", "ရန်ကုန်မြို့", "ភ្នំពេញ",
        "ວຽງຈັນ", "第3个问题的答案是北京。"])
    def test_other_scripts_are_read(self, text):
        other = text[:len(text) // 2]
        whole, half, none = rouge_l([text, other, "no such words"], [[text]] * 3)
        assert whole == 100 and none == 0
        assert 10 < half < 100

    def test_tokens(self):
        assert words("Ёлка—е\u0308лка, ÉTÉ: नमस्ते दुनिया! می\u200cروم 3,5") == [
            "ёлка", "ёлка", "été", "नमस्ते", "दुनिया", "میروم", "3", "5"]
        assert characters("GPT-4是模型。Ｔ５ Да, да ก็ดี") == [
            "gpt", "4", "是", "模", "型", "t5", "да", "да", "ก็", "ดี"]
        assert words("北京 是 首都") == ["北京", "是", "首都"]

    @pytest.mark.parametrize(("texts", "chosen"), [
        (["Où était l'élève ?", "Zażółć gęślą jaźń"], "rouge_score"),
        (["The capital of Russia is Москва, that of China 北京."] * 3, "characters"),
        (["The capital of Russia, the largest of all the countries of this world, is Mосква."], "rouge_score"),
        (["Столица", "The"], "words"), (["Столица", "首都"], "characters"), (["12", "!"], "rouge_score"),
    ])
    def test_the_choice_follows_from_the_letters_of_all_references(self, texts, chosen):
        assert choose_tokenizer("auto", [[text] for text in texts], "dev") == chosen
        assert choose_tokenizer("words", [[text] for text in texts], "dev") == "words"

    def test_what_the_published_tokens_do_not_see_is_said(self, caplog):
        choose_tokenizer("auto", [["A long answer in plain English that says it all"]] * 9 + [["Да"]], "dev")
        assert "1 of 10 examples score 0 whatever the response" in caplog.text
        choose_tokenizer("auto", [["Hà Nội là thủ đô của Việt Nam"]], "dev")
        assert "% of the letters have accents, which rouge_score takes for spaces" in caplog.text
        assert rouge_l(["Hà Nội"], [["Hà Nội"]], "words") == [100]

    def test_exact_match_is_blind_to_case_punctuation_and_spacing(self):
        assert exact_match(["The  answer: 7.", "seven", ""], [["no", "the answer 7"], ["seventh"], ["x"]]) == [
            True, False, False]

    @pytest.mark.parametrize("score", [rouge_l, exact_match])
    def test_refuses_lists_that_do_not_match(self, score):
        with pytest.raises(ValueError, match="1 responses for 2"):
            score(["a"], [["a"], ["b"]])
        with pytest.raises(ValueError, match="response 1 has no reference"):
            score(["a", "b"], [["a"], []])


def test_an_evaluation_names_its_tokens(monkeypatch, checkpoint, data, tmp_path, capsys):
    lines = [{"prompt": f"Number {i}:", "output": f"答案是{i}。"} for i in range(3)]
    (data / "zh").mkdir()
    (data / "zh" / "valid.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def evaluated(name, *words):
        assert run_evaluate(monkeypatch, checkpoint, data, tmp_path / name, "--sets", "dolly", "zh", "--seeds", 1,
                            *words) == 0
        sets = json.loads((tmp_path / name / "eval/results.json").read_text())["sets"]
        made_with = json.loads((tmp_path / name / "eval/zh/made_with.json").read_text())["made_with"]
        return sets["dolly"].get("rouge_tokenizer"), sets["zh"].get("rouge_tokenizer"), made_with.get("rouge_tokenizer")
    assert evaluated("a") == (None, "characters", "characters")
    screen = capsys.readouterr().out
    assert "| dolly   " in screen and "| zh (characters) " in screen
    assert "ROUGE-L of zh: tokens by characters (100 % of the letters of the references are not Latin)" in screen
    assert evaluated("b", "--rouge-tokenizer", "rouge_score") == (None, None, None)
    assert "3 of 3 examples score 0" not in capsys.readouterr().out  # each has a digit

    assert run(monkeypatch, report, tmp_path / "a", tmp_path / "b") == 0
    assert "different tokens of zh (characters, rouge_score)" in capsys.readouterr().out
    assert run(monkeypatch, report, tmp_path / "a", "--baseline", tmp_path / "b") == 2
    assert capsys.readouterr().err == (f"error: zh: {tmp_path}/a has ROUGE-L by characters, the baseline {tmp_path}/b "
                                       "by rouge_score\n")


def test_a_report_on_a_terminal_that_knows_no_more_than_ascii(tmp_path):
    summary = {"rouge_l": 1.0, "rouge_l_std": 0.5, "seeds": {}}
    (tmp_path / "é" / "eval").mkdir(parents=True)
    (tmp_path / "b" / "eval").mkdir(parents=True)
    (tmp_path / "é" / "eval" / "results.json").write_text(json.dumps({"sets": {"x": summary}, "average": summary}))
    (tmp_path / "b" / "eval" / "results.json").write_text(json.dumps({"sets": {"y": summary}, "average": summary}))

    def reported(*folders):
        environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(Path(report.__file__).parents[1])}
        return subprocess.run([sys.executable, "-m", "todi.report", *folders], cwd=tmp_path, env=environment, text=True,
                              capture_output=True)
    done = reported("é", "b", "北")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        2, r"error: no results in \u5317: python -m todi.evaluate would write \u5317/eval/results.json")
    done = reported("é", "b")
    assert done.returncode == 0, done.stderr
    assert [cell.strip() for cell in done.stdout.splitlines()[-4].split("|")[1:-1]] == [
        r"\xe9", "1.00 +/- 0.50", "-", "1.00 +/- 0.50"]


class TestResults:
    def test_means_and_deviations(self):
        def generations(*scores):
            return [Generation("p", "r", ("r",), score, exact_match=score == 100, tokens=10, cut=score == 0)
                    for score in scores]
        first_scores = {1: generations(0, 100), 2: generations(50, 70)}
        first = summarise(first_scores)
        assert first["examples"] == 2
        assert (first["rouge_l"], first["exact_match"], first["response_tokens"], first["cut_share"]) == (
            55, 25, 10, 0.25)
        assert first["rouge_l_std"] == pytest.approx(50 ** 0.5)  # of 50 and 60, with n - 1
        assert first["rouge_l_interval"] == (25, 85)  # the two examples' means over seeds: all that can be drawn
        assert first["seeds"]["2"]["rouge_l"] == 60
        second_scores = {1: generations(20), 2: generations(10)}
        second = summarise(second_scores)
        assert second["rouge_l_interval"] is None
        both = average({"a": first, "b": second}, [*map(example_scores, (first_scores, second_scores))])
        assert (both["rouge_l"], both["rouge_l_std"], both["rouge_l_interval"]) == (35, 0, None)  # both seeds are at 35
        assert summarise({1: generations(3)})["rouge_l_std"] is None

        other = {"a": summarise({1: generations(3)})}
        rows = {"ours": {"sets": {"a": first, "b/11_": second}, "average": both},
                "theirs": {"sets": other, "average": average(other, [np.array([3.0])])}}
        assert markdown_table(rows).splitlines() == [
            "| ROUGE-L | a                           | b/11_        | average      |",
            "| ------- | --------------------------- | ------------ | ------------ |",
            "| ours    | 55.00 ± 7.07 [25.00, 85.00] | 15.00 ± 7.07 | 35.00 ± 0.00 |",
            "| theirs  | 3.00                        | –            | 3.00         |",
        ]
        assert "rouge_tokenizer" not in first
        rows["theirs"]["sets"]["a"] |= summarise({1: generations(3)}, rouge_tokenizer="words")
        assert markdown_table(rows).split("|")[2].strip() == "a (rouge_score, words)"

    def test_a_set_name_cannot_leave_its_folder(self):
        assert all(map(is_set_name, ["dolly", "sinst/11_", "a.b"]))
        assert not any(map(is_set_name, ["", ".", "..", "../dolly", "a/../../b", "/etc", "dolly/", "a//b", "./a"]))


class TestBootstrap:
    """Against the normal distribution, which a mean of 400 scores is close to."""

    @staticmethod
    def scores(seed, mean=30.0, examples=400):
        return np.random.default_rng(seed).normal(mean, 20, examples)

    def test_an_interval_of_one_set(self):
        scores = self.scores(0)
        error = scores.std() / 20
        assert interval([scores]) == pytest.approx((scores.mean() - 1.96 * error, scores.mean() + 1.96 * error),
                                                   abs=0.05 * error)
        assert interval([scores]) == interval([scores])

    def test_an_average_weighs_sets_and_not_examples(self):
        samples = [self.scores(0, 10, 400), self.scores(1, 50, 100)]
        low, high = interval(samples)
        error = np.hypot(samples[0].std() / 20, samples[1].std() / 10) / 2
        assert (low + high) / 2 == pytest.approx(np.mean([sample.mean() for sample in samples]), abs=0.1 * error)
        assert high - low == pytest.approx(2 * 1.96 * error, rel=0.05)

    def test_pairs_see_what_intervals_do_not(self):
        baseline = self.scores(0)
        gain = np.random.default_rng(1).normal(0.5, 2, 400)
        found = paired_difference([baseline + gain], [baseline])
        assert found.mean == pytest.approx(gain.mean())
        error = gain.std() / 20
        assert found.interval == pytest.approx((gain.mean() - 1.96 * error, gain.mean() + 1.96 * error),
                                               abs=0.1 * error)
        assert found.p_value < 0.001
        low, high = interval([baseline])
        assert low < (baseline + gain).mean() < high

    def test_a_p_value_is_that_of_a_z_test(self):
        baseline = self.scores(0)
        noise = np.random.default_rng(2).normal(0, 2, 400)
        gain = noise - noise.mean() + 1.5 * noise.std() / 20  # z = 1.5
        assert paired_difference([baseline + gain], [baseline]).p_value == pytest.approx(0.134, abs=0.015)
        assert paired_difference([baseline], [baseline]).p_value == 1
        assert paired_difference([baseline[:1]], [baseline[1:2]]).p_value is None

    def test_refuses_what_does_not_pair(self):
        with pytest.raises(ValueError):
            paired_difference([self.scores(0)], [self.scores(0, examples=399)])
        with pytest.raises(ValueError):
            paired_difference([self.scores(0)], [self.scores(0)] * 2)
