"""The settings: of a training run, of an evaluation, of a teacher cache. Each is declared here and nowhere else.

    python -m todi.settings > docs/settings.md     # the page that lists them

Nothing below the entry points and the builders ever sees these classes.
"""

import dataclasses
import datetime
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from todi.options import declared, markdown_tables, option, parse, problems
from todi.schedules import SCHEDULES

CROSS_ENTROPY = "cross_entropy"
CRITERIA = (CROSS_ENTROPY, "vanilla_kd")
PRECISIONS = ("auto", "bf16", "fp16", "fp32")
RESUME = ("auto", "force", "never")
ALLOCATORS = ("auto", "glibc", "system")
OWN_DTYPE = "own"
CACHE_DTYPES = (OWN_DTYPE, "bf16", "fp16", "fp32")
KERNELS = ("auto", "triton", "compile", "eager")
CACHE_MODES = ("auto", "on", "off")
PACKING = ("auto", "off")
# a relative path, spelled plainly, that stays below the folder it is joined to
SET_NAME = r"(?!\.{1,2}(/|\Z))[^/]+(/(?!\.{1,2}(/|\Z))[^/]+)*"
NO_ADAPTER = "none"
TODAY = "today"
AUTO_TOKENIZER = "auto"
ROUGE_TOKENIZERS = (AUTO_TOKENIZER, "rouge_score", "words", "characters")

_MOST_MICRO_BATCHES = 1_000_000  # of a step, each of which is planned before it begins

# What launchers understand besides the settings.
LAUNCHER_VARIABLES = {
    "FAMILY": "the student's family: MODEL_TYPE when not given, and a folder of model_hub/ and outputs/",
    "CKPT_NAME": "the student's name: MODEL_PATH is model_hub/FAMILY/CKPT_NAME when not given",
    "TEACHER_FAMILY": "family of the teacher; FAMILY when not given",
    "TEACHER_NAME": "the teacher's name: TEACHER_MODEL_PATH is the best of its newest SFT run when not given",
    "TEACHER_PEFT": "lora: the teacher is model_hub/TEACHER_FAMILY/TEACHER_NAME with the adapter of its newest SFT run",
    "SKEW_LAMBDA": "0.1 is short for KD_PARAMS=skew_lambda=0.1",
    "GPUS": "devices to use, 0,1 or cpu; all that are visible when not given",
    "NPROC": "processes; one for each device when not given, on a CPU one",
    "NNODES": "nodes; with NODE_RANK, MASTER_ADDR and MASTER_PORT, as in torchrun",
    "RENDEZVOUS_TIMEOUT": "seconds that a node waits for the others before it gives up; 900 when not given",
    "NODE_RANK": "number of this node, from 0",
    "MASTER_ADDR": "name of the first node",
    "MASTER_PORT": "a free port there; 29500 when not given",
    "DRY_RUN": "1: print the command and stop",
    "DOCTOR": "1: check all input, estimate memory and disk space, and stop",
}

# Variables of the published scripts that have no meaning here, and what to use.
PUBLISHED = {
    "BASE_PATH": "paths start at the root of the repository",
    "WORK_DIR": "paths start at the root of the repository",
    "TASK": "each launcher has its own: sft_*.sh, vanilla_kd_*.sh",
    "CONFIG": "the folder of a run is named by its settings; SAVE_DIR gives it another name",
    "SETTING": "the folder of a run is named by its settings; SAVE_DIR gives it another name",
    "OPTS": "words after the launcher's name go to the Python command",
}


# ---- what several commands share

def _max_length() -> Any:
    return option(512, "longest prompt + response, in tokens")


def _max_prompt_length() -> Any:
    return option(256, "longest prompt, in tokens; the rest of it is cut off", least=1)


def _template_date() -> Any:
    return option(TODAY, "the date for chat templates that write one; today is that of the first start, also when a "
                         "run or an evaluation goes on later",
                  pattern=(r"today|\d{4}-\d\d-\d\d", "today or 2026-01-31"))


def _text(flag: str, folder: str) -> Iterator[str]:
    """What is wrong with the name of a folder that is written to: bytes that are no UTF-8 stand in it as surrogates."""
    if any("\ud800" <= letter <= "\udfff" for letter in folder):
        yield f"{flag} must be UTF-8, got {ascii(folder)}"


def _a_date(config: "DataConfig | EvalConfig") -> Iterator[str]:
    try:
        datetime.date.fromisoformat(config.template_date)
    except ValueError as error:
        if config.template_date != TODAY:
            yield f"--template-date {config.template_date}: {error}"


def _room_for_a_response(config: "DataConfig | EvalConfig") -> Iterator[str]:
    if config.max_prompt_length >= config.max_length:
        yield (f"--max-prompt-length ({config.max_prompt_length}) must be below --max-length "
               f"({config.max_length}), or no room is left for a response")


def _room_for_a_folder(option: str, path: str) -> Iterator[str]:
    place = Path(path)
    there = next(one for one in (place, *place.parents) if os.path.lexists(one))
    if not there.is_dir():
        yield f"{option} {path}: {there} is no folder"


def _eval_batch_size() -> Any:
    return option(32, "prompts decoded together in an evaluation, per device", least=1, env="EVAL_BATCH_SIZE",
                  may_change=True)


def _rouge_tokenizer() -> Any:
    return option(AUTO_TOKENIZER, "tokens of ROUGE-L (todi/evaluation/rouge_tokens.py); auto: as published, unless "
                                  "more than a tenth of the references' letters are not Latin",
                  choices=ROUGE_TOKENIZERS)


def _precision() -> Any:
    return option("auto", "compute precision; auto asks the device", choices=PRECISIONS)


def _allocator() -> Any:
    return option("auto", "on a CPU, whether memory that is freed is kept for the next step: glibc keeps it; auto does "
                          "so too, by tcmalloc where a launcher finds it; system gives it back", choices=ALLOCATORS,
                  may_change=True)


def _trust_remote_code() -> Any:
    return option(False, "run Python code that comes with a model; only for models you trust")


def _teacher_cache_dtype() -> Any:
    return option(OWN_DTYPE, "numbers of the teacher cache; own, the teacher's, is exact", choices=CACHE_DTYPES,
                  may_change=True)


def _process_group_timeout() -> Any:
    return option(7200, "seconds that processes wait for one another before they give up", least=1, at_most=10_000_000,
                  may_change=True)


def _plugins() -> Any:
    return option((), "Python files that are run first, to register what is one's own")


def _check_only() -> Any:
    return option(False, "check all input, then stop before any weights are loaded", may_change=True)


# ---- training

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
    trust_remote_code: bool = _trust_remote_code()

    def rules(self) -> Iterator[str]:
        """What is wrong between these settings, a sentence each."""
        if not self.model_path:
            yield "--model-path is required"
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


@dataclass(frozen=True)
class TeacherCacheConfig:
    """Whether the teacher runs once. What a run made of these settings stays with it (todi/teacher/opening.py)."""

    teacher_cache: str = option("auto", "keep the teacher's hidden states: on, off, auto (where it pays), or the "
                                        "folder to keep them in", may_change=True)
    teacher_cache_dtype: str = _teacher_cache_dtype()

    def rules(self) -> Iterator[str]:
        """What is wrong with the name of the folder."""
        cache = self.teacher_cache
        yield from _text("--teacher-cache", cache)
        if cache not in CACHE_MODES and "/" not in cache and not Path(cache).is_dir():
            yield f"--teacher-cache must be {', '.join(CACHE_MODES)} or a folder (as ./{cache}), got {cache!r}"
        elif cache not in CACHE_MODES:
            yield from _room_for_a_folder("--teacher-cache", cache)


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how much of it."""

    data_dir: tuple[str, ...] = option(("data/dolly",), "folder with train.jsonl and dev.jsonl, or several to mix")
    data_shares: tuple[float, ...] = option((), "share of each of several data folders in an epoch; by their sizes "
                                                "when not given", above=0, fixed=True)
    train_num: int | None = option(None, "use only the first so many training records of each folder", least=1)
    dev_num: int | None = option(None, "use only the first so many dev records of each folder", least=1)
    max_length: int = _max_length()
    max_prompt_length: int = _max_prompt_length()
    template_date: str = _template_date()

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
        yield from _room_for_a_response(self)
        yield from _a_date(self)


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the student is trained on."""

    criterion: str = option("vanilla_kd", "cross_entropy (SFT) or vanilla_kd (distillation)", choices=CRITERIA)
    kd_objective: str = option("ToDi", "the divergence (todi/criterions/divergences.py)", env="KD_OBJ")
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
                                                 "devices when not given", least=1)

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
    precision: str = _precision()
    tf32: bool = option(True, "on a GPU: round the factors of fp32 products to TF32, which is several times faster")
    allocator: str = _allocator()
    zero_stage: int = option(1, "DeepSpeed ZeRO stage", least=0, at_most=3)
    deepspeed_config: str | None = option(None, "a DeepSpeed JSON file that overrides the built configuration",
                                          flag="--deepspeed_config", may_change=True)
    seed: int = option(10, "seed of the data order, the dropout and the dev sampling", least=0,
                       below=2**32, fixed=True)
    log_interval: int = option(10, "optimizer steps between lines of the log", least=1, may_change=True)
    eval_interval: int = option(1, "epochs between evaluations on dev", least=1)
    eval_gen: bool = option(True, "generate on dev and rank checkpoints by ROUGE-L; else by dev loss")
    eval_gen_repeat_times: int = option(1, "dev responses to a prompt, of whose ROUGE-L the mean counts (published: 3)",
                                        least=1)
    rouge_tokenizer: str = _rouge_tokenizer()
    eval_batch_size: int = _eval_batch_size()
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
    process_group_timeout: int = _process_group_timeout()
    report_to: tuple[str, ...] = option((), "also log to these: tensorboard, wandb, trackio", may_change=True)
    plugins: tuple[str, ...] = _plugins()
    check_only: bool = _check_only()

    def rules(self) -> Iterator[str]:
        """What is wrong with the folder and the named file."""
        yield from _room_for_a_folder("--save-dir", self.save_dir)
        yield from _text("--save-dir", self.save_dir)
        if self.deepspeed_config and not Path(self.deepspeed_config).is_file():
            yield f"--deepspeed_config: no such file: {self.deepspeed_config}"


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
    def by_name(self) -> dict[str, Any]:
        """All settings, by name."""
        parts = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return {field.name: getattr(part, field.name) for part in parts for field in dataclasses.fields(part)}

    @property
    def deciding(self) -> dict[str, Any]:
        """The settings that decide what a run computes, by name."""
        may_change = {one.name for options in declared(type(self)).values() for one in options if one.may_change}
        return {name: value for name, value in self.by_name.items() if name not in may_change}

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

    def problems(self) -> list[str]:
        """Everything that is wrong with the settings themselves, in the order of the options."""
        return problems(self)


# ---- evaluation

@dataclass(frozen=True)
class EvalConfig:
    """Scores a checkpoint by ROUGE-L on instruction sets, over several sampling seeds."""

    model_path: str | None = option(None, "a model folder, a GGUF file, or a Hub name; an adapter names its own")
    # no variables for what the launchers are told by words: those of a training may be set in the same shell
    peft_path: str | None = option(None, "a LoRA adapter, merged into --model-path or into the base that it names",
                                   env=())
    trust_remote_code: bool = _trust_remote_code()
    sets_dir: str = option("data", "folder with a folder for each set", flag=("--sets-dir", "--data-dir"),
                           env=("SETS_DIR", "DATA_DIR"))
    sets: tuple[str, ...] = option(("dolly", "self-inst", "vicuna", "sinst/11_", "uinst/11_"),
                                   "sets to score; one that is not there is named and skipped",
                                   pattern=(SET_NAME, "the plain name of a folder below --sets-dir"))
    limit: int | None = option(None, "use only the first so many records of each set", least=1)
    seeds: tuple[int, ...] = option((10, 20, 30, 40, 50), "sampling seeds; greedy takes the first alone")
    batch_size: int = _eval_batch_size()
    max_length: int = _max_length()
    max_new_tokens: int = option(256, "longest response, in tokens", least=1)
    max_prompt_length: int = _max_prompt_length()
    template_date: str = _template_date()
    do_sample: bool = option(True, "sample; else greedy or beam search")
    num_beams: int = option(1, "beams of the beam search, with --no-do-sample", least=1)
    temperature: float = option(1.0, "sampling temperature", above=0)
    top_p: float = option(1.0, "sample from the smallest set of tokens with this mass; 1 is off", above=0, at_most=1)
    top_k: int = option(0, "sample from the k most likely tokens; 0 is off", least=0)
    no_repeat_ngram_size: int = option(6, "n-grams of this size may occur once only; 0 is off", least=0)
    rouge_tokenizer: str = _rouge_tokenizer()
    precision: str = _precision()
    allocator: str = _allocator()
    process_group_timeout: int = _process_group_timeout()
    save_dir: str | None = option(None, "folder for eval/; the checkpoint's own when not given", env=())
    plugins: tuple[str, ...] = _plugins()
    check_only: bool = _check_only()

    @property
    def streams(self) -> tuple[int, ...]:
        """The seeds that make a difference."""
        return self.seeds if self.do_sample else self.seeds[:1]

    @property
    def folder(self) -> Path:
        """Where eval/ goes."""
        return Path(self.save_dir or self.peft_path or self.model_path)

    def rules(self) -> Iterator[str]:
        """What is wrong between these settings, a sentence each."""
        if not (self.model_path or self.peft_path):
            yield "--model-path or --peft-path is required"
        elif not (self.save_dir or self.peft_path or Path(self.model_path).is_dir()):
            yield f"--save-dir is required: {self.model_path} is no folder that results could go to"
        if self.save_dir:
            yield from _room_for_a_folder("--save-dir", self.save_dir)
        for name in ("sets", "seeds"):
            values = getattr(self, name)
            if not values:
                yield f"--{name} needs at least one"
            repeated = sorted({str(value) for value in values if values.count(value) > 1})
            if repeated:
                yield f"--{name}: {', '.join(repeated)} given more than once"
        yield from _room_for_a_response(self)
        yield from _a_date(self)
        if self.do_sample and self.num_beams > 1:
            yield f"--num-beams {self.num_beams} needs --no-do-sample"

    def problems(self) -> list[str]:
        """Everything that is wrong with the settings themselves, in the order of the options."""
        return problems(self)


# ---- the teacher cache

@dataclass(frozen=True)
class CacheConfig:
    """Makes a teacher cache, describes one, or compares one with its teacher."""

    command: str = option("", "what to do", choices=("build", "info", "verify"), flag="command")
    folder: str = option("", "of the cache", flag="folder")
    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    precision: str = _precision()
    allocator: str = _allocator()
    teacher_cache_dtype: str = _teacher_cache_dtype()
    trust_remote_code: bool = _trust_remote_code()
    plugins: tuple[str, ...] = _plugins()
    samples: int = option(32, "samples that verify runs the teacher over again", least=0)
    seed: int = option(0, "of the choice of these samples")

    def rules(self) -> Iterator[str]:
        """What is wrong between these settings, a sentence each."""
        teachers = self.teacher.teacher_model_path
        if self.command == "build" and not teachers:
            yield "--teacher-model-path is required"
        if len(teachers) > 1:
            yield f"--teacher-model-path: a cache is of one teacher, got {' '.join(teachers)}; make one of each"


def recorded(values: Sequence[Any]) -> Any:
    """Values as args.json and caches hold them where there used to be one at most: a single one by itself."""
    return list(values) if len(values) > 1 else values[0] if values else None


def named_numbers(words: tuple[str, ...]) -> dict[str, float]:
    """('beta=0.5',) -> {'beta': 0.5}. Raises ValueError for a word that is not name=number."""
    params = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            params[name] = float(value)
        except ValueError:
            raise ValueError(f"expected name=number, got {word!r}") from None
    return params


def page() -> str:
    """docs/settings.md."""
    launchers = "\n".join(f"| `{name}` | {help} |" for name, help in LAUNCHER_VARIABLES.items())
    return f"""# Settings

Made from the declarations in `code/todi/settings.py` by `python -m todi.settings > docs/settings.md`.

A launcher takes the variables; its words go to the Python command as they are, and win. A variable that is empty is not
given. Of a list the values are separated by spaces, quoted as in a shell. Yes and no are `1` and `0`. A name that no
setting has, but nearly, is refused.

## Training: `python -m todi.train`, `todi.doctor`

"At resume" says what may change when a run goes on: "may change", for it does not alter what is computed; "with force",
under `RESUME=force` alone, which says what changes and computes with the new value from there on; "fixed", never, for a
resume state is laid out by it. Of what is not a setting, the data may change with force; the student's files, the
samples of a step (over all devices) and of an epoch are fixed. [deepspeed.md](deepspeed.md) has the keys of a DeepSpeed
file.

{markdown_tables(TrainConfig, ("variable", "option", "default", "allowed", "at resume", "meaning"))}

## What launchers understand besides

`PEFT=full` trains every weight though the launcher has an adapter; `TEACHER_PEFT_PATH=none` leaves the teacher's out.

| variable | meaning |
| --- | --- |
{launchers}

## Evaluation: `python -m todi.evaluate`

{markdown_tables(EvalConfig, ("variable", "option", "default", "allowed", "meaning"))}

## Teacher cache: `python -m todi.cache`

Besides its own, the settings of the teacher and of the data above.

{markdown_tables(CacheConfig, ("option", "default", "allowed", "meaning"), leave_out=(TeacherConfig, DataConfig))}
"""


if __name__ == "__main__":
    print(page(), end="")
