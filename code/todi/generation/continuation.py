"""Rows of text that grow by one token at a time, in transformers' own KV cache."""

import inspect
from collections.abc import Sequence

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Cache, DynamicCache


class Forward:
    """Calls a causal language model, LoRA-wrapped or not, for the logits of the next token.

    Attributes:
        base: the model inside the wrapping.
        device: where it runs.
    """

    def __init__(self, model: nn.Module):
        self._model, self.base = model, base_model(model)
        self.device = next(model.parameters()).device
        parameters = inspect.signature(self.base.forward).parameters
        # transformers renamed it between 5.17 and 5.24; models that bring their own code keep the old name.
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"
        # Of a prompt, only the last position goes through the head.
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}

    def __call__(self, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Cache, **more: object) -> Tensor:
        """Token ids (B, T) behind what `cache` has -> logits (B, V)."""
        return self._model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True,
                           **{self._cache_name: cache}, **self._options, **more).logits[:, -1]


class Continuation:
    """The live rows of a batch, left-padded. Equal prompts are read once.

    Args:
        pad_id: None where all prompts are of one length; then there is no mask, which models with a state of their own
            would take for one of the new tokens alone.

    Attributes:
        logits: (B, V) of the next token of each row.
    """

    def __init__(self, model: nn.Module, prompts: Sequence[tuple[int, ...]], pad_id: int | None, max_length: int):
        self._forward = Forward(model)
        self._last_position = max_length - 1
        self._cache = DynamicCache(config=self._forward.base.config)
        distinct = list(dict.fromkeys(prompts))
        ids, mask = (tensor.to(self._forward.device) for tensor in left_padded(distinct, pad_id))
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        self._mask = None if pad_id is None else mask
        self.logits = self._forward(ids, self._mask, positions, self._cache)
        self._positions = positions[:, -1:]
        if len(distinct) < len(prompts):
            place = {prompt: place for place, prompt in enumerate(distinct)}
            self.keep([place[prompt] for prompt in prompts])

    def keep(self, places: Sequence[int]) -> None:
        """Goes on with the rows at `places`; one may come several times."""
        index = torch.tensor(places, device=self._forward.device)
        self._cache.reorder_cache(index)  # selects by index for every kind of layer, sliding windows included
        self._mask = None if self._mask is None else self._mask[index]
        self._positions = self._positions[index]
        self.logits = self.logits[index]

    def extend(self, tokens: Tensor) -> None:
        """Appends a token (B,) to each row and computes the logits of the one after it."""
        # A finished row that is not dropped yet may run over the end of its positions; nobody reads it.
        self._positions = (self._positions + 1).clamp(max=self._last_position)
        self._mask = None if self._mask is None else nn.functional.pad(self._mask, (0, 1), value=1)
        self.logits = self._forward(tokens[:, None], self._mask, self._positions, self._cache)


def base_model(model: nn.Module) -> nn.Module:
    """The model inside a LoRA wrapping."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int | None) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask (B, T); every row's last token is in the last column."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask
