"""Attention over samples that lie one after the other in a single row, so that no padded position is computed.

Such a row has positions that begin anew with each sample, and `sample_bounds` in place of an attention mask, which
transformers hands on to every layer untouched. On a CPU each sample is attended to by itself; a GPU has a kernel for
it in half precision. A model packs when it computes of two samples in a row what it computes of each alone.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

logger = logging.getLogger(__name__)

ATTENTION = "todi_packed"
_NOT_HERE = ("position_bias", "s_aux")  # what some architectures' attention has besides
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.02}
_WINDOWS = ("sliding_window", "attention_chunk_size")
# Tokens of a sample up to which a CPU trains its attention faster in fp32 than in bf16: half the time at 85 of them.
_SHORT = 160


def sample_bounds(lengths: Sequence[int]) -> Tensor:
    """Where the samples of a packed row begin and end, in the form of an attention mask.

    Returns:
        (1, 1, longest sample, samples + 1) int32: along the last dimension 0 and the sum of the lengths up to each
        sample. The dimension before it repeats them, and tells the longest without a look at a number on the device.
    """
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return bounds.expand(1, 1, max(lengths), -1)


def use_packing(model: nn.Module, name: str) -> bool:
    """Has a causal language model (LoRA-wrapped or not) take packed rows beside padded ones, if it can.

    Args:
        name: of the model, for the log.

    Returns:
        whether it can; else it is left as it was.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    before = base.config._attn_implementation
    try:
        base.set_attn_implementation(ATTENTION)
        error = _difference(base)
        reason = None if error < _TOLERANCE[base.dtype] else f"samples of a row reach each other ({error:.0%})"
    except Exception as problem:  # whatever an architecture does with a mask that it does not know
        reason = f"{type(problem).__name__}: {' '.join(str(problem).split())[:150]}"
    if reason:
        logger.info("batches of %s are padded: %s", name, reason)
        base.set_attn_implementation(before)
    return reason is None


@contextmanager
def packing(model: nn.Module, name: str) -> Iterator[bool]:
    """`use_packing` for as long as the block lasts; gives what it returns."""
    before = model.config._attn_implementation
    try:
        yield use_packing(model, name)
    finally:
        model.set_attn_implementation(before)


def takes_packed(model: nn.Module) -> bool:
    """Whether `use_packing` said so of a model (LoRA-wrapped or not)."""
    return model.config._attn_implementation == ATTENTION


@torch.no_grad()
def _difference(model: PreTrainedModel) -> float:
    """Relative difference of hidden states between two samples in a row and each by itself.

    Windows are made shorter than the samples meanwhile, to see whether attention hears of them.
    """
    device = model.device
    if device.type != "cpu" and not _has_kernel(model.dtype):
        raise NotImplementedError(f"on a {device.type} device attention over packed samples needs bf16 or fp16")
    lengths = (5, 9)
    ids = torch.arange(3, 3 + sum(lengths), device=device)[None]
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])[None]
    was_training = model.training
    model.eval()
    with short_windows(model):
        together = model.base_model(input_ids=ids, position_ids=positions, use_cache=False,
                                    attention_mask=sample_bounds(lengths).to(device)).last_hidden_state
        apart = [model.base_model(input_ids=part, attention_mask=torch.ones_like(part), use_cache=False
                                  ).last_hidden_state for part in ids.split(lengths, 1)]
    model.train(was_training)
    apart = torch.cat(apart, 1).float()
    return ((together.float() - apart).norm() / apart.norm()).item()


@contextmanager
def short_windows(model: PreTrainedModel, window: int = 3) -> Iterator[None]:
    """Windows of `window` tokens in configuration and layers, where there are any."""
    owners = [model.config, *model.modules()]
    given = [(owner, name, value) for owner in owners for name in _WINDOWS
             if type(value := getattr(owner, name, None)) is int]
    for owner, name, _ in given:
        setattr(owner, name, window)
    try:
        yield
    finally:
        for owner, name, value in given:
            setattr(owner, name, value)


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
               dropout: float = 0.0, scaling: float | None = None, sliding_window: int | None = None,
               **kwargs) -> tuple[Tensor, None]:
    """transformers' attention interface: (1, heads, T, width) -> (1, T, heads, width) by `sample_bounds`, else sdpa."""
    if attention_mask is None or attention_mask.dtype != torch.int32:
        return _attend(module, query, key, value, attention_mask, dropout, scaling, **kwargs), None
    if missing := [name for name in _NOT_HERE if kwargs.get(name) is not None]:
        raise NotImplementedError(f"attention over packed samples has no {', '.join(missing)}")
    if query.device.type != "cpu" and _has_kernel(query.dtype) and not dropout and kwargs.get("softcap") is None:
        return _by_kernel(query, key, value, attention_mask, scaling, sliding_window), None
    attended = _sample_by_sample(module, query, key, value, attention_mask, dropout, scaling, sliding_window, **kwargs)
    return attended, None


@torch.compiler.disable  # it would be compiled anew for every number of samples
def _sample_by_sample(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, dropout: float,
                      scaling: float | None, sliding_window: int | None, **kwargs) -> Tensor:
    lengths = bounds[0, 0, 0].diff().tolist()
    parts = zip(*(tensor.split(lengths, 2) for tensor in (query, key, value)), strict=True)
    return torch.cat([_attend(module, *part, _window_mask(part[0], sliding_window), dropout, scaling, **kwargs
                              ).to(query.dtype) for part in map(_fastest, parts)], 1)


def _fastest(part: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Query, key and value of a sample in the precision in which a CPU is faster."""
    query = part[0]
    short = query.dtype == torch.bfloat16 and query.requires_grad and query.shape[2] <= _SHORT
    return tuple(tensor.float() for tensor in part) if short and query.device.type == "cpu" else part


def _window_mask(query: Tensor, window: int | None) -> Tensor | None:
    """(1, 1, T, T), true where one of `window` tokens is attended to; None where a causal mask says the same."""
    length = query.shape[2]
    if window is None or length <= window:
        return None
    return torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - window)[None, None]


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float,
            scaling: float | None, softcap: float | None = None, **kwargs) -> Tensor:
    """(B, heads, T, width) -> (B, T, heads, width): causal where there is no mask."""
    if softcap is None:
        return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, **kwargs)[0]
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = torch.dropout(scores.softmax(-1, dtype=torch.float32).to(value.dtype), dropout, train=True)
    return (weights @ value).transpose(1, 2).contiguous()


def _has_kernel(dtype: torch.dtype) -> bool:
    return dtype in (torch.float16, torch.bfloat16)


def _by_kernel(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scaling: float | None,
               window: int | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # on a GPU alone

    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    ends, longest = bounds[0, 0, 0].contiguous(), bounds.shape[2]
    return varlen_attn(query, key, value, ends, ends, longest, longest, scale=scaling, enable_gqa=True,
                       window_size=(-1 if window is None else window - 1, 0))[None]


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
