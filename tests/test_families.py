"""Every model family on a tiny model of its architecture: the loss, and its launchers from SFT to evaluation."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import reference
import torch
from tiny import tiny_model, tiny_multimodal_model
from todi.criterions import DistillationCriterion, build_divergence
from todi.data.batches import Batch, collate
from todi.data.tokenize import Example
from todi.models.adapters import add_lora, merge_adapter
from todi.models.families import FAMILIES
from todi.models.loading import load_model, load_tokenizer
from todi.models.packing import use_packing
from todi.runtime.checksums import file_checksum
from todi.teacher.live import LiveTeacher
from todi.training.student import Student

CPU = torch.device("cpu")
TEMPERATURE, KD_RATE = 2.0, 0.5

# What a family has besides its architecture. Vocabularies are padded, the teacher's further, as in Qwen2.5 (151,936
# and 152,064) and Gemma 3 (262,144 and 262,208).
SPECIAL = {
    "gpt2": {},  # learned positions, tied head
    "tinyllama": {},  # a head of its own
    "smollm2": {"tie_word_embeddings": True},
    "olmo2": {},  # norms behind the layers
    "qwen2.5": {"tie_word_embeddings": True},
    "gemma3": {},  # scaled embeddings, sliding windows, tied head
    "gemma3, capped": {"final_logit_softcapping": 3.0},
}


@dataclass(frozen=True)
class Launchers:
    """The launchers of a family; `lora` says whether its teacher is an adapter."""

    teacher: str
    student: str
    distil: str
    lora: bool = True


LAUNCHERS = {
    "gpt2": Launchers("gpt2/sft_gpt2_xlarge", "gpt2/sft_gpt2_base", "gpt2/vanilla_kd_gpt2_base", lora=False),
    "tinyllama": Launchers("tinyllama/sft_teacher_llama2", "tinyllama/sft_tinyllama", "tinyllama/vanilla_kd_tinyllama"),
    "smollm2": Launchers("smollm2/sft_teacher_smollm2", "smollm2/sft_smollm2", "smollm2/vanilla_kd_smollm2",
                         lora=False),
} | {name: Launchers(*(f"{name}/{task}_{name}" for task in ("sft_teacher", "sft", "vanilla_kd")))
     for name in ("olmo2", "qwen2.5", "gemma3")}


def architecture(case: str) -> str:
    return FAMILIES[case.split(",")[0]].architecture


class TestLoss:
    """The chunked loss beside one from the model's own logits."""

    @pytest.fixture(params=SPECIAL)
    def case(self, request) -> str:
        return request.param

    @pytest.fixture
    def models(self, tmp_path, case):
        shape = {"family": architecture(case), **SPECIAL[case]}
        teacher = tiny_model(tmp_path / "teacher", vocab=320, hidden=48, seed=1, **shape)
        student = tiny_model(tmp_path / "student", vocab=304, layers=3, seed=2, **shape)
        return tuple(load_model(str(path), torch.float32, CPU) for path in (student, teacher))

    @pytest.mark.parametrize(("packed", "checkpointing"), [(False, False), (True, False), (True, True)],
                             ids=["padded", "packed", "packed, checkpointing"])
    @pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
    def test_value_and_gradients(self, models, case, lora, packed, checkpointing):
        student, teacher = models
        if checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})
            student.train()
        if lora:
            torch.manual_seed(0)
            student = add_lora(student, FAMILIES[case.split(",")[0]], rank=4, alpha=8, dropout=0.0)
            for name, parameter in student.named_parameters():
                if "lora_B" in name:  # zero at first, and then A has no gradient
                    torch.nn.init.normal_(parameter, std=0.1)
        if packed:
            assert use_packing(student, "student")
            assert use_packing(teacher, "teacher")
        batch, laid_out = random_batch(), random_batch(packed)
        criterion = DistillationCriterion(build_divergence("ToDi"), TEMPERATURE, KD_RATE, chunk_size=3)
        sums, _ = Student(student)(laid_out, criterion, LiveTeacher(teacher).rows(laid_out))
        expected = loss_from_logits(logits_of(student, batch), logits_of(teacher, batch).detach(), batch.row_labels)
        assert sums["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
        trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        ours = torch.autograd.grad(sums["loss"], trained)
        theirs = torch.autograd.grad(expected, trained)
        assert sum(gradient.abs().sum() > 0 for gradient in theirs) == len(trained)
        for our, their in zip(ours, theirs, strict=True):
            assert (our - their).norm() <= 1e-5 * max(their.norm().item(), 1.0)

    def test_a_teacher_of_another_precision(self, models):
        student, teacher = models
        batch = random_batch()
        criterion = DistillationCriterion(build_divergence("ToDi"), TEMPERATURE, KD_RATE)
        expected, _ = Student(student)(batch, criterion, LiveTeacher(teacher).rows(batch))
        rows = LiveTeacher(teacher.to(torch.bfloat16)).rows(batch)
        assert rows.hidden.dtype == torch.bfloat16
        sums, _ = Student(student)(batch, criterion, rows)
        assert sums["loss"].item() == pytest.approx(expected["loss"].item(), rel=0.1)


def random_batch(packed: bool = False) -> Batch:
    """Two texts of different lengths, longer than Gemma's window in the tests."""
    generator = torch.Generator().manual_seed(3)
    examples = [Example(tuple(torch.randint(3, 300, (length,), generator=generator).tolist()), prompt_length=9)
                for length in (37, 24)]
    return collate(examples, 0, packed)


def logits_of(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """(N, V) the model's own logits where there is a label."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return logits.flatten(0, 1)[batch.rows]


def loss_from_logits(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum over rows in float64, cropped to the smaller vocabulary."""
    vocabulary = min(student.shape[1], teacher.shape[1])
    student, teacher = student[:, :vocabulary].double(), teacher[:, :vocabulary].double()
    total = student.new_zeros(())
    for z, t, label in zip(student, teacher, labels, strict=True):
        p, q = (t / TEMPERATURE).softmax(0), (z / TEMPERATURE).softmax(0)
        kd = reference.todi(p, q, weight=reference.todi_weight(p, q).detach())
        total = total - (1 - KD_RATE) * z.log_softmax(0)[label] + KD_RATE * kd
    return total


class TestLaunchers:
    """SFT of the teacher, KD in full and by LoRA, reloading, evaluation: all by the family's own launchers."""

    @pytest.fixture(scope="class")
    def runs(self, workshop):
        """The runs of a family, started once, by name."""
        return cache(lambda family: start_runs(workshop, family))

    @pytest.mark.slow
    @pytest.mark.parametrize("family", LAUNCHERS)
    def test_full(self, workshop, runs, family):
        done = runs(family)["full"].result()
        model = load_model(str(done.checkpoint), torch.float32, CPU)
        assert all(torch.isfinite(weight).all() for weight in model.state_dict().values())
        assert done.metrics("train")[-1]["kd"] > 0
        scored = workshop.evaluate("eval/run_eval", done.checkpoint).result()
        assert scored.returncode == 0, scored.stdout
        assert (done.checkpoint / "eval" / "results.json").is_file()
        assert runs(family)["sft"].result().checkpoint

    @pytest.mark.slow
    @pytest.mark.parametrize("family", LAUNCHERS)
    def test_an_adapter_scores_as_the_merged_model_does(self, workshop, runs, family):
        adapter = runs(family)["lora"].result().checkpoint
        merged = merge(student_of(workshop, family), adapter, workshop.folder / "merged" / family)
        started = {adapter: workshop.evaluate("eval/run_eval_lora", adapter),
                   merged: workshop.evaluate("eval/run_eval", merged)}
        for scored in started.values():
            assert scored.result().returncode == 0, scored.result().stdout
        ours, theirs = ((path / "eval" / "tiny" / "seed1.jsonl").read_text() for path in started)
        assert ours == theirs
        assert ours.count("\n") == 6
        card = (adapter / "README.md").read_text()
        assert card.startswith(f"---\nlicense: {FAMILIES[family].licence_id}\nlibrary_name: peft\n")
        assert f"| `{workshop.data / 'train.jsonl'}` | `{file_checksum(workshop.data / 'train.jsonl')}` |" in card


def student_of(workshop, family: str) -> Path:
    return workshop.model(f"{family} student", vocab=304, seed=2, family=architecture(family), **SPECIAL[family])


def start_runs(workshop, family: str) -> dict:
    """The teacher's SFT, and once it is done, SFT and ToDi of the student in full and as an adapter."""
    launchers, student = LAUNCHERS[family], student_of(workshop, family)
    if family == "gemma3":
        teacher = workshop.model("gemma3 teacher", make=tiny_multimodal_model, vocab=320)
    else:
        teacher = workshop.model(f"{family} teacher", vocab=320, hidden=48, seed=1, family=architecture(family),
                                 **SPECIAL[family])
    tuned = workshop.train(launchers.teacher, f"{family} teacher", MODEL_PATH=teacher, EVAL_GEN=0).result().checkpoint
    taught_by = ({"TEACHER_MODEL_PATH": teacher, "TEACHER_PEFT_PATH": tuned} if launchers.lora
                 else {"TEACHER_MODEL_PATH": tuned})
    settings = {"MODEL_PATH": student, "EVAL_GEN": 0}
    return {"lora": workshop.train(launchers.distil, f"{family} lora", PEFT="lora", **settings, **taught_by),
            "full": workshop.train(launchers.distil, f"{family} full", PEFT="full", **settings, **taught_by),
            "sft": workshop.train(launchers.student, f"{family} sft", **settings)}


def merge(base: Path, adapter: Path, folder: Path) -> Path:
    """A plain model folder of a base with its adapter merged; an evaluation does that when it loads them."""
    merge_adapter(load_model(str(base), torch.float32, CPU), str(adapter)).save_pretrained(folder)
    load_tokenizer(str(base)).save_pretrained(folder)
    return folder

