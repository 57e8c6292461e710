"""What a student is trained on: divergences between next-token distributions, chunked over the vocabulary."""

from todi.criterions.criterion import DistillationCriterion
from todi.criterions.diagnostics import diagnose
from todi.criterions.divergences import DIVERGENCES, Divergence, Parameter, build_divergence, divergence
from todi.criterions.linear import LossSums, distillation_loss, linear_distillation_loss
from todi.criterions.linear_head import LinearHead
from todi.criterions.teacher_rows import HeadRows, LogitRows, MeanRows, TeacherRows

__all__ = ["DIVERGENCES", "DistillationCriterion", "Divergence", "HeadRows", "LinearHead", "LogitRows", "LossSums",
           "MeanRows", "Parameter", "TeacherRows", "build_divergence", "diagnose", "distillation_loss", "divergence",
           "linear_distillation_loss"]
