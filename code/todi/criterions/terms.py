"""Terms of the loss besides cross-entropy and divergence.

A term is a module, for it may have weights of its own: they are trained with the student's and kept in resume states,
and are no part of the saved model. To add one, register a class, in a file that --plugins names:

    @TERMS.register("mine")
    class Mine(LossTerm):
        def __init__(self, context: TermContext): super().__init__()
        def forward(self, student, teacher, labels): return ...     # a sum over the rows

LOSS_TERMS="mine=0.1" then adds 0.1 times its mean per response token to the loss.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from todi.criterions.definitions import compute_dtype
from todi.criterions.linear import LossSums
from todi.criterions.teacher_rows import HeadRows, TeacherRows
from todi.registry import Registry


@dataclass(frozen=True)
class ModelShape:
    """Number of layers and size of the hidden states, H."""

    layers: int
    width: int


@dataclass(frozen=True)
class TermContext:
    """What a term is made for.

    Attributes:
        teacher: None where there is no teacher, or none that is a single model.
        pairs: layers that were asked for, (student's, teacher's), each counted from 1.
    """

    student: ModelShape
    teacher: ModelShape | None
    pairs: tuple[tuple[int, int], ...] = ()


class LossTerm(nn.Module, ABC):
    """One term. Its constructor takes a `TermContext` and raises ValueError where that does not suit it.

    Attributes:
        student_layers, teacher_layers: whose hidden states it reads, counted from 1.
    """

    student_layers: tuple[int, ...] = ()
    teacher_layers: tuple[int, ...] = ()

    @abstractmethod
    def forward(self, student: HeadRows, teacher: TeacherRows | None, labels: Tensor) -> Tensor:
        """Its sum over N labelled rows, a scalar; float32 or more.

        Args:
            student: hidden states (N, H) and head; its `layers` are those of `student_layers`.
            teacher: the same of the teacher; None without one.
            labels: (N,) token ids.
        """


TERMS: "Registry[type[LossTerm]]" = Registry("loss term")


@TERMS.register("hidden_states")
class HiddenStates(LossTerm):
    """Layers of the student, each linearly projected, against layers of the teacher: for a row the mean over all pairs
    of mean((W h_s - h_t)^2) (Jiao et al., TinyBERT, Findings of EMNLP 2020, equation 9).

    Without pairs, each layer i of L_s goes with layer i L_t / L_s, rounded.
    """

    def __init__(self, context: TermContext):
        super().__init__()
        student, teacher = context.student, context.teacher
        if teacher is None:
            raise ValueError("it needs one teacher that is a model")
        self.pairs = context.pairs or tuple(
            (layer, max(1, round(layer * teacher.layers / student.layers))) for layer in range(1, student.layers + 1))
        for pair in self.pairs:
            if not (1 <= pair[0] <= student.layers and 1 <= pair[1] <= teacher.layers):
                raise ValueError(f"there is no pair of layers {pair[0]}:{pair[1]}; the student has 1 to "
                                 f"{student.layers}, the teacher 1 to {teacher.layers}")
        self.student_layers, self.teacher_layers = (tuple(sorted(set(side))) for side in zip(*self.pairs, strict=True))
        self.projections = nn.ModuleList(nn.Linear(student.width, teacher.width, bias=False) for _ in self.pairs)

    def forward(self, student: HeadRows, teacher: HeadRows, labels: Tensor) -> Tensor:
        distances = []
        for (ours, theirs), projection in zip(self.pairs, self.projections, strict=True):
            projected, target = projection(student.layers[ours]), teacher.layers[theirs]
            dtype = compute_dtype(projected)
            distances.append(self.distance(projected.to(dtype), target.to(dtype)).sum())
        return sum(distances) / len(distances)

    def distance(self, projected: Tensor, target: Tensor) -> Tensor:
        """(N, H_t), (N, H_t) -> (N,)."""
        return (projected - target).square().mean(-1)


def build_terms(names: Mapping[str, float], context: TermContext) -> dict[str, LossTerm]:
    """The terms of these names.

    Raises:
        ValueError: there is no such term, its name is taken by another sum, or it does not suit the models.
    """
    terms = {}
    for name in names:
        kind = TERMS[name]
        if name in LossSums._fields:
            raise ValueError(f"a loss term cannot be called {name!r}, which is a sum of every loss")
        try:
            terms[name] = kind(context)
        except ValueError as error:
            raise ValueError(f"loss term {name}: {error}") from None
    return terms
