"""What a student is trained on: divergences between next-token distributions, chunked over the vocabulary."""

from todi.criterions.criterion import DistillationCriterion
from todi.criterions.diagnostics import diagnose
from todi.criterions.divergences import DIVERGENCES, Divergence, Parameter, build_divergence, divergence
from todi.criterions.linear import LinearHead, LossSums, linear_distillation_loss

__all__ = ["DIVERGENCES", "DistillationCriterion", "Divergence", "LinearHead", "LossSums", "Parameter",
           "build_divergence", "diagnose", "divergence", "linear_distillation_loss"]
