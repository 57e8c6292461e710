"""`todi.ToDiTrainer`: transformers' Trainer with this project's loss, for those who have a training script already.

    trainer = todi.ToDiTrainer(model, args, teacher=teacher, train_dataset=rows, data_collator=collator)
    trainer.train()

Labels are as collators of transformers make them: token ids, -100 where nothing is learnt, not shifted. The loss is
made within the model's own forward, from hidden states: no logits of a whole batch are ever there, and what wraps the
model (DDP, FSDP, DeepSpeed) sees a forward as always.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from os import PathLike, fspath
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers import PreTrainedTokenizerBase as Tokenizer

from todi.criterions import DistillationCriterion, TeacherRows, build_divergence
from todi.criterions.linear import IGNORE_INDEX
from todi.errors import InputError
from todi.hf_schedule import ScheduleSteps
from todi.hf_teachers import SAMPLES, CachedModel, LiveModel, check
from todi.models.backbone import backbone_and_head, labelled_rows
from todi.models.loading import load_model, load_tokenizer
from todi.models.tokenizers import tokenizer_difference
from todi.settings import CROSS_ENTROPY

_SUMS = ("loss", "kd", "ce", "correct", "tokens")
_NOT_FOR_MODELS = ("labels", "shift_labels", "num_items_in_batch", SAMPLES)


class ToDiTrainer(Trainer):
    """Distils: (1 - kd_rate) cross-entropy + kd_rate divergence, per label, as `todi.distil` does.

    The sums of all micro-batches and ranks are divided once by the labels of the whole step, however it is cut.
    Beside `loss` the logs have `kd`, `ce`, `accuracy` and what a schedule moves, such as `kd_beta`. `eval_loss` is the
    same loss over all labels of the evaluation set; with a cache it is the cross-entropy, for a cache knows training
    samples alone.

    Args:
        model: a causal language model, or a PeftModel around one.
        teacher: a model, frozen from here on and moved to the device; the path of one; or the folder of a teacher
            cache (`python -m todi.cache build`), for a data set from `encode_file`. None for cross_entropy.
        objective: a divergence, or cross_entropy (SFT).
        kd_rate, kd_temperature: share of the divergence; temperature of both softmaxes in it.
        kd_params: parameters of the divergence, e.g. {"beta": 0.5}.
        loss_chunk_size: rows of the vocabulary projection at a time; chosen when not given.
        trainer: what `transformers.Trainer` takes.

    Raises:
        InputError: the teacher, the model or the cache does not fit.
        ValueError: there is no such divergence, or no such parameter of it.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, model: PreTrainedModel | PeftModel, *positional: Any,
                 teacher: nn.Module | str | PathLike | None = None, objective: str = "ToDi", kd_rate: float = 0.5,
                 kd_temperature: float = 2.0, kd_params: Mapping[str, float] | None = None,
                 loss_chunk_size: int | None = None, **trainer: Any):
        if (teacher is None) != (objective == CROSS_ENTROPY):
            raise InputError(f"objective {objective!r} and teacher {'None' if teacher is None else 'given'}: a "
                             f"divergence needs a teacher, and {CROSS_ENTROPY} has none")
        super().__init__(model, *positional, **trainer)
        if self.args.n_gpu > 1:
            raise InputError(f"{self.args.n_gpu} GPUs in one process (DataParallel): start with torchrun or accelerate "
                             "launch, or choose one with CUDA_VISIBLE_DEVICES")
        divergence = None if teacher is None else build_divergence(objective, **kd_params or {})
        self.criterion = DistillationCriterion(divergence, kd_temperature, 0.0 if teacher is None else kd_rate,
                                               self.args.label_smoothing_factor, loss_chunk_size)
        self.teacher = None if teacher is None else self._open_teacher(teacher)
        # what Trainer asks of a model's own loss: that it is divided by the labels of a whole step, which it counts
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = True
        self._window: list[Tensor] = []  # sums since the last line of the log
        self._evaluated: list[Tensor] = []
        self._schedule = ScheduleSteps(self)
        self.add_callback(self._schedule)
        check(model, trained=True)
        _add_loss(model)

    def compute_loss(self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False,
                     num_items_in_batch: Tensor | int | None = None) -> Any:
        """The loss of a micro-batch as `Trainer` wants it: over the labels of the step, times the ranks that DDP will
        divide by; its mean without `num_items_in_batch`."""
        sums = self._sums(model, inputs, self.teacher)
        self._window.append(_stacked(sums))
        self._schedule.see(self._window[-1])
        loss = sums["loss"] / (sums["tokens"].clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        return (loss, model(**_for_models(inputs))) if return_outputs else loss

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool,
                        ignore_keys: Sequence[str] | None = None) -> tuple[Tensor | None, Any, Any]:
        """The mean loss of a batch, and the logits where a metric wants them."""
        if "labels" not in inputs:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            counted = inputs | {"labels": self._without_repeats(inputs["labels"])}
            sums = self._sums(model, counted, self.teacher if isinstance(self.teacher, LiveModel) else None)
            self._evaluated.append(_stacked(sums))
            loss = (sums["loss"] / sums["tokens"].clamp(min=1)).detach()
            if prediction_loss_only:
                return loss, None, None
            return loss, model(**_for_models(inputs)).logits, inputs["labels"]

    def evaluation_loop(self, *words: Any, metric_key_prefix: str = "eval", **options: Any) -> Any:
        """As `Trainer`'s, with a loss that does not depend on how the set was cut into batches."""
        self._evaluated = []
        output = super().evaluation_loop(*words, metric_key_prefix=metric_key_prefix, **options)
        means = self.means(self._evaluated, with_loss=True)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def log(self, logs: dict[str, float], *words: Any, **options: Any) -> None:
        """Adds the parts of the loss to a line about training."""
        if "loss" in logs:
            logs |= self.means(self._window, with_loss=False) | self._schedule.values
            self._window = []
        super().log(logs, *words, **options)

    def _sums(self, model: nn.Module, inputs: Mapping[str, Any],
              teacher: LiveModel | CachedModel | None) -> dict[str, Tensor]:
        _share_head(_base(self.model))
        by_sample = _next_tokens(inputs)
        labels = by_sample.flatten()
        rows = (labels != IGNORE_INDEX).nonzero().squeeze(-1)
        inputs_of_models = _for_models(inputs)
        said = None if teacher is None else teacher.rows(inputs_of_models, rows, inputs.get(SAMPLES))
        criterion = self.criterion if said else DistillationCriterion(
            label_smoothing=self.criterion.label_smoothing, chunk_size=self.criterion.chunk_size)
        counts = _counts(by_sample, inputs.get("position_ids")) if criterion.selects else None
        return model(**inputs_of_models, distillation=_Loss(criterion, rows, labels[rows], said, counts))

    def means(self, parts: list[Tensor], with_loss: bool) -> dict[str, float]:
        """Of the sums of all ranks, per label."""
        mine = torch.stack(parts).sum(0) if parts else torch.zeros(len(_SUMS), device=self.args.device)
        sums = dict(zip(_SUMS, self.accelerator.reduce(mine, "sum").tolist(), strict=True))
        means = {name: sums[name] / max(sums["tokens"], 1.0) for name in _SUMS[:-1]}
        means["accuracy"] = means.pop("correct")
        leave_out = {*(() if with_loss else ("loss",)), *(() if self.criterion.divergence else ("kd",))}
        return {name: value for name, value in means.items() if name not in leave_out}

    def _without_repeats(self, labels: Tensor) -> Tensor:
        """None of the samples that accelerate repeats to fill the last batches of an evaluation over several ranks."""
        state = self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return labels
        genuine = max(0, state.remainder - self.accelerator.process_index * len(labels))
        return labels.index_fill(0, torch.arange(min(genuine, len(labels)), len(labels), device=labels.device),
                                 IGNORE_INDEX)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if SAMPLES not in self._signature_columns:
            self._signature_columns.append(SAMPLES)

    def _open_teacher(self, teacher: nn.Module | str | PathLike) -> LiveModel | CachedModel:
        device = self.args.device
        if isinstance(teacher, nn.Module):
            return LiveModel(teacher.to(device))
        if (Path(teacher) / "cache.json").is_file():
            return CachedModel(Path(teacher), device, self.train_dataset)
        if isinstance(self.processing_class, Tokenizer):
            difference = tokenizer_difference(self.processing_class, load_tokenizer(fspath(teacher)))
            if difference:
                raise InputError(f"the teacher {teacher} and the student have different tokenizers: {difference}")
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else self.model.dtype
        return LiveModel(load_model(fspath(teacher), dtype, device))


@dataclass(frozen=True)
class _Loss:
    """What a model's forward makes instead of logits: the criterion's sums over its labelled rows."""

    criterion: DistillationCriterion
    rows: Tensor
    labels: Tensor
    teacher: TeacherRows | None
    counts: Sequence[int] | None

    def __call__(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        backbone, head = backbone_and_head(model)
        hidden = labelled_rows(backbone, inputs, self.rows)
        return dict(self.criterion(hidden, head, self.labels, self.teacher, self.counts))


def _add_loss(model: PreTrainedModel | PeftModel) -> None:
    """Has the model's forward take `distillation`, and otherwise be what it was."""
    base = _base(model)
    plain = type(base).forward

    @wraps(plain)  # Trainer looks at the names of its arguments
    def forward(self: PreTrainedModel, *inputs: Any, distillation: _Loss | None = None, **named: Any) -> Any:
        if distillation is None:
            return plain(self, *inputs, **named)
        return distillation(self, {name: value for name, value in named.items() if value is not None})

    base.forward = MethodType(forward, base)


def _base(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _share_head(model: nn.Module) -> None:
    """Tells ZeRO-3 that the model's own forward reads the head's parameters, so that it gathers them."""
    for parameter in model.get_output_embeddings().parameters(recurse=False):
        if hasattr(parameter, "ds_id") and parameter.ds_id not in getattr(model, "_external_params", {}):
            import deepspeed  # only who uses it has it loaded

            deepspeed.zero.register_external_parameter(model, parameter)


def _next_tokens(inputs: Mapping[str, Any]) -> Tensor:
    """(B, T) the label of the token after each; a collator may have shifted them already."""
    if "shift_labels" in inputs:
        return inputs["shift_labels"]
    return nn.functional.pad(inputs["labels"], (0, 1), value=IGNORE_INDEX)[:, 1:]


def _counts(labels: Tensor, positions: Tensor | None) -> list[int]:
    """Of (B, T) the labels of each sample: of a row, or of a part of one where positions begin anew."""
    begins = (torch.arange(labels.shape[1], device=labels.device) if positions is None else positions) == 0
    samples = begins.expand_as(labels).flatten().cumsum(0)
    return samples[labels.flatten() != IGNORE_INDEX].bincount().tolist()


def _for_models(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in _NOT_FOR_MODELS}


def _stacked(sums: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([sums[name].detach() if name in sums else sums["loss"].new_zeros(()) for name in _SUMS])
