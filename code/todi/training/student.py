"""The trained model as DeepSpeed wraps it: everything that touches its parameters is inside one forward."""

from collections.abc import Mapping, Sequence

import deepspeed
import torch
from torch import Tensor, nn

from todi.criterions import DistillationCriterion, HeadRows, LossTerm, TeacherRows, diagnose
from todi.data.batches import Batch
from todi.models.backbone import backbone_and_head, labelled_layers
from todi.training.speed import Meter


class Student(nn.Module):
    """A causal language model whose forward is the training loss of a batch.

    Args:
        terms: of the loss, by name, whose weights are trained too; a criterion says which of them count.
        meter: is told when the loss is computed.
    """

    def __init__(self, model: nn.Module, terms: Mapping[str, LossTerm] | None = None, meter: Meter | None = None):
        super().__init__()
        self.model = model
        self.terms = nn.ModuleDict(terms or {})
        self.meter = meter or Meter()

    def forward(self, batch: Batch, criterion: DistillationCriterion, teacher: TeacherRows | None = None,
                diagnosed: Sequence[slice] = ()) -> tuple[Mapping[str, Tensor], dict[str, Tensor]]:
        """The sums over the batch's labelled rows, and those of the divergence's diagnostics over some of them."""
        backbone, head = backbone_and_head(self.model)
        terms = {name: self.terms[name] for name in criterion.terms}
        layers = sorted({layer for term in terms.values() for layer in term.student_layers})
        hidden, outputs = labelled_layers(backbone, batch.inputs, batch.rows, layers)
        with self.meter.phase("loss"):
            sums = dict(criterion(hidden, head, batch.row_labels, teacher, batch.counts, batch.own))
            for name, term in terms.items():
                sums[name] = term(HeadRows(hidden, head, outputs), teacher, batch.row_labels)
                sums["loss"] = sums["loss"] + criterion.terms[name] * sums[name]
        report = {}
        if teacher is not None and diagnosed:
            with torch.no_grad():
                logits = head(torch.cat([hidden[rows] for rows in diagnosed]))[:, :teacher.vocabulary]
                theirs = [teacher.logits(rows, logits.shape[1], criterion.temperature) for rows in diagnosed]
                report = diagnose(logits, torch.cat(theirs), criterion.divergence, criterion.temperature)
        return sums, report

    def share_head(self) -> None:
        """Tells ZeRO-3 that this module's own forward reads the head's parameters, so that it gathers them."""
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        head = model.get_output_embeddings()  # peft may have wrapped it; the loss asks for these by the same names
        for parameter in (head.weight, getattr(head, "bias", None)):
            if hasattr(parameter, "ds_id"):
                deepspeed.zero.register_external_parameter(self, parameter)


def is_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO-3 has spread the parameters over the ranks."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())
