"""Rows of text that grow by one token at a time, in transformers' own KV cache."""

import inspect
from collections.abc import Sequence

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from todi.models.families import is_tested
from todi.models.packing import ATTENTION as PACKED


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
    """The live rows of a batch, left-padded: the last token of each is in the last column. Equal prompts are read once.

    Args:
        pad_id: None where all prompts are of one length; then there is no mask, which models with a state of their own
            would take for one of the new tokens alone.
        max_length: most tokens of a row.

    Attributes:
        logits: (B, V) of the next token of each row.
    """

    def __init__(self, model: nn.Module, prompts: Sequence[tuple[int, ...]], pad_id: int | None, max_length: int):
        self._model, self._pad_id, self._max_length = model, pad_id, max_length
        self._forward = Forward(model)
        self._cache = DynamicCache(config=self._forward.base.config)
        mask, index, self.logits = read_prompts(self._forward, prompts, pad_id, self._cache)
        self._mask = None if pad_id is None else mask
        self._positions = mask.sum(1, keepdim=True) - 1
        if len(mask) < len(prompts):
            self.keep(index.tolist())

    @property
    def can_be_added_to(self) -> bool:
        """Whether rows can join: the cache has keys and values alone, which columns nobody sees can be put before."""
        of_chunks = getattr(self._forward.base.config, "attention_chunk_size", None)  # a chunk begins at a column
        return self._mask is not None and not of_chunks and all(
            type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) and layer.is_initialized
            for layer in self._cache.layers)

    def add(self, prompts: Sequence[tuple[int, ...]]) -> None:
        """Reads `prompts`, whose rows come behind those that are there; where `can_be_added_to`."""
        new = Continuation(self._model, prompts, self._pad_id, self._max_length)
        columns = max(self._mask.shape[1], new._mask.shape[1])
        self._mask = torch.cat([_widened(mask, columns, dim=1) for mask in (self._mask, new._mask)])
        for layer, read in zip(self._cache.layers, new._cache.layers, strict=True):
            layer.keys, layer.values = _joined(layer.keys, read.keys), _joined(layer.values, read.values)
        self._set_columns(columns)
        self._positions = torch.cat([self._positions, new._positions])
        self.logits = torch.cat([self.logits, new.logits])

    def keep(self, places: Sequence[int]) -> None:
        """Goes on with the rows at `places`; one may come several times."""
        index = torch.tensor(places, device=self._forward.device)
        self._cache.reorder_cache(index)  # selects by index for every kind of layer, sliding windows included
        self._mask = None if self._mask is None else self._mask[index]
        self._positions = self._positions[index]
        self.logits = self.logits[index]
        if self.can_be_added_to:
            self._drop_columns()

    def _drop_columns(self) -> None:
        """Drops the columns before the first token of the longest row, so that added rows do not make ever more."""
        columns = self._mask.shape[1] - int(self._mask.any(0).int().argmax())
        self._mask = self._mask[:, -columns:]
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys[:, :, -columns:], layer.values[:, :, -columns:]
        self._set_columns(columns)

    def _set_columns(self, columns: int) -> None:
        """Tells the layers with a window, which keep its columns only, how many there are."""
        for layer in self._cache.layers:
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = columns

    def extend(self, tokens: Tensor) -> None:
        """Appends a token (B,) to each row and computes the logits of the one after it."""
        # A finished row that is not dropped yet may run over the end of its positions; nobody reads it.
        self._positions = (self._positions + 1).clamp(max=self._max_length - 1)
        self._mask = None if self._mask is None else nn.functional.pad(self._mask, (0, 1), value=1)
        self.logits = self._forward(tokens[:, None], self._mask, self._positions, self._cache)


def _joined(first: Tensor, second: Tensor) -> Tensor:
    """Keys or values (B, heads, columns, width) of some rows and of others, which end in the same column."""
    columns = max(first.shape[2], second.shape[2])
    return torch.cat([_widened(part, columns, dim=2) for part in (first, second)])


def _widened(tensor: Tensor, columns: int, dim: int) -> Tensor:
    """With zeros before what is there, so that there are `columns` along `dim`."""
    missing = columns - tensor.shape[dim]
    return nn.functional.pad(tensor, (0, 0) * (tensor.ndim - 1 - dim) + (missing, 0)) if missing else tensor


def base_model(model: nn.Module) -> nn.Module:
    """The model inside a LoRA wrapping."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def plain_attention(model: PreTrainedModel, *besides: str) -> bool:
    """Whether the tests go through the model's architecture, and its attention is sdpa or one of those `besides`."""
    return is_tested(model.config.model_type) and model.config._attn_implementation in ("sdpa", PACKED, *besides)


def windows_of(config: PretrainedConfig) -> list[int | None]:
    """Of each layer, how many tokens it attends to; None where all."""
    return [layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
            for layer in DynamicCache(config=config).layers]


def read_prompts(forward: Forward, prompts: Sequence[tuple[int, ...]], pad_id: int | None,
                 cache: DynamicCache) -> tuple[Tensor, Tensor, Tensor]:
    """Reads `prompts` into an empty `cache`, equal ones once.

    Args:
        pad_id: see `Continuation`.

    Returns:
        the attention mask (R, T) of the rows of the cache, the row (B,) of each prompt, and the logits (R, V) of the
        tokens after them.
    """
    distinct = list(dict.fromkeys(prompts))
    ids, mask = (tensor.to(forward.device) for tensor in left_padded(distinct, pad_id))
    logits = forward(ids, None if pad_id is None else mask, (mask.cumsum(1) - 1).clamp(min=0), cache)
    place = {prompt: place for place, prompt in enumerate(distinct)}
    return mask, torch.tensor([place[prompt] for prompt in prompts], device=forward.device), logits


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int | None) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask (B, T); every row's last token is in the last column."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask
