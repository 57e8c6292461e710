"""Decoding responses together: one prefill for equal prompts, a KV cache, finished rows make room for those that wait.

    keys = [stream_key("dolly", seed, example) for example in range(len(prompts))]
    responses = generate(model, prompts, keys, decoding=Decoding(), eos_ids={2}, pad_id=2, batch_size=16)
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from todi.data.records import Record
from todi.data.tokenize import end_id
from todi.generation.beam import beam_search
from todi.generation.beginning import begin
from todi.generation.blocks import attention_over_blocks
from todi.generation.continuation import base_model
from todi.generation.padding import WITHOUT_PADDING
from todi.generation.sampling import RepetitionBan, Streams, next_token_probabilities
from todi.models.probe import evaluating
from todi.runtime.whereabouts import HERE, at

# Finished rows are dropped once no more than this share is live: dropping copies the cache, keeping computes in vain.
_WORTH_DROPPING = 0.9
# Rows that wait are read in once this share of the places is free: a few prompts at a time are read slowly, and joining
# copies the cache.
_WORTH_READING = 0.25


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
        batch_size: most rows decoded together; one that waits takes the place of one that has ended, if the model's
            cache allows (`Continuation.can_be_added_to`).
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
                pad = None if base_model(model) in WITHOUT_PADDING else pad_id
                for waiting in _alike(order, padded=pad is not None):
                    while waiting:
                        _write_together(model, waiting, decoding, eos_ids, pad, batch_size, progress)
    return [Response(row.written, cut=not row.ended) for row in rows]


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

    def take(self, token: int, eos_ids: Collection[int]) -> bool:
        """Adds a token, unless the row is finished; whether that has finished it."""
        if self.finished:
            return False
        if token in eos_ids:
            self.ended = True
        else:
            self.written.append(token)
        return self.finished


def _alike(rows: Sequence[_Row], padded: bool) -> Iterator[deque[_Row]]:
    """Rows that may be together: all, or where they may not be `padded` those of one length."""
    for _, equal in groupby(rows, key=lambda row: padded or len(row.prompt)):
        yield deque(equal)


def _search(model: nn.Module, rows: Sequence[_Row], decoding: Decoding, eos_ids: Collection[int], pad_id: int,
            batch_size: int, progress: Callable[[int], object]) -> None:
    """Writes all of `rows` by beam search."""
    found = beam_search(model, [row.prompt for row in rows], [row.limit for row in rows],
                        num_beams=decoding.num_beams, no_repeat_ngram_size=decoding.no_repeat_ngram_size,
                        eos_ids=eos_ids, pad_id=pad_id, batch_size=batch_size, progress=progress)
    for row, tokens in zip(rows, found, strict=True):
        for token in tokens:
            row.take(token, eos_ids)


def _write_together(model: nn.Module, waiting: deque[_Row], decoding: Decoding, eos_ids: Collection[int],
                    pad_id: int | None, batch_size: int, progress: Callable[[int], object]) -> None:
    """Writes rows that wait, the first `batch_size` and those that can take the places of such as have ended, until all
    of these have."""
    live = _Live(model, _first(waiting, batch_size), decoding, pad_id)
    while True:
        tokens = live.choose()
        progress(live.take(tokens.tolist(), eos_ids))
        HERE.tick()
        going = [place for place, row in enumerate(live.rows) if not row.finished]
        if not going:
            return
        free = batch_size - len(going)
        reads = bool(waiting) and live.text.can_be_added_to and free >= _WORTH_READING * batch_size
        if reads or len(going) <= _WORTH_DROPPING * len(live.rows):
            live.keep(going)
            tokens = tokens[going]
        live.text.extend(tokens)
        if reads:
            live.add(_first(waiting, free))


def _first(waiting: deque[_Row], most: int) -> list[_Row]:
    """Takes so many of those that wait, or all."""
    return [waiting.popleft() for _ in range(min(most, len(waiting)))]


class _Live:
    """The rows that are written together, and what goes with each: its text, its n-grams, its random numbers."""

    def __init__(self, model: nn.Module, rows: Sequence[_Row], decoding: Decoding, pad_id: int | None):
        self.rows, self._decoding = list(rows), decoding
        prompts = [row.prompt for row in rows]
        self.text = begin(model, prompts, pad_id, decoding.max_length)
        self._ban = RepetitionBan(decoding.no_repeat_ngram_size, prompts)
        self._streams = None
        if decoding.do_sample:
            self._streams = Streams([row.key for row in rows], decoding.longest_response(1), self.text.logits)

    def add(self, rows: Sequence[_Row]) -> None:
        """Reads the prompts of more rows, which come behind those that are there."""
        prompts = [row.prompt for row in rows]
        self.rows += rows
        self.text.add(prompts)
        self._ban.add(prompts)
        if self._streams:
            self._streams.add([row.key for row in rows])

    def keep(self, places: Sequence[int]) -> None:
        """Goes on with the rows at `places`, in ascending order."""
        self.rows = [self.rows[place] for place in places]
        self.text.keep(places)
        self._ban.keep(places)
        if self._streams:
            self._streams.keep(places)

    def choose(self) -> Tensor:
        """The next token (B,) of each row."""
        logits, decoding = self._ban(self.text.logits), self._decoding
        if not self._streams:
            return logits.argmax(-1)
        return self._streams.draw(next_token_probabilities(logits, decoding.temperature, decoding.top_k,
                                                           decoding.top_p))

    def take(self, tokens: Sequence[int], eos_ids: Collection[int]) -> int:
        """Adds its next token to each row; how many rows that has finished."""
        self._ban.append(tokens)
        return sum(row.take(token, eos_ids) for row, token in zip(self.rows, tokens, strict=True))
