"""Decoding many rows on a CPU: keys and values in blocks, and the attention of one new token to them.

transformers' own cache is copied whole at each step to gain one column, and a row with a short prompt attends to as
much padding as the longest prompt has tokens. Here the rows, sorted by the length of their prompts, are cut into
blocks. A block begins with the first token of its longest prompt, has a few columns to spare, and is contiguous,
which the batched matrix product of a CPU needs to be quick.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from todi.generation.continuation import Forward, plain_attention, read_prompts, windows_of
from todi.generation.together import READ_TOGETHER

_ATTENTION = "todi_blocks"
_ROWS = READ_TOGETHER  # of a block; more have more padding, fewer cost more calls
_SPARE = 32  # columns that a block grows by
_NOT_HERE = ("softcap", "position_bias", "s_aux")  # what some architectures' attention has besides


def can_use_blocks(model: PreTrainedModel) -> bool:
    """Whether `model` can decode in blocks: on a CPU, with sdpa, and of an architecture that the tests go through."""
    return model.device.type == "cpu" and plain_attention(model, _ATTENTION)


@contextmanager
def attention_over_blocks(model: PreTrainedModel) -> Iterator[None]:
    """Has `model` attend to blocks where it is called with them; nothing changes if it cannot use them."""
    if not can_use_blocks(model):
        yield
        return
    before = model.config._attn_implementation
    model.set_attn_implementation(_ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


class BlockContinuation:
    """The live rows of a batch in blocks; as `todi.generation.continuation.Continuation`, which see.

    The rows' prompts are best sorted by length, with equal ones together.
    """

    can_be_added_to = True

    def __init__(self, model: nn.Module, prompts: Sequence[tuple[int, ...]], pad_id: int | None, max_length: int):
        self._forward = Forward(model)
        self._pad_id, self._last_position = pad_id, max_length - 1
        self._cache = _BlockCache(self._forward.base)
        self._positions = torch.empty((0, 1), dtype=torch.long)
        self.logits: Tensor | None = None
        self.add(prompts)

    def add(self, prompts: Sequence[tuple[int, ...]]) -> None:
        """Reads `prompts` into blocks of their own, behind those that are there."""
        new = [self._read(prompts[start:start + _ROWS]) for start in range(0, len(prompts), _ROWS)]
        self.logits = torch.cat(new if self.logits is None else [self.logits, *new])
        self._positions = torch.cat([self._positions, torch.tensor([[len(prompt) - 1] for prompt in prompts])])

    def _read(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        """Makes a block of `prompts`, each read once; (rows, V) logits of the next tokens."""
        cache = DynamicCache()
        mask, index, logits = read_prompts(self._forward, prompts, self._pad_id, cache)
        self._cache.add_block(cache, mask, index)
        return logits[index]

    def keep(self, places: Sequence[int]) -> None:
        """Goes on with the rows at `places`, in ascending order."""
        index = torch.tensor(places)
        self._cache.keep(index)
        self._positions = self._positions[index]
        self.logits = self.logits[index]

    def extend(self, tokens: Tensor) -> None:
        """Appends a token (B,) to each row and computes the logits of the one after it."""
        # A finished row that is not dropped yet may run over the end of its positions; nobody reads it.
        self._positions = (self._positions + 1).clamp(max=self._last_position)
        self._cache.add_column()
        self.logits = self._forward(tokens[:, None], None, self._positions, self._cache, blocks=self._cache)


class _Block:
    """What a block of rows is in every layer.

    Attributes:
        rows: how many.
        filled: columns in use.
        columns: those in use and those to spare.
    """

    def __init__(self, mask: Tensor, dtype: torch.dtype):
        self.rows, self.filled = mask.shape
        self._bias = torch.zeros(self.rows, 1, 1, self.filled, dtype=dtype)
        self._bias.masked_fill_(mask[:, None, None] == 0, -torch.inf)

    @property
    def columns(self) -> int:
        return self._bias.shape[-1]

    def add_column(self) -> None:
        """Lets every row see one column more, and makes room for it."""
        if self.filled == self.columns:
            self._bias = nn.functional.pad(self._bias, (0, _SPARE), value=-torch.inf)
        self._bias[..., self.filled] = 0
        self.filled += 1

    def bias(self, window: int | None) -> Tensor:
        """(rows, 1, 1, columns) of attention scores: 0 for the last `window` tokens, -inf for all else."""
        if window is None or self.filled <= window:
            return self._bias
        bias = self._bias.clone()
        bias[..., :self.filled - window] = -torch.inf
        return bias

    def keep(self, rows: Tensor) -> None:
        self.rows, self._bias = len(rows), self._bias[rows]


class _BlockCache(Cache):
    """Keys and values of rows in blocks, which one token a row is added to at a time."""

    def __init__(self, model: PreTrainedModel):
        self._blocks: list[_Block] = []  # the same list in every layer
        super().__init__(layers=[_BlockLayer(self._blocks, window) for window in windows_of(model.config)])

    def add_block(self, cache: DynamicCache, mask: Tensor, index: Tensor) -> None:
        """Adds the rows `index` of `cache`, with the attention mask (rows of the cache, columns)."""
        self._blocks.append(_Block(mask[index], cache.layers[0].keys.dtype))
        for layer, read in zip(self.layers, cache.layers, strict=True):
            layer.keys.append(read.keys[index])
            layer.values.append(read.values[index])

    def add_column(self) -> None:
        """Makes room for the next token of each row."""
        for block in self._blocks:
            block.add_column()

    def keep(self, index: Tensor) -> None:
        """Goes on with the rows `index`, in ascending order."""
        ends = torch.tensor([0, *(block.rows for block in self._blocks)]).cumsum(0)
        cuts = torch.searchsorted(index, ends).tolist()
        kept = [index[first:last] - end for first, last, end in zip(cuts[:-1], cuts[1:], ends[:-1], strict=True)]
        for layer in self.layers:
            layer.keep(kept)
        for block, rows in zip(self._blocks, kept, strict=True):
            block.keep(rows)
        self._blocks[:] = [block for block in self._blocks if block.rows]


class _BlockLayer(DynamicLayer):
    """One layer: `keys` and `values` are lists of (rows, heads, columns, width), in the order of the blocks."""

    def __init__(self, blocks: list[_Block], window: int | None):
        super().__init__()
        self._blocks, self._window = blocks, window
        self.keys, self.values = [], []
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return max(block.filled for block in self._blocks) - 1

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Puts the keys and values (B, heads, 1, width) of a token a row where there is room; returns them alone."""
        for parts, new in ((self.keys, key_states), (self.values, value_states)):
            columns = new.split([block.rows for block in self._blocks])
            for index, (block, column) in enumerate(zip(self._blocks, columns, strict=True)):
                missing = block.columns - parts[index].shape[2]
                if missing:
                    parts[index] = nn.functional.pad(parts[index], (0, 0, 0, missing))
                parts[index][:, :, block.filled - 1] = column[:, :, 0]
        return key_states, value_states

    def keep(self, rows: Sequence[Tensor]) -> None:
        """Goes on with some rows of each block."""
        for parts in (self.keys, self.values):
            parts[:] = [part if len(kept) == len(part) else part[kept]
                        for part, kept in zip(parts, rows, strict=True) if len(kept)]

    def attend(self, query: Tensor, scaling: float | None) -> Tensor:
        """(B, query heads, 1, width) -> (B, 1, query heads, width of a value)."""
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        queries = query.split([block.rows for block in self._blocks])
        attended = []
        for block, asked, keys, values in zip(self._blocks, queries, self.keys, self.values, strict=True):
            rows, heads, columns, width = keys.shape
            # Query heads that share keys are the rows of one matrix product.
            scores = asked.reshape(rows * heads, -1, width) @ keys.flatten(0, 1).transpose(1, 2)
            scores = torch.add(block.bias(self._window), scores.view(rows, heads, -1, columns), alpha=scaling)
            weights = scores.softmax(-1, dtype=torch.float32).to(values.dtype)
            attended.append((weights.flatten(0, 1) @ values.flatten(0, 1)).view(rows, 1, query.shape[1], -1))
        return torch.cat(attended)


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
               scaling: float | None = None, blocks: _BlockCache | None = None, **kwargs) -> tuple[Tensor, None]:
    """transformers' attention interface: to the blocks where they are given, else sdpa."""
    if blocks is not None:
        if any(kwargs.get(name) is not None for name in _NOT_HERE):
            raise NotImplementedError(f"{type(module).__name__} needs one of {', '.join(_NOT_HERE)}, which attention "
                                      "over blocks does not have; leave its architecture out of `can_use_blocks`")
        return blocks.layers[module.layer_idx].attend(query, scaling), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


AttentionInterface.register(_ATTENTION, _attention)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
