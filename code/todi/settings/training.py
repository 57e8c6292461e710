"""The settings of a training run."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from todi.options import declared, option, parse, problems
from todi.schedules import SCHEDULES
from todi.settings.published import TRAINING_OPTIONS
from todi.settings.samples import SamplesConfig
from todi.settings.shared import (
    CACHE_MODES,
    CRITERIA,
    CROSS_ENTROPY,
    KERNELS,
    NO_ADAPTER,
    PACKING,
    PRECISIONS,
    RESUME,
    allocator_option,
    check_only_option,
    date_problems,
    eval_batch_size_option,
    folder_problems,
    max_length_option,
    max_prompt_length_option,
    plugins_option,
    precision_option,
    process_group_timeout_option,
    response_problems,
    rouge_tokenizer_option,
    teacher_cache_dtype_option,
    template_date_option,
    trust_remote_code_option,
    utf8_problems,
)

_MOST_MICRO_BATCHES = 1_000_000  # of a step, each of which is planned before it begins


@dataclass(frozen=True)
class StudentConfig:
    """The model that is trained, and how much of it."""

    model_path: str = option("", "the student: a model folder, a GGUF file, or a Hugging Face Hub name")
    model_type: str = option("auto", "model family (todi/models/families.py); auto reads it from the config")
    peft: str | None = option(None, "how to fine-tune: lora, or every weight when not given", choices=("lora",),
                              fixed=True)
    peft_lora_r: int = option(256, "LoRA rank", least=1, env="LORA_RANK", fixed=True)
    peft_lora_alpha: float = option(8, "LoRA alpha", above=0, at_most=10_000, env="LORA_ALPHA")
    peft_lora_dropout: float = option(0.1, "LoRA dropout", least=0, below=1, env="LORA_DROPOUT")
    peft_lora_targets: tuple[str, ...] = option((), "names of the layers that LoRA is put on, e.g. q_proj v_proj, or "
                                                    "all-linear; chosen by the family when not given",
                                                env="LORA_TARGETS", fixed=True)
    peft_path: str | None = option(None, "go on from this LoRA adapter", fixed=True)
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass", may_change=True)
    compile: bool = option(False, "train through torch.compile (docs/performance.md); not under ZeRO stage 3")
    trust_remote_code: bool = trust_remote_code_option()

    def rules(self) -> Iterator[str]:
        """What is wrong between these settings, a sentence each."""
        if not self.model_path:
            yield "--model-path is required"
        if self.compile and self.gradient_checkpointing:
            yield "--compile and --gradient-checkpointing: give one of them; PyTorch compiles nothing in a checkpoint"
        if self.peft_path and not self.peft:
            yield "--peft-path needs --peft lora"
        if self.peft_lora_targets and (not self.peft or self.peft_path):
            yield "--peft-lora-targets needs --peft lora without --peft-path, which has layers of its own"


@dataclass(frozen=True)
class TeacherConfig:
    """What is imitated: a model, the mean of several, or a function."""

    teacher_model_path: tuple[str, ...] = option((), "the teacher: a model folder, a GGUF file, or a Hub name; of "
                                                     "several the mean of their probabilities is imitated")
    teacher_model_type: str = option("auto", "model family of the teacher")
    teacher_weights: tuple[float, ...] = option((), "share of each of several teachers in their mean; even when not "
                                                    "given", above=0)
    teacher_callable: str | None = option(None, "instead of a model: file.py:function, which gives logits for a batch")
    teacher_peft_path: tuple[str, ...] = option((), "a LoRA adapter that is merged into the teacher; one for each of "
                                                    f"several, {NO_ADAPTER} for one without")
    teacher_dtype: str | None = option(None, "precision of the teacher; the run's when not given",
                                       choices=PRECISIONS[1:])
    teacher_zero: str = option("auto", "spread the weights of the teachers over the devices by ZeRO-3: on, off, auto "
                                       "(where a device has no room for them)", choices=("auto", "on", "off"),
                               may_change=True)

    @property
    def adapters(self) -> tuple[str | None, ...]:
        """Of each teacher the path of its LoRA adapter, or None."""
        if not self.teacher_peft_path:
            return (None,) * len(self.teacher_model_path)
        return tuple(None if path == NO_ADAPTER else path for path in self.teacher_peft_path)

    def rules(self) -> Iterator[str]:
        """What is wrong between these settings, a sentence each."""
        teachers = len(self.teacher_model_path)
        for name in ("teacher_peft_path", "teacher_weights"):
            given = getattr(self, name)
            if given and len(given) != teachers:
                yield (f"--{name.replace('_', '-')} needs one for each of --teacher-model-path, which has {teachers}; "
                       f"got {' '.join(map(str, given))}")
        if self.teacher_callable and self.teacher_model_path:
            yield "--teacher-callable and --teacher-model-path: give one of them"
        if self.teacher_zero == "on" and not self.teacher_model_path:
            yield "--teacher-zero on needs a --teacher-model-path, whose weights are spread"


@dataclass(frozen=True)
class TeacherCacheConfig:
    """Whether the teacher runs once. What a run made of these settings stays with it (todi/teacher/opening.py)."""

    teacher_cache: str = option("auto", "keep the teacher's hidden states: on, off, auto (where it pays), or the "
                                        "folder to keep them in", may_change=True)
    teacher_cache_dtype: str = teacher_cache_dtype_option()

    def rules(self) -> Iterator[str]:
        """What is wrong with the name of the folder."""
        cache = self.teacher_cache
        yield from utf8_problems("--teacher-cache", cache)
        if cache not in CACHE_MODES and "/" not in cache and not Path(cache).is_dir():
            yield f"--teacher-cache must be {', '.join(CACHE_MODES)} or a folder (as ./{cache}), got {cache!r}"
        elif cache not in CACHE_MODES:
            yield from folder_problems("--teacher-cache", cache)


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how much of it."""

    data_dir: tuple[str, ...] = option(("data/dolly",), "folder with train.jsonl and dev.jsonl, or several to mix")
    data_shares: tuple[float, ...] = option((), "share of each of several data folders in an epoch; by their sizes "
                                                "when not given", above=0, fixed=True)
    train_num: int | None = option(None, "use only the first so many training records of each folder", least=1)
    dev_num: int | None = option(None, "use only the first so many dev records of each folder", least=1)
    max_length: int = max_length_option()
    max_prompt_length: int = max_prompt_length_option()
    template_date: str = template_date_option()

    def rules(self) -> Iterator[str]:
        """What is wrong between these settings, a sentence each."""
        if not self.data_dir:
            yield "--data-dir needs at least one folder"
        if len(set(map(Path, self.data_dir))) < len(self.data_dir):
            yield (f"--data-dir names a folder more than once: {' '.join(self.data_dir)}; --data-shares says how often "
                   "each is drawn from")
        if self.data_shares and len(self.data_shares) != len(self.data_dir):
            yield (f"--data-shares needs a number for each folder of --data-dir, which has {len(self.data_dir)}; got "
                   f"{' '.join(map(str, self.data_shares))}")
        yield from response_problems(self.max_prompt_length, self.max_length)
        yield from date_problems(self.template_date)


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the student is trained on."""

    criterion: str = option("vanilla_kd", "cross_entropy (SFT) or vanilla_kd (distillation)", choices=CRITERIA)
    kd_objective: str = option("ToDi", "the divergence or the method (docs/objectives.md)", env="KD_OBJ")
    kd_params: tuple[str, ...] = option((), "parameters of the divergence as name=value, e.g. beta=0.5")
    kd_rate: float = option(0.5, "share of the divergence in the loss; the rest is cross-entropy", least=0, at_most=1)
    kd_temperature: float = option(2.0, "temperature of both softmaxes in the divergence", above=0, env="KD_TEMP")
    label_smoothing: float = option(0.0, "label smoothing of the cross-entropy", least=0, below=1)
    loss_terms: tuple[str, ...] = option((), "further terms of the loss as name=weight, e.g. hidden_states=0.1",
                                         pattern=(r"\w+=[\d.e+-]+", "name=weight"), fixed=True)
    hidden_layers: tuple[str, ...] = option((), "for the term hidden_states: pairs student:teacher of layers, e.g. "
                                                "3:6; spread evenly when not given",
                                            pattern=(r"\d+:\d+", "student:teacher, two numbers of layers"), fixed=True)
    loss_chunk_size: int | None = option(None, "rows of the vocabulary projection at a time; chosen when not given",
                                         least=1, may_change=True)
    kernels: str = option("auto", "what computes the loss between its matrix products (docs/performance.md)",
                          choices=KERNELS, may_change=True)

    @property
    def distils(self) -> bool:
        """Whether there is a teacher."""
        return self.criterion != CROSS_ENTROPY

    @property
    def layer_pairs(self) -> tuple[tuple[int, int], ...]:
        """`hidden_layers` as numbers."""
        return tuple((int(student), int(teacher)) for student, _, teacher in
                     (pair.partition(":") for pair in self.hidden_layers))

    def rules(self) -> Iterator[str]:
        """What is wrong between these settings, a sentence each."""
        if self.hidden_layers and not self.loss_terms:
            yield "--hidden-layers needs --loss-terms"


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer, schedule, and the shape of a step."""

    lr: float = option(5e-4, "peak learning rate", above=0)
    lr_min: float = option(1e-7, "learning rate at the end of the cosine schedule", least=0)
    lr_scheduler: str = option("cosine", "schedule after the warm-up", choices=SCHEDULES)
    warmup_iters: int = option(0, "optimizer steps of linear warm-up", least=0)
    weight_decay: float = option(0.01, "AdamW weight decay, on matrices only", least=0)
    adam_beta1: float = option(0.9, "AdamW beta 1", least=0, below=1)
    adam_beta2: float = option(0.999, "AdamW beta 2", least=0, below=1)
    adam_eps: float = option(1e-8, "AdamW epsilon", above=0)
    clip_grad: float = option(1.0, "largest gradient norm; 0 turns clipping off", least=0)
    batch_size: int = option(4, "samples of a micro-batch, per device", least=1, may_change=True)
    gradient_accumulation_steps: int = option(2, "micro-batches of an optimizer step, per device", least=1,
                                              env="GRAD_ACC", may_change=True)
    packing: str = option("auto", "lay the samples of a micro-batch one after the other, without padding: auto (where "
                                  "the models can) or off", choices=PACKING)
    max_tokens: int | None = option(None, "tokens of a packed micro-batch at most, per device; as many as --batch-size "
                                          "of the longest samples when not given", least=1, may_change=True)
    num_epochs: int = option(20, "passes over the training data", least=1, env="EPOCH")
    max_steps: int | None = option(None, "stop after so many optimizer steps", least=1)
    global_batch_size: int | None = option(None, "samples of an optimizer step over all devices, in place of "
                                                 "--gradient-accumulation-steps; these times --batch-size times the "
                                                 "devices when not given", least=1, may_change=True)

    def tokens(self, longest: int) -> int:
        """Of a micro-batch at most, where samples have up to `longest`."""
        return self.max_tokens or self.batch_size * longest

    def accumulation(self, devices: int) -> int:
        """Micro-batches of an optimizer step on each device."""
        if self.global_batch_size is None:
            return self.gradient_accumulation_steps
        return -(-self.global_batch_size // max(1, self.batch_size * devices))  # asked before all settings are checked

    def step_samples(self, devices: int) -> int:
        """Samples of an optimizer step over all devices."""
        return self.global_batch_size or self.batch_size * self.gradient_accumulation_steps * devices

    def rules(self) -> Iterator[str]:
        """What is wrong with the shape of a step."""
        if self.accumulation(1) > _MOST_MICRO_BATCHES:
            yield (f"a step of {self.accumulation(1):,} micro-batches (--gradient-accumulation-steps, or "
                   f"--global-batch-size over --batch-size): at most {_MOST_MICRO_BATCHES:,}")


@dataclass(frozen=True)
class RunConfig:
    """Where a run goes, in what precision, and how it is judged."""

    save_dir: str = option("outputs/run", "folder for checkpoints, args.json, train.log, metrics.jsonl; launchers name "
                                          "it by the settings", may_change=True)
    keep_best_n_checkpoints: int = option(1, "checkpoints kept, the best by dev ROUGE-L (or dev loss)", least=1,
                                          env="SAVE_BEST_N_CKPTS", may_change=True)
    precision: str = precision_option()
    tf32: bool = option(True, "on a GPU: round the factors of fp32 products to TF32, which is several times faster")
    allocator: str = allocator_option()
    zero_stage: int = option(1, "DeepSpeed ZeRO stage", least=0, at_most=3, may_change=True)
    offload: tuple[str, ...] = option((), "what DeepSpeed keeps in the computer's memory, not the device's: optimizer "
                                          "(stage 1 or more), param (stage 3)", may_change=True,
                                      pattern=("optimizer|param", "optimizer or param"))
    deepspeed_config: str | None = option(None, "a DeepSpeed JSON file that overrides the built configuration",
                                          flag="--deepspeed_config", may_change=True)
    seed: int = option(10, "seed of the data order, the dropout and the dev sampling", least=0,
                       below=2**32, fixed=True)
    log_interval: int = option(10, "optimizer steps between lines of the log", least=1, may_change=True)
    eval_interval: int = option(1, "epochs between evaluations on dev", least=1)
    eval_gen: bool = option(True, "generate on dev and rank checkpoints by ROUGE-L; else by dev loss")
    eval_gen_repeat_times: int = option(1, "dev responses to a prompt, of whose ROUGE-L the mean counts (published: 3)",
                                        least=1)
    rouge_tokenizer: str = rouge_tokenizer_option()
    eval_batch_size: int = eval_batch_size_option()
    resume: str = option("auto", "auto goes on with the run in --save-dir, if it is the same one; force does so though "
                                 "settings differ; never starts anew and removes it", choices=RESUME, may_change=True)
    save_state_every: str = option("30m", "a resume state after so many minutes (30m) or steps (500) besides the one "
                                          "at each epoch's end; 0 for no others", may_change=True,
                                   pattern=(r"\d+m?", "a number of steps (500) or of minutes (30m)"))
    max_bad_steps: int = option(10, "stop after so many steps in a row whose loss or gradients are not finite",
                                least=1, may_change=True)
    mfu: bool = option(True, "report which share of the device's peak is used; a CPU's is probed for a second",
                       may_change=True)
    profile: int = option(0, "trace so many steps, after the first two, into trace.json of the run's folder", least=0,
                          may_change=True)
    process_group_timeout: int = process_group_timeout_option()
    report_to: tuple[str, ...] = option((), "also log to these: tensorboard, wandb, trackio", may_change=True)
    plugins: tuple[str, ...] = plugins_option()
    check_only: bool = check_only_option()

    def rules(self) -> Iterator[str]:
        """What is wrong with the folder and the named file."""
        yield from folder_problems("--save-dir", self.save_dir)
        yield from utf8_problems("--save-dir", self.save_dir)
        if self.deepspeed_config and not Path(self.deepspeed_config).is_file():
            yield f"--deepspeed_config: no such file: {self.deepspeed_config}"


@dataclass(frozen=True)
class TrainConfig:
    """Trains a student: SFT (--criterion cross_entropy) or distillation from a teacher (--kd-objective)."""

    student: StudentConfig
    teacher: TeacherConfig
    cache: TeacherCacheConfig
    data: DataConfig
    source: SamplesConfig
    objective: ObjectiveConfig
    optim: OptimConfig
    run: RunConfig
    INSTEAD: ClassVar[Mapping[str, str]] = TRAINING_OPTIONS

    @property
    def by_name(self) -> dict[str, Any]:
        """All settings, by name."""
        parts = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return {field.name: getattr(part, field.name) for part in parts for field in dataclasses.fields(part)}

    @property
    def deciding(self) -> dict[str, Any]:
        """The settings that decide what a run computes, by name."""
        may_change = self.changeable()
        return {name: value for name, value in self.by_name.items() if name not in may_change}

    @classmethod
    def changeable(cls) -> set[str]:
        """Names of the settings that may change at resume, for they do not alter what a run computes."""
        return {one.name for options in declared(cls).values() for one in options if one.may_change}

    @classmethod
    def fixed(cls) -> set[str]:
        """Names of the settings that nothing can change at resume."""
        return {one.name for options in declared(cls).values() for one in options if one.fixed}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Of the settings that decide what a run computes, by name."""
        return parse(cls, ()).deciding

    def rules(self) -> Iterator[str]:
        """What is wrong between the groups, a sentence each."""
        if self.objective.distils and not (self.teacher.teacher_model_path or self.teacher.teacher_callable):
            yield f"--criterion {self.objective.criterion} needs --teacher-model-path or --teacher-callable"
        if self.student.compile and self.objective.loss_terms:
            yield "--compile and --loss-terms: give one of them; terms read what lies between the compiled layers"
        if self.source.on_policy:
            yield from self._on_policy_rules()

    def _on_policy_rules(self) -> Iterator[str]:
        given = f"--samples {self.source.samples}"
        if not self.objective.distils:
            yield f"{given} needs --criterion vanilla_kd: nobody else says what is good in the student's own text"
        elif self.objective.kd_rate != 1:
            yield (f"{given} needs --kd-rate 1, got {self.objective.kd_rate:g}: the rest is cross-entropy, by which "
                   "the student would imitate its own text")
        if not (self.source.uses_responses or self.cache.teacher_cache in CACHE_MODES):
            yield (f"{given} uses no response of the data: --teacher-cache must be {', '.join(CACHE_MODES)}, got "
                   f"{self.cache.teacher_cache}")

    def problems(self) -> list[str]:
        """Everything that is wrong with the settings themselves, in the order of the options."""
        return problems(self)
