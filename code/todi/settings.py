"""The settings of a training run. Nothing below the entry point and the builders ever sees these classes."""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from todi.options import option

CROSS_ENTROPY = "cross_entropy"
CRITERIA = (CROSS_ENTROPY, "vanilla_kd")
SCHEDULES = ("constant", "linear", "cosine", "noam")
PRECISIONS = ("auto", "bf16", "fp16", "fp32")
RESUME = ("auto", "force", "never")
OWN_DTYPE = "own"
CACHE_DTYPES = (OWN_DTYPE, "bf16", "fp16", "fp32")
CACHE_MODES = ("auto", "on", "off")
NO_ADAPTER = "none"


@dataclass(frozen=True)
class StudentConfig:
    """The model that is trained, and how much of it."""

    model_path: str = option("", "the student: a model folder, a GGUF file, or a Hugging Face Hub name")
    model_type: str = option("auto", "model family (todi/models/families.py); auto reads it from the config")
    peft: str | None = option(None, "how to fine-tune: lora, or every weight when not given", choices=("lora",))
    peft_lora_r: int = option(256, "LoRA rank")
    peft_lora_alpha: float = option(8, "LoRA alpha")
    peft_lora_dropout: float = option(0.1, "LoRA dropout")
    peft_path: str | None = option(None, "go on from this LoRA adapter")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass", may_change=True)
    trust_remote_code: bool = option(False, "run Python code that comes with a model; only for models you trust")

    def problems(self) -> Iterator[str]:
        """What is wrong with these settings, a sentence each."""
        if not self.model_path:
            yield "--model-path is required"
        if self.peft_path and not self.peft:
            yield "--peft-path needs --peft lora"
        if self.peft_lora_r < 1:
            yield f"--peft-lora-r must be at least 1, got {self.peft_lora_r}"
        if not 0 <= self.peft_lora_dropout < 1:
            yield f"--peft-lora-dropout must be in [0, 1), got {self.peft_lora_dropout}"


@dataclass(frozen=True)
class TeacherConfig:
    """What is imitated: a model, the mean of several, or a function."""

    teacher_model_path: tuple[str, ...] = option((), "the teacher: a model folder, a GGUF file, or a Hub name; of "
                                                     "several the mean of their probabilities is imitated")
    teacher_model_type: str = option("auto", "model family of the teacher")
    teacher_weights: tuple[float, ...] = option((), "share of each of several teachers in their mean; even when not "
                                                    "given")
    teacher_callable: str | None = option(None, "instead of a model: file.py:function, which gives logits for a batch")
    teacher_peft_path: tuple[str, ...] = option((), "a LoRA adapter that is merged into the teacher; one for each of "
                                                    f"several, {NO_ADAPTER} for one without")
    teacher_dtype: str | None = option(None, "precision of the teacher; the run's when not given",
                                       choices=PRECISIONS[1:])

    @property
    def adapters(self) -> tuple[str | None, ...]:
        """Of each teacher the path of its LoRA adapter, or None."""
        if not self.teacher_peft_path:
            return (None,) * len(self.teacher_model_path)
        return tuple(None if path == NO_ADAPTER else path for path in self.teacher_peft_path)

    def problems(self) -> Iterator[str]:
        """What is wrong with these settings, a sentence each."""
        teachers = len(self.teacher_model_path)
        for name in ("teacher_peft_path", "teacher_weights"):
            given = getattr(self, name)
            if given and len(given) != teachers:
                yield (f"--{name.replace('_', '-')} needs one for each of --teacher-model-path, which has {teachers}; "
                       f"got {' '.join(map(str, given))}")
        if self.teacher_callable and self.teacher_model_path:
            yield "--teacher-callable and --teacher-model-path: give one of them"
        if any(not (weight > 0 and math.isfinite(weight)) for weight in self.teacher_weights):
            yield f"--teacher-weights must be above 0, got {' '.join(map(str, self.teacher_weights))}"


@dataclass(frozen=True)
class TeacherCacheConfig:
    """Whether the teacher runs once. Free options: what a run made of them stays with it (todi/teachers.py)."""

    teacher_cache: str = option("auto", "keep the teacher's hidden states: on, off, auto (where it pays), or the "
                                        "folder to keep them in", may_change=True)
    teacher_cache_dtype: str = option(OWN_DTYPE, "numbers of the teacher cache; own, the teacher's, is exact",
                                      choices=CACHE_DTYPES, may_change=True)

    def problems(self) -> Iterator[str]:
        """What is wrong with these settings, a sentence each."""
        cache = self.teacher_cache
        if cache not in CACHE_MODES and "/" not in cache and not Path(cache).is_dir():
            yield f"--teacher-cache must be {', '.join(CACHE_MODES)} or a folder (as ./{cache}), got {cache!r}"


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how much of it."""

    data_dir: str = option("data/demo", "folder with train.jsonl and dev.jsonl")
    data_shares: tuple[float, ...] = option((), "share of each of several data folders in an epoch; by their sizes "
                                                "when not given")
    train_num: int | None = option(None, "use only the first so many training records")
    dev_num: int | None = option(None, "use only the first so many dev records")
    max_length: int = option(512, "longest prompt + response, in tokens")
    max_prompt_length: int = option(256, "longest prompt, in tokens")

    def problems(self) -> Iterator[str]:
        """What is wrong with these settings, a sentence each."""
        if any(not share > 0 for share in self.data_shares):
            yield f"--data-shares must be above 0, got {' '.join(map(str, self.data_shares))}"
        for name in ("train_num", "dev_num"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                yield f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}"
        if self.max_prompt_length < 1:
            yield f"--max-prompt-length must be at least 1, got {self.max_prompt_length}"
        if self.max_prompt_length >= self.max_length:
            yield (f"--max-prompt-length ({self.max_prompt_length}) must be below --max-length "
                   f"({self.max_length}), or no room is left for a response")


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the student is trained on."""

    criterion: str = option("vanilla_kd", "cross_entropy (SFT) or vanilla_kd (distillation)", choices=CRITERIA)
    kd_objective: str = option("ToDi", "the divergence (todi/criterions/divergences.py)")
    kd_params: tuple[str, ...] = option((), "parameters of the divergence as name=value, e.g. beta=0.5")
    kd_rate: float = option(0.5, "share of the divergence in the loss; the rest is cross-entropy")
    kd_temperature: float = option(2.0, "temperature of both softmaxes in the divergence")
    label_smoothing: float = option(0.0, "label smoothing of the cross-entropy")
    loss_terms: tuple[str, ...] = option((), "further terms of the loss as name=weight, e.g. hidden_states=0.1")
    hidden_layers: tuple[str, ...] = option((), "for the term hidden_states: pairs student:teacher of layers, e.g. "
                                                "3:6; spread evenly when not given")
    loss_chunk_size: int | None = option(None, "rows of the vocabulary projection at a time; chosen when not given",
                                         may_change=True)

    @property
    def distils(self) -> bool:
        """Whether there is a teacher."""
        return self.criterion != CROSS_ENTROPY

    def problems(self) -> Iterator[str]:
        """What is wrong with these settings, a sentence each."""
        if not 0 <= self.kd_rate <= 1:
            yield f"--kd-rate must be in [0, 1], got {self.kd_rate}"
        if not (self.kd_temperature > 0 and math.isfinite(self.kd_temperature)):
            yield f"--kd-temperature must be above 0, got {self.kd_temperature}"
        for words, form in ((self.loss_terms, r"\w+=[\d.e+-]+"), (self.hidden_layers, r"\d+:\d+")):
            yield from (f"{word!r} is neither name=weight nor student:teacher" for word in words
                        if not re.fullmatch(form, word))
        if not 0 <= self.label_smoothing < 1:
            yield f"--label-smoothing must be in [0, 1), got {self.label_smoothing}"
        if self.loss_chunk_size is not None and self.loss_chunk_size < 1:
            yield f"--loss-chunk-size must be at least 1, got {self.loss_chunk_size}"


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer, schedule, and the shape of a step."""

    lr: float = option(5e-4, "peak learning rate")
    lr_min: float = option(1e-7, "learning rate at the end of the cosine schedule")
    lr_scheduler: str = option("cosine", "schedule after the warm-up", choices=SCHEDULES)
    warmup_iters: int = option(0, "optimizer steps of linear warm-up")
    weight_decay: float = option(0.01, "AdamW weight decay, on matrices only")
    adam_beta1: float = option(0.9, "AdamW beta 1")
    adam_beta2: float = option(0.999, "AdamW beta 2")
    adam_eps: float = option(1e-8, "AdamW epsilon")
    clip_grad: float = option(1.0, "largest gradient norm; 0 turns clipping off")
    batch_size: int = option(4, "samples of a micro-batch, per device", may_change=True)
    gradient_accumulation_steps: int = option(2, "micro-batches of an optimizer step, per device", may_change=True)
    num_epochs: int = option(20, "passes over the training data")
    max_steps: int | None = option(None, "stop after so many optimizer steps")

    def problems(self) -> Iterator[str]:
        """What is wrong with these settings, a sentence each."""
        for name in ("batch_size", "gradient_accumulation_steps", "num_epochs"):
            if getattr(self, name) < 1:
                yield f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}"
        if self.max_steps is not None and self.max_steps < 1:
            yield f"--max-steps must be at least 1, got {self.max_steps}"
        for name in ("lr", "adam_eps"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                yield f"--{name.replace('_', '-')} must be above 0, got {getattr(self, name)}"
        for name in ("lr_min", "warmup_iters", "weight_decay", "clip_grad"):
            if not getattr(self, name) >= 0:
                yield f"--{name.replace('_', '-')} must not be negative, got {getattr(self, name)}"
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                yield f"--{name.replace('_', '-')} must be in [0, 1), got {getattr(self, name)}"


@dataclass(frozen=True)
class RunConfig:
    """Where a run goes, in what precision, and how it is judged."""

    save_dir: str = option("outputs/run", "folder for checkpoints, args.json, train.log, metrics.jsonl",
                           may_change=True)
    keep_best_n_checkpoints: int = option(1, "checkpoints kept, the best by dev ROUGE-L (or dev loss)", may_change=True)
    precision: str = option("auto", "compute precision; auto asks the device", choices=PRECISIONS)
    zero_stage: int = option(1, "DeepSpeed ZeRO stage, 0 to 3")
    deepspeed_config: str | None = option(None, "a DeepSpeed JSON file that overrides the built configuration",
                                          flag="--deepspeed_config", may_change=True)
    seed: int = option(10, "seed of the data order, the dropout and the dev sampling")
    log_interval: int = option(10, "optimizer steps between lines of the log", may_change=True)
    eval_interval: int = option(1, "epochs between evaluations on dev")
    eval_gen: bool = option(True, "generate on dev and rank checkpoints by ROUGE-L; else by dev loss")
    eval_batch_size: int = option(16, "prompts decoded together in an evaluation, per device", may_change=True)
    resume: str = option("auto", "auto goes on with the run in --save-dir, if it is the same one; force does so though "
                                 "settings differ; never starts anew and removes it", choices=RESUME, may_change=True)
    save_state_every: str = option("30m", "a resume state after so many minutes (30m) or steps (500) besides the one "
                                          "at each epoch's end; 0 for no others", may_change=True)
    max_bad_steps: int = option(10, "stop after so many steps in a row whose loss or gradients are not finite",
                                may_change=True)
    report_to: tuple[str, ...] = option((), "also log to these: tensorboard, wandb, trackio", may_change=True)
    plugins: tuple[str, ...] = option((), "Python files that are run first, to register what is one's own")
    check_only: bool = option(False, "check all input, then stop before any weights are loaded", may_change=True)

    def problems(self) -> Iterator[str]:
        """What is wrong with these settings, a sentence each."""
        for name in ("keep_best_n_checkpoints", "log_interval", "eval_interval", "eval_batch_size", "max_bad_steps"):
            if getattr(self, name) < 1:
                yield f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}"
        if self.zero_stage not in range(4):
            yield f"--zero-stage must be 0, 1, 2 or 3, got {self.zero_stage}"
        if self.deepspeed_config and not Path(self.deepspeed_config).is_file():
            yield f"--deepspeed_config: no such file: {self.deepspeed_config}"
        if not re.fullmatch(r"\d+m?", self.save_state_every):
            yield (f"--save-state-every must be a number of steps (500) or of minutes (30m), got "
                   f"{self.save_state_every!r}")


@dataclass(frozen=True)
class TrainConfig:
    """Trains a student: SFT (--criterion cross_entropy) or distillation from a teacher (--kd-objective)."""

    student: StudentConfig
    teacher: TeacherConfig
    cache: TeacherCacheConfig
    data: DataConfig
    objective: ObjectiveConfig
    optim: OptimConfig
    run: RunConfig

    @property
    def deciding(self) -> dict[str, Any]:
        """The settings that decide what a run computes, by name."""
        parts = [getattr(self, field.name) for field in dataclasses.fields(self)]
        deciding = {field.name: getattr(part, field.name) for part in parts for field in dataclasses.fields(part)
                    if not field.metadata["may_change"]}
        return deciding | {name: recorded(deciding[name]) for name in ("teacher_model_path", "teacher_peft_path")}

    def problems(self) -> list[str]:
        """Everything that is wrong with the settings themselves, in the order of the options."""
        parts = [getattr(self, field.name) for field in dataclasses.fields(self)]
        found = [problem for part in parts for problem in part.problems()]
        if self.objective.distils and not (self.teacher.teacher_model_path or self.teacher.teacher_callable):
            found.append(f"--criterion {self.objective.criterion} needs --teacher-model-path or --teacher-callable")
        return found


def recorded(values: Sequence[Any]) -> Any:
    """Values as args.json and caches hold them where there used to be one at most: a single one by itself."""
    return list(values) if len(values) > 1 else values[0] if values else None


def parse_kd_params(words: tuple[str, ...]) -> dict[str, float]:
    """('beta=0.5',) -> {'beta': 0.5}. Raises ValueError for a word that is not name=number."""
    params = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            params[name] = float(value)
        except ValueError:
            raise ValueError(f"expected name=number, got {word!r}") from None
    return params

