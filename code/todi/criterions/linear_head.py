"""The last layer of a language model, as the loss needs it: what makes logits of hidden states."""

from dataclasses import dataclass

import torch
from torch import Tensor

_ALIGNMENT, _ALIGNED_DEVICES = 64, {"cuda"}


@dataclass(frozen=True)
class LinearHead:
    """The last layer of a language model: logits = softcap(scale (hidden W^T + bias)).

    Attributes:
        weight: (V, H).
        bias: (V,) or None. An entry of -inf masks a vocabulary entry, in both models.
        softcap: c in c tanh(logits / c), as in Gemma.
        scale: factor of the logits, as in Granite and Cohere.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def __call__(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., V) logits in the dtype of the weight."""
        logits = torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def rows(self, hidden: Tensor) -> Tensor:
        """(n, H) -> (n, V) as a call makes them, for the loss: no gradient comes back.

        On a GPU, rows of an odd vocabulary are laid out so that each starts at a multiple of 64 numbers, as fast
        products and wide loads want it. What lies between them may hold anything.
        """
        vocabulary = len(self.weight)
        if hidden.device.type not in _ALIGNED_DEVICES or vocabulary % _ALIGNMENT == 0:
            return self(hidden)
        aligned = -(-vocabulary // _ALIGNMENT) * _ALIGNMENT
        logits = self.weight.new_empty(len(hidden), aligned)[:, :vocabulary]
        torch.mm(hidden.to(self.weight.dtype), self.weight.t(), out=logits)
        if self.bias is not None:
            logits.add_(self.bias)
        if self.scale != 1.0:
            logits.mul_(self.scale)
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def cropped(self, vocabulary: int) -> "LinearHead":
        """The head of the first `vocabulary` entries; a view."""
        bias = None if self.bias is None else self.bias[:vocabulary]
        return LinearHead(self.weight[:vocabulary], bias, self.softcap, self.scale)
