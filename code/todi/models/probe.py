"""A few tokens through a loaded model: whether it does what loss and decoding count on, whatever its architecture."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from todi.errors import InputError
from todi.models.backbone import backbone_and_head
from todi.models.compiling import uncompiled
from todi.models.loading import refusing
from todi.runtime.device import name_of


def probe_tokens(vocabulary: int, share: float = 0.5) -> range:
    """Eight ids that follow one another, from so far into a vocabulary on.

    The first are often special ones that a model has never seen: what it makes of them is small, and in half precision
    mostly rounding.
    """
    first = max(0, min(int(share * vocabulary), vocabulary - 8))
    return range(first, first + 8)


@torch.no_grad()
def check_model(model: nn.Module, name: str, trained: bool = False) -> None:
    """Runs a model, LoRA-wrapped or not, on a few tokens, once, when it has been loaded.

    Raises:
        InputError: it cannot be run; its logits are not finite, are not those of its hidden states and its head, or
            depend on later tokens; or, of a model that is `trained`, its own loss is more than the cross-entropy.
    """
    backbone, head = backbone_and_head(model)
    ids = torch.tensor([list(probe_tokens(len(head.weight)))], device=head.weight.device)
    with evaluating(model), refusing(f"{name} cannot be run"):  # some configurations make a model that cannot compute
        output = model(input_ids=ids, **({"labels": ids} if trained else {}))
        ours = head(backbone(input_ids=ids).last_hidden_state).float()
        ids_then = torch.cat([ids[:, :-1], ids[:, :1]], 1)
        then = head(backbone(input_ids=ids_then).last_hidden_state).float()
    logits, half = output.logits.float(), head.weight.dtype != torch.float32
    if not logits.isfinite().all():
        raise InputError(f"{name}: its logits are not finite; its weights are damaged, or too large for "
                         f"{name_of(head.weight.dtype)}")
    error = relative_error(ours, logits)
    if not error < (0.02 if half else 1e-4):  # bf16 alone gives a few thousandths
        raise InputError(f"{name}: logits computed from its hidden states differ from its own by {error:.2%}; "
                         "its head is of a kind that is not supported")
    # Experts are chosen anew when the other tokens change: in half precision rounding alone may choose others.
    if not relative_error(then[:, :-1], ours[:, :-1]) < (0.1 if half else 1e-3):
        raise InputError(f"{name}: its logits depend on later tokens, so it cannot be trained to predict them; it is "
                         "no causal language model, or its configuration makes it none (is_decoder, bidirectional "
                         "attention)")
    if trained and not _is_cross_entropy(output.loss, logits, ids, 0.01 if half else 1e-5):
        raise InputError(f"{name}: its own training loss is more than the cross-entropy of the next token, and the "
                         "rest of it is not computed here; its configuration says what it is")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode and without compiled layers, which is undone at the end."""
    was_training = model.training
    model.eval()
    try:
        with uncompiled(model):
            yield
    finally:
        model.train(was_training)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Of two tensors of one shape, by their norms; of others it is infinite."""
    if found.shape != expected.shape:
        return torch.inf
    smallest = torch.finfo(expected.dtype).tiny  # logits of a head that is zero have no size
    return ((found - expected).norm() / expected.norm().clamp_min(smallest)).item()


def _is_cross_entropy(loss: Tensor, logits: Tensor, ids: Tensor, tolerance: float) -> bool:
    """Whether a model's own loss is that alone, of labels that it shifts by a token, or that it wants shifted."""
    shifted, as_they_are = cross_entropy(logits[0, :-1], ids[0, 1:]), cross_entropy(logits[0], ids[0])
    return any(torch.isclose(loss.float(), expected, rtol=tolerance) for expected in (shifted, as_they_are))
