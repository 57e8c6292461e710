"""Beam search, which is transformers' own: it is for a few comparisons, and no random stream or speed hangs on it."""

from collections.abc import Callable, Collection, Sequence
from itertools import groupby

import torch
from peft import PeftModel
from torch import nn
from transformers import GenerationConfig

from todi.runtime.whereabouts import HERE


def beam_search(model: nn.Module, prompts: Sequence[Sequence[int]], limits: Sequence[int], *, num_beams: int,
                no_repeat_ngram_size: int, eos_ids: Collection[int], pad_id: int, batch_size: int,
                progress: Callable[[int], object]) -> list[list[int]]:
    """The best of `num_beams` continuations of each prompt, by mean log-probability of a token, EOS included.

    Prompts share a batch when they are of equal length, so that nothing is padded.

    Args:
        limits: most tokens of each continuation, the same for prompts of equal length.
        batch_size: most continuations searched together.
        progress: called with the number of prompts that have been finished since the last call.

    Returns:
        token ids without the prompt, as transformers' `generate` gives them: behind EOS there may be padding.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    settings = GenerationConfig(do_sample=False, num_beams=num_beams, no_repeat_ngram_size=no_repeat_ngram_size,
                                eos_token_id=sorted(eos_ids) or None, pad_token_id=pad_id)
    # generate() would fill what `settings` leaves open from the model's own settings, a repetition penalty say.
    theirs, base.generation_config = base.generation_config, settings
    found: dict[int, list[int]] = {}
    try:
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]), reverse=True)
        for length, equal in groupby(order, key=lambda place: len(prompts[place])):
            places, size = list(equal), max(1, batch_size // num_beams)
            settings.max_length = length + limits[places[0]]
            for batch in (places[start:start + size] for start in range(0, len(places), size)):
                ids = torch.tensor([list(prompts[place]) for place in batch], device=next(model.parameters()).device)
                written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
                found |= dict(zip(batch, written[:, length:].tolist(), strict=True))
                progress(len(batch))
                HERE.tick()
    finally:
        base.generation_config = theirs
    return [found[place] for place in range(len(prompts))]
