"""Decoding responses in batches: one prefill for equal prompts, a KV cache, finished rows dropped.

    keys = [stream_key("dolly", seed, example) for example in range(len(prompts))]
    responses = generate(model, prompts, keys, decoding=Decoding(), eos_ids={2}, pad_id=2, batch_size=16)
"""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from weakref import WeakSet

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from todi.data.records import Record
from todi.data.tokenize import end_id
from todi.errors import InputError
from todi.generation.beam import beam_search
from todi.generation.blocks import BlockContinuation, attention_over_blocks, can_use_blocks
from todi.generation.continuation import Continuation, base_model
from todi.generation.sampling import RepetitionBan, draw, next_token_probabilities, uniforms
from todi.models.loading import refusing
from todi.models.packing import short_windows
from todi.models.probe import evaluating, probe_tokens, relative_error
from todi.runtime.whereabouts import HERE, at

logger = logging.getLogger(__name__)

# Finished rows are dropped once no more than this share is live: dropping copies the cache, keeping computes in vain.
_WORTH_DROPPING = 0.9
_PROBED = (0.5, 0.25, 0.75)  # places in the vocabulary of the tokens that `check_decoding` tries
_WITHOUT_PADDING: WeakSet[PreTrainedModel] = WeakSet()  # models that padding reaches, as `check_decoding` found out


@dataclass(frozen=True)
class Decoding:
    """How a response is written. The defaults are those of the published training runs on dev.

    Attributes:
        max_length: most tokens of prompt and response together.
        max_new_tokens: most tokens of a response.
        max_prompt_length: most tokens of a prompt; `todi.data.tokenize.encode_prompts` cuts to it.
        do_sample: False takes the most likely token or the best beam, and the next three do nothing.
        top_p: 1 is off.
        top_k: 0 is off.
        no_repeat_ngram_size: n-grams of this size occur once only, prompt included; 0 is off.
        num_beams: of the beam search, without `do_sample`; 1 is greedy.
    """

    max_length: int = 512
    max_new_tokens: int = 256
    max_prompt_length: int = 256
    do_sample: bool = True
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    no_repeat_ngram_size: int = 0
    num_beams: int = 1

    def longest_response(self, prompt_length: int) -> int:
        """Most tokens of a response to a prompt of this length."""
        return min(self.max_new_tokens, self.max_length - prompt_length)


@dataclass(frozen=True)
class Response:
    """Token ids without the closing EOS, and whether the length limit cut it off before one came."""

    ids: list[int]
    cut: bool


def stop_ids(model: PreTrainedModel | PeftModel, tokenizer: Tokenizer, records: Iterable[Record]) -> frozenset[int]:
    """Every token that ends a response: the tokenizer's EOS, that of `records`, and the generation settings'."""
    theirs = model.generation_config.eos_token_id
    ends = {end_id(record, tokenizer) for record in records}
    return frozenset([tokenizer.eos_token_id, *ends, *(theirs if isinstance(theirs, list) else [theirs])]) - {None}


def to_texts(responses: Sequence[Response], tokenizer: Tokenizer) -> list[str]:
    """The responses as they are scored: without special tokens and surrounding space."""
    return _as_texts(responses, tokenizer, str.strip)


def to_training_texts(responses: Sequence[Response], tokenizer: Tokenizer) -> list[str]:
    """The responses as they are learnt: without special tokens, but with the space that the model wrote around them."""
    return _as_texts(responses, tokenizer, str, clean_up_tokenization_spaces=False)


def _as_texts(responses: Sequence[Response], tokenizer: Tokenizer, trim: Callable[[str], str],
              **options: bool) -> list[str]:
    texts = tokenizer.batch_decode([response.ids for response in responses], skip_special_tokens=True, **options)
    # half a character, which a vocabulary may have, can be written to no file
    return [trim(text).encode("utf-8", "replace").decode("utf-8") for text in texts]


@torch.no_grad()  # not inference_mode: a model that is in training must not be left with inference tensors
def generate(model: nn.Module, prompts: Sequence[Sequence[int]], stream_keys: Sequence[int], *,
             decoding: Decoding, eos_ids: Collection[int], pad_id: int, batch_size: int,
             progress: Callable[[int], object] | None = None) -> list[Response]:
    """Continues each prompt; in evaluation mode, which is undone at the end.

    A row is a prompt and the key of its random stream. For several samples of a prompt, give it several times
    with different keys: equal prompts that meet in a batch share one prefill. The text of a row does not
    depend on batch size, order or other rows, but for a decision so close that the model's rounding turns it.

    Args:
        model: a causal language model, LoRA-wrapped or not, on the device where it shall run.
        prompts: token ids of each row, at least one and fewer than `decoding.max_length`.
        stream_keys: one a row, from `stream_key`.
        batch_size: most rows decoded together.
        progress: called with the number of rows that have been finished since the last call.

    Returns:
        one response a row, in the order of `prompts`.

    Raises:
        ValueError: a prompt is empty or leaves no room for a response.
    """
    if any(not 0 < len(prompt) < decoding.max_length for prompt in prompts):
        raise ValueError(f"prompts must have 1 to {decoding.max_length - 1} tokens")
    rows = [_Row(tuple(prompt), key, decoding.longest_response(len(prompt)))
            for prompt, key in zip(prompts, stream_keys, strict=True)]
    # By length for little padding; the longest first, so that memory runs out now or never; equal ones together.
    order = sorted(rows, key=lambda row: (len(row.prompt), row.prompt), reverse=True)
    progress = progress or (lambda finished: None)
    with at("generation"), evaluating(model):
        if decoding.num_beams > 1:
            _search(model, order, decoding, eos_ids, pad_id, batch_size, progress)
        else:
            with attention_over_blocks(base_model(model)):
                pad = None if base_model(model) in _WITHOUT_PADDING else pad_id
                for batch in _batches(order, batch_size, padded=pad is not None):
                    _decode_batch(model, batch, decoding, eos_ids, pad, progress)
    return [Response(row.written, cut=not row.ended) for row in rows]


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
            _WITHOUT_PADDING.discard(base)
            return
    with refusing(f"{name} cannot be decoded"):
        without_padding = error(slice(3), None)
    if not without_padding < most:
        raise InputError(f"{name} cannot be decoded in batches: with other prompts beside it, it continues a prompt "
                         f"otherwise than alone (logits differ by {without_padding:.1%}). It can be trained with "
                         "--no-eval-gen")
    logger.info("%s does not pass over padding: prompts of one length are decoded together, no others", name)
    _WITHOUT_PADDING.add(base)


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
        text = _begin(model, prompts, pad_id, max_length=16)
        for places in ([0, 1, 2], [0, 2]):
            text.keep(places)
            text.extend(torch.tensor([added] * len(places), device=device))
            prompts = [(*prompts[place], added) for place in places]
            alone = [model(input_ids=torch.tensor([prompt], device=device)).logits[:, -1] for prompt in prompts]
            errors.append(relative_error(text.logits.float(), torch.cat(alone).float()))
    return max(errors)


@dataclass
class _Row:
    prompt: tuple[int, ...]
    key: int
    limit: int
    written: list[int] = field(default_factory=list)
    ended: bool = False

    @property
    def finished(self) -> bool:
        return self.ended or len(self.written) == self.limit

    def take(self, token: int, eos_ids: Collection[int]) -> None:
        """Adds a token, unless the row is finished."""
        if self.finished:
            return
        if token in eos_ids:
            self.ended = True
        else:
            self.written.append(token)


def _batches(rows: Sequence[_Row], size: int, padded: bool) -> Iterator[Sequence[_Row]]:
    """Rows that are decoded together: neighbours, of one length where they may not be `padded`."""
    for _, equal in groupby(rows, key=lambda row: padded or len(row.prompt)):
        group = list(equal)
        yield from (group[start:start + size] for start in range(0, len(group), size))


def _search(model: nn.Module, rows: Sequence[_Row], decoding: Decoding, eos_ids: Collection[int], pad_id: int,
            batch_size: int, progress: Callable[[int], object]) -> None:
    """Writes all of `rows` by beam search."""
    found = beam_search(model, [row.prompt for row in rows], [row.limit for row in rows],
                        num_beams=decoding.num_beams, no_repeat_ngram_size=decoding.no_repeat_ngram_size,
                        eos_ids=eos_ids, pad_id=pad_id, batch_size=batch_size, progress=progress)
    for row, tokens in zip(rows, found, strict=True):
        for token in tokens:
            row.take(token, eos_ids)


def _decode_batch(model: nn.Module, rows: Sequence[_Row], decoding: Decoding, eos_ids: Collection[int],
                  pad_id: int | None, progress: Callable[[int], object]) -> None:
    """Writes all of `rows` to their ends."""
    text = _begin(model, [row.prompt for row in rows], pad_id, decoding.max_length)
    ban = RepetitionBan(decoding.no_repeat_ngram_size, [row.prompt for row in rows])
    steps = max(row.limit for row in rows)
    numbers = _random_numbers([row.key for row in rows], steps, text.logits) if decoding.do_sample else None
    live, unfinished = list(rows), len(rows)
    for step in range(steps):
        tokens = _choose(ban(text.logits), decoding, None if numbers is None else numbers[:, step])
        ids = tokens.tolist()
        ban.append(ids)
        for row, token in zip(live, ids, strict=True):
            row.take(token, eos_ids)
        HERE.tick()
        going = [place for place, row in enumerate(live) if not row.finished]
        progress(unfinished - len(going))
        unfinished = len(going)
        if not going:
            return
        if len(going) <= _WORTH_DROPPING * len(live):
            live, tokens = [live[place] for place in going], tokens[going]
            numbers = None if numbers is None else numbers[going]
            text.keep(going)
            ban.keep(going)
        text.extend(tokens)


def _begin(model: nn.Module, prompts: Sequence[tuple[int, ...]], pad_id: int | None,
           max_length: int) -> Continuation | BlockContinuation:
    continuation = BlockContinuation if can_use_blocks(base_model(model)) else Continuation
    return continuation(model, prompts, pad_id, max_length)


def _random_numbers(keys: Sequence[int], steps: int, logits: Tensor) -> Tensor:
    """(B, steps, levels) on the device of the logits."""
    return torch.stack([uniforms(key, steps, logits.shape[1]) for key in keys]).to(logits.device)


def _choose(logits: Tensor, decoding: Decoding, numbers: Tensor | None) -> Tensor:
    if numbers is None:
        return logits.argmax(-1)
    probabilities = next_token_probabilities(logits, decoding.temperature, decoding.top_k, decoding.top_p)
    return draw(probabilities, numbers)

