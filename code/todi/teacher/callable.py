"""The teacher source that asks a Python function: a service, a model of another library, a rule."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from todi.criterions import LogitRows
from todi.data.batches import Batch
from todi.errors import InputError
from todi.python_files import load_python_file
from todi.registry import did_you_mean

Function = Callable[[Batch], Tensor]


class CallableTeacher:
    """A function from a batch to the (N, V) logits at its `batch.rows`; -inf for an entry that it does not know.

    Args:
        name: of the function, for messages.
        vocabulary: so many entries V must at least have: those that the student's tokenizer makes use of.
    """

    takes_packed = False  # a function is promised one sample a row

    def __init__(self, function: Function, name: str, vocabulary: int):
        self.function = function
        self.name = name
        self.vocabulary = vocabulary

    @torch.no_grad()
    def rows(self, batch: Batch) -> LogitRows:
        """Raises InputError when the function returns anything else."""
        rows = len(batch.rows)
        if rows == 0:  # a filler, which makes up the numbers on this rank
            return LogitRows(torch.empty(0, self.vocabulary, device=batch.rows.device))
        logits = self.function(batch)
        if not (isinstance(logits, Tensor) and logits.is_floating_point() and logits.ndim == 2
                and len(logits) == rows and logits.shape[1] >= self.vocabulary):
            raise InputError(f"--teacher-callable: {self.name} returned {_described(logits)}; expected "
                             f"floating-point logits of shape ({rows}, V): one row for each of batch.rows, and V at "
                             f"least {self.vocabulary}, the entries that the student's tokenizer makes use of")
        unknown = logits[:, :self.vocabulary].isneginf().all(1).sum().item()
        if unknown:  # of no distribution; the divergence would leave the whole row out
            raise InputError(f"--teacher-callable: {self.name} returned {unknown} of {rows} rows with -inf for each of "
                             f"the {self.vocabulary} entries that the student's tokenizer makes use of")
        return LogitRows(logits.to(batch.rows.device))

    def expect(self, samples: Sequence[int]) -> None:
        """There is nothing to fetch."""

    @property
    def parts(self) -> tuple[()]:
        return ()


def load_function(place: str) -> Function:
    """The function that `file.py:function` names. Raises InputError where there is none."""
    file, _, name = place.rpartition(":")
    if not file:
        raise InputError(f"--teacher-callable must have the form file.py:function, got {place!r}")
    names = vars(load_python_file(file))
    if not callable(names.get(name)):
        known = [known for known, value in names.items() if callable(value) and not known.startswith("_")]
        raise InputError(f"--teacher-callable: {file} has no function {name!r}; {did_you_mean(name, known)}"
                         f"it has: {', '.join(known) or 'none'}")
    return names[name]


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
