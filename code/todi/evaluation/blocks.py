"""A KV cache for many rows on a CPU, and the attention of one new token to it.

transformers' own cache is copied whole at each step to gain one column, and a row with a short prompt attends to as
much padding as the longest prompt has tokens. Here the rows, sorted by the length of their prompts, are cut into
blocks. A block begins with the first token of its longest prompt, has a few columns to spare, and is contiguous,
which the batched matrix product of a CPU needs to be quick.

    with attention_over_blocks(model):
        cache = BlockCache(model.config)
        model(input_ids=prompts, cache=cache)                           # reads the prompts as ever
        cache.split(padding)
        cache.add_column()
        model(input_ids=tokens, cache=cache, blocks=cache)              # one token a row
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from todi.models.families import FAMILIES

_ATTENTION = "todi_blocks"
_ROWS = 32  # of a block; more have more padding, fewer cost more calls
_SPARE = 32  # columns that a block grows by


def can_use_blocks(model: PreTrainedModel) -> bool:
    """Whether `model` decodes by blocks: on a CPU, with sdpa, and of an architecture that the tests go through."""
    known = {FAMILIES[name].architecture for name in FAMILIES}
    return (model.device.type == "cpu" and model.config._attn_implementation in ("sdpa", _ATTENTION)
            and model.config.model_type in known)


@contextmanager
def attention_over_blocks(model: PreTrainedModel) -> Iterator[None]:
    """Has `model` attend to the blocks of a `BlockCache` where it is called with one, if it can use them."""
    if not can_use_blocks(model):
        yield
        return
    before = model.config._attn_implementation
    model.set_attn_implementation(_ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@dataclass
class _Block:
    """What a block is in every layer.

    Attributes:
        rows: how many.
        bias: (rows, 1, 1, columns) of attention scores: 0 for a token, -inf for padding and columns to spare.
        filled: columns in use.
    """

    rows: int
    bias: Tensor
    filled: int

    def add_column(self) -> None:
        """Lets every row see one column more, and makes room for it."""
        if self.filled == self.bias.shape[-1]:
            self.bias = nn.functional.pad(self.bias, (0, _SPARE), value=-torch.inf)
        self.bias[..., self.filled] = 0
        self.filled += 1


class BlockCache(DynamicCache):
    """Keys and values of B rows that are padded on the left; in blocks once it is `split`.

    Layers that attend to everything are split, others (sliding windows) stay as transformers has them.
    """

    def __init__(self, config: PretrainedConfig):
        super().__init__(config=config)
        self._blocks: list[_Block] = []  # the same list in every layer
        self.layers = [_BlockLayer(self._blocks) if type(layer) is DynamicLayer else layer for layer in self.layers]

    def split(self, padding: Sequence[int]) -> None:
        """Cuts the rows into blocks; `padding` is the number of columns before the first token of each row."""
        length = self.get_seq_length()
        rows = [range(start, min(start + _ROWS, len(padding))) for start in range(0, len(padding), _ROWS)]
        starts = [min(padding[row] for row in block) for block in rows]
        layers = [layer for layer in self.layers if isinstance(layer, _BlockLayer)]
        for block, start in zip(rows, starts, strict=True):
            columns = length - start + _SPARE
            bias = torch.full((len(block), 1, 1, columns), -torch.inf, dtype=layers[0].keys.dtype)
            for row, blanks in enumerate(padding[block.start:block.stop]):
                bias[row, ..., blanks - start:length - start] = 0
            self._blocks.append(_Block(len(block), bias, length - start))
        for layer in layers:
            layer.split(starts)

    def add_column(self) -> None:
        """Makes room for the next token of each row."""
        for block in self._blocks:
            block.add_column()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Goes on with the rows `beam_idx`, once split in ascending order."""
        if not self._blocks:
            super().reorder_cache(beam_idx)
            return
        ends = torch.tensor([0, *(block.rows for block in self._blocks)]).cumsum(0)
        cuts = torch.searchsorted(beam_idx, ends).tolist()
        kept = [beam_idx[first:last] - end for first, last, end in zip(cuts[:-1], cuts[1:], ends[:-1], strict=True)]
        for layer in self.layers:
            layer.keep(kept) if isinstance(layer, _BlockLayer) else layer.reorder_cache(beam_idx)
        for block, rows in zip(self._blocks, kept, strict=True):
            block.rows, block.bias = len(rows), block.bias[rows]
        self._blocks[:] = [block for block in self._blocks if block.rows]


class _BlockLayer(DynamicLayer):
    """One layer. Its parts, of (rows, heads, columns, width) each, belong to the blocks in the same order."""

    def __init__(self, blocks: list[_Block]):
        super().__init__()
        self._blocks = blocks
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def split(self, starts: Sequence[int]) -> None:
        rows = [block.rows for block in self._blocks]
        for parts, whole in ((self._keys, self.keys), (self._values, self.values)):
            parts += [nn.functional.pad(part[:, :, start:], (0, 0, 0, _SPARE))
                      for part, start in zip(whole.split(rows), starts, strict=True)]
        self._length = self.keys.shape[-2]
        self.keys = self.values = None

    def get_seq_length(self) -> int:
        return self._length if self._keys else super().get_seq_length()

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Adds the keys and values (B, heads, T, width) of T tokens; once split, T is 1 and the old are not given."""
        if not self._keys:
            return super().update(key_states, value_states)
        self._length += 1
        rows = [block.rows for block in self._blocks]
        for parts, new in ((self._keys, key_states), (self._values, value_states)):
            for index, (block, column) in enumerate(zip(self._blocks, new.split(rows), strict=True)):
                room = block.bias.shape[-1] - parts[index].shape[2]
                if room:
                    parts[index] = nn.functional.pad(parts[index], (0, 0, 0, room))
                parts[index][:, :, block.filled - 1] = column[:, :, 0]
        return key_states, value_states

    def keep(self, rows: Sequence[Tensor]) -> None:
        """Goes on with some rows of each block."""
        for parts in (self._keys, self._values):
            parts[:] = [part if len(kept) == len(part) else part[kept]
                        for part, kept in zip(parts, rows, strict=True) if len(kept)]

    def attend(self, query: Tensor, scaling: float | None) -> Tensor:
        """(B, query heads, 1, width) -> (B, 1, query heads, width of a value)."""
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        attended = []
        queries = query.split([block.rows for block in self._blocks])
        for block, asked, keys, values in zip(self._blocks, queries, self._keys, self._values, strict=True):
            rows, heads, columns, width = keys.shape
            # Query heads that share keys are the rows of one matrix product.
            scores = asked.reshape(rows * heads, -1, width) @ keys.flatten(0, 1).transpose(1, 2)
            scores = torch.add(block.bias, scores.view(rows, heads, -1, columns), alpha=scaling)
            weights = scores.softmax(-1, dtype=torch.float32).to(values.dtype)
            attended.append((weights.flatten(0, 1) @ values.flatten(0, 1)).view(rows, 1, query.shape[1], -1))
        return torch.cat(attended)


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
               scaling: float | None = None, blocks: BlockCache | None = None, **kwargs) -> tuple[Tensor, None]:
    """transformers' attention interface: the blocks' own for a layer that has them, else sdpa."""
    layer = blocks.layers[module.layer_idx] if blocks else None
    if isinstance(layer, _BlockLayer):
        return layer.attend(query, scaling), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


AttentionInterface.register(_ATTENTION, _attention)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
