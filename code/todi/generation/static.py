"""Decoding many rows on a GPU: keys and values in places that are allocated once.

transformers' own cache is copied whole at each step to gain one column. Here every row has a place with as many columns
as a text may have tokens. A token's keys and values are written where its row ends, and a row that joins writes over
those of the one whose place it takes; so the shapes of a step are the same for many steps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from todi.generation.continuation import Forward, plain_attention, read_prompts, windows_of
from todi.generation.together import READ_TOGETHER

_COLUMNS = 64  # attended to are as many columns as the longest row has tokens, rounded up to a multiple of this


def can_use_places(model: PreTrainedModel) -> bool:
    """Whether `model` is to decode in places: on a GPU, with sdpa, and of an architecture that the tests go through."""
    return model.device.type == "cuda" and plain_attention(model)


class StaticContinuation:
    """The live rows in their places; as `todi.generation.continuation.Continuation`, which see."""

    can_be_added_to = True

    def __init__(self, model: nn.Module, prompts: Sequence[tuple[int, ...]], pad_id: int | None, max_length: int):
        self._forward = Forward(model)
        self._pad_id, self._max_length = pad_id, max_length
        self._cache = _PlacedCache(self._forward.base.config, max_length)
        self._positions = torch.empty((0, 1), dtype=torch.long, device=self._forward.device)  # of the row in each place
        self._places: list[int] = []  # of each live row
        self._lengths: list[int] = []  # its tokens
        self._index = self._tensor([])
        self.logits: Tensor | None = None
        self.add(prompts)

    def add(self, prompts: Sequence[tuple[int, ...]]) -> None:
        """Reads `prompts` into free places, or new ones where these are too few; some at a time, for memory's sake."""
        for start in range(0, len(prompts), READ_TOGETHER):
            self._read(prompts[start:start + READ_TOGETHER])

    def _read(self, prompts: Sequence[tuple[int, ...]]) -> None:
        cache = DynamicCache()
        mask, index, logits = read_prompts(self._forward, prompts, self._pad_id, cache)
        free = sorted({*range(len(self._positions))} - {*self._places})
        missing = len(prompts) - len(free)
        if missing > 0:
            free += range(len(self._positions), len(self._positions) + missing)
            self._positions = nn.functional.pad(self._positions, (0, 0, 0, missing))
        places = free[:len(prompts)]
        self._cache.put(cache, mask, index, self._tensor(places), len(self._positions))
        lengths = [len(prompt) for prompt in prompts]
        self._positions[self._tensor(places), 0] = self._tensor(lengths) - 1
        self._set_rows([*self._places, *places], [*self._lengths, *lengths])
        self.logits = logits[index] if self.logits is None else torch.cat([self.logits, logits[index]])

    def keep(self, places: Sequence[int]) -> None:
        """Goes on with the rows at `places`; where half of all places would be empty, there are fewer from then on."""
        self.logits = self.logits[self._tensor(places)]
        self._set_rows([self._places[place] for place in places], [self._lengths[place] for place in places])
        if len(places) <= len(self._positions) // 2:
            self._cache.keep(self._index)
            self._positions = self._positions[self._index]
            self._set_rows(list(range(len(places))), self._lengths)

    def extend(self, tokens: Tensor) -> None:
        """Appends a token (B,) to each row and computes the logits of the one after it."""
        # A finished row that is not dropped yet may run over the end of its positions; nobody reads it.
        self._lengths = [min(length + 1, self._max_length) for length in self._lengths]
        self._positions[self._index, 0] = (self._positions[self._index, 0] + 1).clamp(max=self._max_length - 1)
        ids = torch.zeros_like(self._positions)  # an empty place has a token too, which nobody reads
        ids[self._index, 0] = tokens
        mask = self._cache.see(self._positions, max(self._lengths))
        self.logits = self._forward(ids, mask, self._positions, self._cache)[self._index]

    def _set_rows(self, places: list[int], lengths: list[int]) -> None:
        self._places, self._lengths = places, lengths
        self._index = self._tensor(places)

    def _tensor(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self._forward.device)


class _Step:
    """Where the next token of each place goes, in every layer.

    Attributes:
        positions: (places,) columns.
        columns: that are attended to.
    """

    positions: Tensor
    columns: int = 0


class _PlacedCache(Cache):
    """Keys and values in places, which one token a place is written to at a time."""

    def __init__(self, config: PretrainedConfig, max_length: int):
        config = config.get_text_config(decoder=True)
        self._step, self._max_length, self._windows = _Step(), max_length, windows_of(config)
        self._kinds = getattr(config, "layer_types", None)
        super().__init__(layers=[_PlacedLayer(self._step) for _ in self._windows])

    def put(self, cache: DynamicCache, mask: Tensor, index: Tensor, places: Tensor, count: int) -> None:
        """Writes the rows `index` of `cache` to `places` of `count`, each from the first column on.

        Args:
            mask: (rows of the cache, columns), 0 before a row's first token.
        """
        length = mask.shape[1]
        columns = torch.arange(length, device=mask.device) + (length - mask.sum(1, keepdim=True))
        for layer, read in zip(self.layers, cache.layers, strict=True):
            layer.put(read, columns.clamp(max=length - 1), index, places, (count, self._max_length))

    def keep(self, index: Tensor) -> None:
        """Goes on with the places `index`."""
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[index], layer.values[index]

    def see(self, positions: Tensor, length: int) -> Tensor | dict[str, Tensor]:
        """Has the next token of each place written to its position (places, 1), of which `length` - 1 is the last.

        Returns:
            what it attends to, (places, 1, 1, columns) of bool; where layers differ in it, by their kind.
        """
        columns = min(-(-length // _COLUMNS) * _COLUMNS, self._max_length)
        self._step.positions, self._step.columns = positions[:, 0], columns
        column = torch.arange(columns, device=positions.device)
        before = column <= positions
        masks = {window: (before if window is None else before & (column > positions - window))[:, None, None]
                 for window in set(self._windows)}
        if len(masks) == 1:
            return next(iter(masks.values()))
        return {kind: masks[window] for kind, window in zip(self._kinds, self._windows, strict=True)}


class _PlacedLayer(DynamicLayer):
    """One layer: `keys` and `values` are (places, heads, columns, width)."""

    def __init__(self, step: _Step):
        super().__init__()
        self._step = step
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return max(0, self._step.columns - 1)

    def put(self, read: DynamicLayer, columns: Tensor, index: Tensor, places: Tensor, size: tuple[int, int]) -> None:
        """See `_PlacedCache.put`; `columns` (rows, T) are those of the read ones, `size` is places and columns."""
        self.keys = _put(self.keys, read.keys, columns, index, places, size)
        self.values = _put(self.values, read.values, columns, index, places, size)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Writes the keys and values (places, heads, 1, width) of a token a place; all that may be attended to."""
        rows = torch.arange(len(key_states), device=key_states.device)
        for tensor, new in ((self.keys, key_states), (self.values, value_states)):
            tensor[rows, :, self._step.positions] = new[:, :, 0]
        return self.keys[:, :, :self._step.columns], self.values[:, :, :self._step.columns]


def _put(there: Tensor | None, read: Tensor, columns: Tensor, index: Tensor, places: Tensor,
         size: tuple[int, int]) -> Tensor:
    """Keys or values with those that were `read` (rows, heads, T, width) in their places, of as many as `size` says."""
    count, length = size
    missing = count - (0 if there is None else len(there))
    if missing:
        new = read.new_zeros(missing, read.shape[1], length, read.shape[3])  # 0: what is not seen must be no NaN
        there = new if there is None else torch.cat([there, new])
    rows = torch.arange(len(read), device=read.device)[:, None]
    there[places, :, :columns.shape[1]] = read[rows, :, columns][index].transpose(1, 2)
    return there
