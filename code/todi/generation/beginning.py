"""In which of the ways to keep keys and values a model writes."""

from collections.abc import Sequence

from torch import nn

from todi.generation.blocks import BlockContinuation, can_use_blocks
from todi.generation.continuation import Continuation, base_model
from todi.generation.static import StaticContinuation, can_use_places


def begin(model: nn.Module, prompts: Sequence[tuple[int, ...]], pad_id: int | None,
          max_length: int) -> Continuation | BlockContinuation | StaticContinuation:
    """The rows of `prompts`: in blocks on a CPU, in places on a GPU, and of an architecture that is known to do with
    neither in transformers' own cache; the arguments are those of `Continuation`."""
    base = base_model(model)
    continuation = (BlockContinuation if can_use_blocks(base) else
                    StaticContinuation if can_use_places(base) else Continuation)
    return continuation(model, prompts, pad_id, max_length)
