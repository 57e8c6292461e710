"""The last layer of a language model, as the loss needs it: what makes logits of hidden states."""

from dataclasses import dataclass

import torch
from torch import Tensor


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

    def cropped(self, vocabulary: int) -> "LinearHead":
        """The head of the first `vocabulary` entries; a view."""
        bias = None if self.bias is None else self.bias[:vocabulary]
        return LinearHead(self.weight[:vocabulary], bias, self.softcap, self.scale)
