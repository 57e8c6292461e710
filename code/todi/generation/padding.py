"""Whether padding reaches what a model writes, found out by continuing a few prompts together."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from todi.errors import InputError
from todi.generation.beginning import begin
from todi.generation.blocks import attention_over_blocks
from todi.generation.continuation import base_model
from todi.models.loading import refusing
from todi.models.packing import short_windows
from todi.models.probe import evaluating, probe_tokens, relative_error

logger = logging.getLogger(__name__)

WITHOUT_PADDING: WeakSet[PreTrainedModel] = WeakSet()  # models that padding reaches, as `check_decoding` found out
_PROBED = (0.5, 0.25, 0.75)  # places in the vocabulary of the tokens that it tries


def check_decoding(model: nn.Module, name: str, pad_id: int) -> None:
    """Finds out, once, whether a model continues prompts in a batch as it continues each alone.

    `generate` will put prompts of one length alone into a batch where padding reaches what the model writes.

    Raises:
        InputError: it does not do so either, or cannot be decoded at all.
    """
    base = base_model(model)
    vocabulary = model.get_input_embeddings().num_embeddings
    most = 0.1 if base.dtype != torch.float32 else 1e-3  # experts are chosen anew, by rounding too

    def error(cut: slice, pad_id: int | None) -> float:
        # what rounding makes of a few tokens differs; what a model does wrong it does with all of them
        return min(_error_of_a_batch(model, probe_tokens(vocabulary, share), cut, pad_id) for share in _PROBED)

    with suppress(Exception):  # what it does with padding is not to be foretold
        if error(slice(None), pad_id) < most:
            WITHOUT_PADDING.discard(base)
            return
    with refusing(f"{name} cannot be decoded"):
        without_padding = error(slice(3), None)
    if not without_padding < most:
        raise InputError(f"{name} cannot be decoded in batches: with other prompts beside it, it continues a prompt "
                         f"otherwise than alone (logits differ by {without_padding:.1%}). It can be trained with "
                         "--no-eval-gen")
    logger.info("%s does not pass over padding: prompts of one length are decoded together, no others", name)
    WITHOUT_PADDING.add(base)


@torch.no_grad()
def _error_of_a_batch(model: nn.Module, ids: Sequence[int], cut: slice, pad_id: int | None) -> float:
    """Relative error of the logits of some prompts that are continued together, windows being shorter than they.

    Args:
        ids: at least 8 tokens, of which the prompts are made.
        cut: what is left of each prompt.
    """
    device, errors, added = next(model.parameters()).device, [], ids[6]
    prompts = [tuple(part[cut]) for part in (ids[:8], ids[1:5], ids[2:5])]
    with evaluating(model), short_windows(base_model(model)), attention_over_blocks(base_model(model)):
        text = begin(model, prompts, pad_id, max_length=16)
        for places in ([0, 1, 2], [0, 2]):
            text.keep(places)
            text.extend(torch.tensor([added] * len(places), device=device))
            prompts = [(*prompts[place], added) for place in places]
            errors.append(_error(model, prompts, text.logits))
        if text.can_be_added_to:
            late = tuple(ids[3:7][cut])
            text.add([late])
            text.extend(torch.tensor([added] * 3, device=device))
            errors.append(_error(model, [(*prompt, added) for prompt in (*prompts, late)], text.logits))
    return max(errors)


def _error(model: nn.Module, prompts: Sequence[tuple[int, ...]], logits: Tensor) -> float:
    """Relative error of the logits (B, V) of the tokens that follow `prompts`, by each alone."""
    alone = [model(input_ids=torch.tensor([prompt], device=logits.device)).logits[:, -1] for prompt in prompts]
    return relative_error(logits.float(), torch.cat(alone).float())
