"""The launchers, run for real on tiny models: SFT, every objective, LoRA, evaluation, several ranks, bad input."""

import json
import shlex
from functools import cache
from pathlib import Path

import pytest
import torch
from launching import ROOT, Run, exhaustive, in_tiers, run, slow, write_data
from peft import PeftModel
from stopping import TIMINGS
from tiny import tiny_tokenizer
from todi.criterions import DIVERGENCES
from todi.options import parse
from todi.runtime.checksums import file_checksum
from todi.settings import TrainConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

SFT = {"gpt2/sft_gpt2_base": "gpt2", "gpt2/sft_gpt2_xlarge": "gpt2", "smollm2/sft_teacher_smollm2": "llama",
       "smollm2/sft_smollm2": "llama"}
LORA_SFT = {"tinyllama/sft_teacher_llama2": "llama", "tinyllama/sft_tinyllama": "llama"}
KD = ("gpt2/vanilla_kd_gpt2_base", "smollm2/vanilla_kd_smollm2", "tinyllama/vanilla_kd_tinyllama")
# Run in test_families.py, each on its own architecture.
OTHERS = tuple(f"{family}/{task}_{family}" for family in ("olmo2", "qwen2.5", "gemma3")
               for task in ("sft_teacher", "sft", "vanilla_kd"))
LORA = {*LORA_SFT, KD[2], *OTHERS} - {"qwen2.5/sft_qwen2.5", "qwen2.5/vanilla_kd_qwen2.5"}


# Cuts of a step of eight samples, but for the plain one.
SHAPES = ("1x8", "8 by 3", exhaustive("4x1x2, ZeRO-0"), exhaustive("4x1x2, ZeRO-1"), slow("4x1x2, ZeRO-2"),
          "4x1x2, ZeRO-3", exhaustive("4x1x2, ZeRO-2, offload"), slow("4x1x2, ZeRO-3, offload"))


@pytest.fixture(scope="session")
def models(workshop) -> dict[str, Path]:
    """A teacher and a student of each architecture; the students' embedding matrices are padded."""
    return {f"{family}-{role}": workshop.model(f"{family}-{role}", family=family, hidden=hidden, vocab=vocab, seed=seed)
            for family in ("gpt2", "llama")
            for role, hidden, vocab, seed in (("teacher", 48, 320, 1), ("student", 32, 352, 2))}


@pytest.fixture(scope="session")
def runs(workshop, models):
    """The run of a name, made when it is first asked for."""
    gpt2 = {"MODEL_PATH": models["gpt2-student"], "TEACHER_MODEL_PATH": models["gpt2-teacher"]}
    llama = {"MODEL_PATH": models["llama-student"], "TEACHER_MODEL_PATH": models["llama-teacher"]}

    @cache
    def run(name: str) -> Run:
        if name in DIVERGENCES:  # alone: beside a random teacher the labels pull the other way
            return workshop.train(KD[0], name, KD_OBJ=name, KD_RATE=1, EPOCH=4, EVAL_GEN=0, **gpt2).result()
        if name == KD[2]:
            adapter = run("tinyllama/sft_teacher_llama2").checkpoint
            return workshop.train(name, name, TEACHER_PEFT_PATH=adapter, **llama).result()
        if name == KD[1]:
            return workshop.train(name, name, **llama).result()
        return workshop.train(name, name, MODEL_PATH=models[f"{(SFT | LORA_SFT)[name]}-teacher"]).result()

    return run


@pytest.mark.parametrize("name", in_tiers(SFT, always={"gpt2/sft_gpt2_base"}, slowly=SFT))
def test_sft(runs, name):
    done = runs(name)
    assert_checkpoint_loads(done.checkpoint)
    losses = [line["loss"] for line in done.metrics("train")]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", in_tiers(LORA_SFT, always={"tinyllama/sft_tinyllama"}, slowly=LORA_SFT))
def test_lora_sft(runs, name, models):
    done = runs(name)
    base = AutoModelForCausalLM.from_pretrained(models["llama-teacher"])
    adapted = PeftModel.from_pretrained(base, done.checkpoint)
    assert any(weight.abs().sum() > 0 for key, weight in adapted.state_dict().items() if "lora_B" in key)


@pytest.mark.parametrize("name", [name if name == "ToDi" else slow(name) for name in DIVERGENCES])
def test_every_objective(runs, name):
    done = runs(name)
    assert_checkpoint_loads(done.checkpoint)
    kd = [line["kd"] for line in done.metrics("train")]
    kind = DIVERGENCES[name]  # what is moved may rise; an estimate by text of others may go anywhere
    assert kind.sampled or kd[-1] > 0 and (kd[-1] < kd[0] or kind.schedule)
    assert ("weight_under_p" in done.metrics("train")[-1]) == (kind.entry_weight is not None)


@pytest.mark.slow
def test_distilling_llama_in_full(runs):
    assert_checkpoint_loads(runs(KD[1]).checkpoint)


def test_distilling_with_an_adapter_on_both_sides(runs, models):
    done = runs(KD[2])
    base = AutoModelForCausalLM.from_pretrained(models["llama-student"])
    PeftModel.from_pretrained(base, done.checkpoint)
    assert "with adapter" in done.output


def test_what_a_run_leaves_behind(runs, workshop):
    done = runs(KD[1])
    assert {path.name for path in done.folder.iterdir()} == {
        "args.json", "metrics.jsonl", "state", "train.log", done.checkpoint.name}
    args = json.loads((done.folder / "args.json").read_text())
    assert args["settings"]["objective"]["kd_objective"] == "ToDi"
    assert args["versions"]["deepspeed"]
    assert args["files"][str(workshop.data / "train.jsonl")] == file_checksum(workshop.data / "train.jsonl")
    log = (done.folder / "train.log").read_text()
    assert log == done.output
    assert "attention: sdpa" in log and "saved checkpoint" in log
    dev, = done.metrics("dev")
    assert done.checkpoint.name == f"epoch1_step3_loss{dev['loss']:.4f}_rougel{dev['rouge_l']:.4f}"


def test_only_the_best_checkpoints_stay(workshop, models):
    done = workshop.train("gpt2/sft_gpt2_base", "best", MODEL_PATH=models["gpt2-student"], EPOCH=4,
                          SAVE_BEST_N_CKPTS=2, EVAL_GEN=0).result()
    losses = sorted(line["loss"] for line in done.metrics("dev"))
    kept = sorted(float(path.name.split("_loss")[1]) for path in done.checkpoints)
    assert kept == pytest.approx(losses[:2], abs=1e-4)


class TestSeveralRanks:
    """One optimizer step is the same however it is cut: by accumulation, by ranks, by ZeRO stage."""

    @pytest.fixture(scope="class")
    def shapes(self, workshop, models):
        common = {"MODEL_PATH": models["gpt2-student"], "TEACHER_MODEL_PATH": models["gpt2-teacher"], "EVAL_GEN": 0,
                  "LR": 1e-3}
        shapes = {"8x1": {"BATCH_SIZE": 8, "GRAD_ACC": 1}, "1x8": {"BATCH_SIZE": 1, "GRAD_ACC": 8},
                  "8 by 3": {"BATCH_SIZE": 3, "GLOBAL_BATCH_SIZE": 8}}
        shapes |= {f"4x1x2, ZeRO-{stage}": {"BATCH_SIZE": 4, "GRAD_ACC": 1, "NPROC": 2, "ZERO_STAGE": stage}
                   for stage in range(4)}
        shapes |= {f"{name}, offload": shapes[name] | {"OFFLOAD": offload} for name, offload in (
            ("4x1x2, ZeRO-2", "optimizer"), ("4x1x2, ZeRO-3", "optimizer param"))}
        # Adam divides a gradient by its own size; without a large epsilon it would blow up the rounding errors of
        # gradients that are zero in truth, such as those of the key biases.
        return cache(lambda name: workshop.train(KD[0], f"shape {name}", "--adam-eps", "1e-2", **common | shapes[name]
                                                 ).result())

    @pytest.mark.parametrize("name", SHAPES)
    def test_same_weights(self, shapes, models, name):
        expected, actual = (load(shapes(shape).checkpoint) for shape in ("8x1", name))
        start = load(models["gpt2-student"])
        for key, weight in expected.items():
            moved = (weight - start[key]).norm()
            assert (actual[key] - weight).norm() <= 2e-3 * moved + 1e-6, key

    @pytest.mark.parametrize("name", SHAPES)
    def test_same_metrics(self, shapes, name):
        expected, actual = (shapes(shape).metrics("train") for shape in ("8x1", name))
        assert {"gradient_norm", "teacher_entropy", "forward_share", "top1_agreement"} <= expected[0].keys()
        for line, same in zip(expected, actual, strict=True):
            numbers = {key: value for key, value in line.items() if key not in TIMINGS | {"kind"}}
            assert {key: same[key] for key in numbers} == pytest.approx(numbers, rel=1e-3, abs=1e-6)

    @pytest.mark.parametrize("stage", [*map(exhaustive, range(3)), slow(3)])
    def test_bf16_with_generation(self, workshop, models, stage):
        done = workshop.train(KD[0], f"bf16 ZeRO-{stage}", MODEL_PATH=models["gpt2-student"], NPROC=2,
                              TEACHER_MODEL_PATH=models["gpt2-teacher"], PRECISION="bf16", ZERO_STAGE=stage).result()
        assert_checkpoint_loads(done.checkpoint)
        assert done.metrics("dev")[0]["rouge_l"] is not None


class TestEvaluation:
    def test_a_model(self, runs, workshop):
        checkpoint = runs("ToDi").checkpoint
        done = run("eval/run_eval", str(checkpoint), "3", DATA_DIR=workshop.data.parent, SETS="tiny absent",
                   SEEDS="1 2", MAX_LENGTH=64, MAX_PROMPT_LENGTH=48, PRECISION="fp32")
        assert done.returncode == 0, done.stdout
        results = json.loads((checkpoint / "eval" / "results.json").read_text())
        assert list(results["sets"]) == ["tiny"]
        assert len((checkpoint / "eval" / "tiny" / "seed2.jsonl").read_text().splitlines()) == 6
        assert "absent" in done.stdout

    def test_an_adapter_on_the_base_that_it_names(self, runs, workshop):
        adapter = runs("tinyllama/sft_tinyllama").checkpoint
        done = run("eval/run_eval_lora", str(adapter), DATA_DIR=workshop.data.parent, SETS="tiny", SEEDS="1",
                   MAX_LENGTH=64, MAX_PROMPT_LENGTH=48, PRECISION="fp32")
        assert done.returncode == 0, done.stdout
        assert (adapter / "eval" / "results.json").is_file()


    @pytest.mark.parametrize(("words", "options"), [
        ((), ""), (("40",), " --batch-size 40"), (("--limit", "3"), " --limit 3"),
        (("40", "--limit", "3"), " --batch-size 40 --limit 3")])
    def test_the_batch_size_may_be_left_out(self, words, options):
        done = run("eval/run_eval", "a model", *words, DRY_RUN=1)
        assert done.stdout.rstrip().endswith(f" --model-path a\\ model{options}"), done.stdout


class TestBadInput:
    def test_everything_wrong_is_said_at_once_before_weights_are_loaded(self, tmp_path, workshop, models):
        write_data(tmp_path, train=3)
        (tmp_path / "train.jsonl").open("a").write('\n{"prompt": "p"}\n[]\n')
        done = run(KD[0], "--lerning-rate", **{**workshop.settings, "DATA_DIR": tmp_path})
        assert (done.returncode, done.stdout.count("error: ")) == (2, 1)  # an unknown option hides the rest
        assert "unknown option --lerning-rate; did you mean" in done.stdout
        done = run(KD[0], **workshop.settings | {
            "KD_OBJ": "tody", "KD_RATE": 2, "DATA_DIR": tmp_path, "MODEL_PATH": models["gpt2-student"],
            "TEACHER_MODEL_PATH": tmp_path / "nowhere", "SAVE_DIR": tmp_path / "run"})
        assert done.returncode == 2
        for said in ("unknown kd objective 'tody'", "--kd-rate must be in [0, 1]", "train.jsonl:4: lacks output",
                     "train.jsonl:5: expected an object", "no such data file", f"no model at {tmp_path}/nowhere"):
            assert said in done.stdout
        assert all(line.startswith("error: ") for line in done.stdout.splitlines())
        assert not (tmp_path / "run").exists()

    def test_different_tokenizers(self, tmp_path, workshop, models):
        other = workshop.model("other", family="gpt2", vocab=320)
        tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
        tokenizer.add_tokens(["a new one"])
        tokenizer.save_pretrained(other)
        done = run(KD[0], **workshop.settings | {"MODEL_PATH": models["gpt2-student"], "TEACHER_MODEL_PATH": other,
                                                 "SAVE_DIR": tmp_path / "run", "NPROC": 2})
        assert done.returncode == 2
        assert "different tokenizers: vocabulary (1 entries, the first: 'a new one' is absent in the " in done.stdout

    @pytest.mark.parametrize(("variables", "said"), [
        ({"PRECISION": "fp16"}, "fp16 does not train on a CPU"),
        ({"KERNELS": "triton"}, "KERNELS=triton: the device is no GPU but cpu"),
    ])
    def test_what_no_cpu_can(self, workshop, models, variables, said):
        done = run(KD[0], **workshop.settings | {"MODEL_PATH": models["gpt2-student"], "CHECK_ONLY": 1,
                                                 "TEACHER_MODEL_PATH": models["gpt2-teacher"]} | variables)
        assert done.returncode == 2
        assert said in done.stdout


@pytest.mark.parametrize("launcher", [*SFT, *LORA_SFT, *KD, *OTHERS])
def test_a_dry_run_prints_a_command_that_parses(launcher):
    done = run(launcher, "--dev-num", "3", DRY_RUN=1, SEED=7)
    config = parse(TrainConfig, shlex.split(done.stdout.split("-m todi.train ")[1]))
    assert config.problems() == []
    assert (config.run.seed, config.data.dev_num) == (7, 3)
    assert config.objective.kd_objective == "ToDi"
    assert (config.student.peft == "lora") == (launcher in LORA)


def test_every_training_launcher_is_tested():
    found = {str(path.relative_to(ROOT / "scripts").with_suffix(""))
             for pattern in ("*/sft_*.sh", "*/vanilla_kd_*.sh") for path in (ROOT / "scripts").glob(pattern)}
    assert found == {*SFT, *LORA_SFT, *KD, *OTHERS}


def assert_checkpoint_loads(checkpoint: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert AutoTokenizer.from_pretrained(checkpoint).eos_token
    assert all(torch.isfinite(weight).all() for weight in model.state_dict().values())


def load(checkpoint: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
