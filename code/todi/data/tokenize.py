"""Records -> token ids, by one rule for training and for evaluation."""

import hashlib
import logging
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase as Tokenizer

from todi.data.records import Record
from todi.errors import InputError
from todi.models.families import Family
from todi.models.tokenizers import start_ids

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """One tokenised record: prompt, response, and EOS unless it was cut off by the total length.

    Attributes:
        ids: token ids of prompt and response together.
        prompt_length: how many of them are the prompt.
        sample_id: its place among the samples of a run, by which a teacher cache knows it; -1 for one that has none.
            Texts that the student writes are numbered from the last of these on.
        own: whether the student wrote the response.
    """

    ids: tuple[int, ...]
    prompt_length: int
    sample_id: int = -1
    own: bool = False

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.ids[:self.prompt_length]

    @property
    def response_tokens(self) -> int:
        """Positions that carry loss."""
        return len(self.ids) - self.prompt_length


def encode_prompts(records: Sequence[Record], tokenizer: Tokenizer, family: Family,
                   max_prompt_length: int) -> list[list[int]]:
    """Token ids of each prompt, behind the family's `start_ids`, cut to its first `max_prompt_length` tokens.

    Raises:
        InputError: the tokenizer makes no token of a prompt, so that nothing could be continued.
    """
    start = start_ids(tokenizer, family)
    encoded = tokenizer([record.prompt for record in records], add_special_tokens=False)["input_ids"]
    # A chat template writes them itself; one of a family that cannot do without may have left them out.
    prompts = [list(ids) if ids[:len(start)] == start or (record.messages and family.prepend_bos is None)
               else start + list(ids) for record, ids in zip(records, encoded, strict=True)]
    empty = [number for number, ids in enumerate(prompts, 1) if not ids]
    if empty:
        raise InputError(f"the tokenizer of {tokenizer.name_or_path} makes no token of the prompts of {len(empty)} "
                         f"records, the first: {records[empty[0] - 1].prompt!r} (number {empty[0]})")
    _log_cut("prompts", sum(len(ids) > max_prompt_length for ids in prompts), len(prompts), max_prompt_length)
    return [ids[:max_prompt_length] for ids in prompts]


def encode_examples(records: Sequence[Record], tokenizer: Tokenizer, family: Family, max_length: int,
                    max_prompt_length: int) -> list[Example]:
    """Prompt and first reference of each record, closed by its end (EOS), cut to `max_length` tokens in all.

    Of a record without a reference there is the prompt alone.
    """
    prompts = encode_prompts(records, tokenizer, family, max_prompt_length)
    texts = [record.references[0] if record.references else "" for record in records]
    responses = tokenizer(texts, add_special_tokens=False)["input_ids"]
    whole = [(*prompt, *response, end_id(record, tokenizer)) if record.references else tuple(prompt)
             for prompt, response, record in zip(prompts, responses, records, strict=True)]
    _log_cut("samples", sum(len(ids) > max_length for ids in whole), len(whole), max_length)
    return [Example(ids[:max_length], len(prompt), sample_id)
            for sample_id, (ids, prompt) in enumerate(zip(whole, prompts, strict=True))]


def examples_checksum(examples: Sequence[Example]) -> str:
    """SHA-256 of all token ids and of where each response begins, in hexadecimal."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(array("q", (len(example.ids), example.prompt_length, *example.ids)).tobytes())
    return digest.hexdigest()


def end_id(record: Record, tokenizer: Tokenizer) -> int:
    """The token that ends the response of `record`."""
    return tokenizer.convert_tokens_to_ids(record.end) if record.end else tokenizer.eos_token_id


def _log_cut(what: str, cut: int, of: int, limit: int) -> None:
    if cut:
        logger.info("%d of %d %s are longer than %d tokens and were cut", cut, of, what, limit)
