"""What a student is trained on: divergences between next-token distributions, chunked over the vocabulary."""

import todi.criterions.divergences  # noqa: F401, I001  they register themselves, in the order of the documentation
import todi.criterions.alpha_beta
import todi.criterions.alpha_mixture
import todi.criterions.top_k
import todi.criterions.sampled
import todi.criterions.targets
import todi.criterions.row_weights
import todi.criterions.presets  # noqa: F401
from todi.criterions.criterion import DistillationCriterion
from todi.criterions.definitions import DIVERGENCES, Divergence, build_divergence, divergence
from todi.criterions.diagnostics import diagnose, diagnosis
from todi.criterions.linear import LossSums, distillation_loss, linear_distillation_loss
from todi.criterions.linear_head import LinearHead
from todi.criterions.parameters import Parameter
from todi.criterions.parts import ROW_WEIGHTS, TARGETS, Part, Term, objective, row_weight, target
from todi.criterions.schedules import Schedule, ScheduleKind, linear_schedule
from todi.criterions.selection import Selection
from todi.criterions.teacher_rows import HeadRows, LogitRows, MeanRows, TeacherRows
from todi.criterions.terms import TERMS, HiddenStates, LossTerm, ModelShape, TermContext, build_terms

__all__ = ["DIVERGENCES", "ROW_WEIGHTS", "TARGETS", "TERMS", "DistillationCriterion", "Divergence", "HeadRows",
           "HiddenStates", "LinearHead", "LogitRows", "LossSums", "LossTerm", "MeanRows", "ModelShape", "Parameter",
           "Part", "Schedule", "ScheduleKind", "Selection", "TeacherRows", "Term", "TermContext", "build_divergence",
           "build_terms", "diagnose", "diagnosis", "distillation_loss", "divergence", "linear_distillation_loss",
           "linear_schedule", "objective", "row_weight", "target"]
