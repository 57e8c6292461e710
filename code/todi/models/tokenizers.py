"""Whether a teacher and a student read text as the same token ids: distillation compares them entry by entry. And
what a sequence starts with."""

import json
from itertools import zip_longest

from transformers import PreTrainedTokenizerBase as Tokenizer

from todi.errors import InputError
from todi.models.families import Family
from todi.runtime.checksums import value_checksum


def tokenizer_difference(student: Tokenizer, teacher: Tokenizer) -> str | None:
    """What makes two tokenizers encode differently, in words, or None when they encode alike.

    Vocabulary, merges, normalisation, splitting and EOS are compared, names and padding are not. A padded
    embedding matrix of another size is no difference: the loss crops logits to the common part.
    """
    differing = _vocabulary_difference(student.get_vocab(), teacher.get_vocab())
    if differing:
        return f"vocabulary ({differing})"
    ours, theirs = pipeline(student), pipeline(teacher)
    parts = [_part_difference(part, ours[part], theirs[part]) for part in ours.keys() & theirs.keys()
             if ours[part] != theirs[part]]
    if parts:
        return " and ".join(sorted(parts))
    if student.eos_token_id != teacher.eos_token_id:
        return f"EOS token (student {student.eos_token!r}, teacher {teacher.eos_token!r})"
    return None


def _vocabulary_difference(student: dict[str, int], teacher: dict[str, int]) -> str | None:
    if student == teacher:
        return None
    differing = sorted(token for token in student.keys() | teacher.keys()
                       if student.get(token) != teacher.get(token))
    examples = "; ".join(f"{token!r} is {student.get(token, 'absent')} in the student and "
                         f"{teacher.get(token, 'absent')} in the teacher" for token in differing[:3])
    return f"{len(differing)} entries, the first: {examples}"


def _part_difference(part: str, student: object, teacher: object) -> str:
    if part != "merges":
        return f"{part} (student {student}, teacher {teacher})"
    pairs = enumerate(zip_longest(student or [], teacher or [], fillvalue="absent"))
    first, (ours, theirs) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
    return f"merges (the first: number {first} is {ours} in the student and {theirs} in the teacher)"


def pipeline(tokenizer: Tokenizer) -> dict[str, object]:
    """The steps of a fast tokenizer that decide how text is cut; nothing to compare for a slow one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {}
    parts = json.loads(backend.to_str())
    return {"merges": parts["model"].get("merges"), "normalizer": parts["normalizer"],
            "pre_tokenizer": parts["pre_tokenizer"]}


def tokenizer_checksum(tokenizer: Tokenizer) -> str:
    """Of all that `tokenizer_difference` compares: tokenizers that encode alike have the same."""
    return value_checksum([sorted(tokenizer.get_vocab().items()), pipeline(tokenizer), tokenizer.eos_token_id])


def start_ids(tokenizer: Tokenizer, family: Family) -> list[int]:
    """The token ids that every sequence starts with: BOS, none, or those that the tokenizer itself puts there.

    Raises:
        InputError: the tokenizer has no BOS token though the family starts with one, or alters the text behind it.
    """
    if family.prepend_bos is None:
        text = "a text"
        bare, whole = (tokenizer(text, add_special_tokens=special)["input_ids"] for special in (False, True))
        starts = [place for place in range(len(whole)) if whole[place:place + len(bare)] == bare]
        if not starts:
            raise InputError(f"the tokenizer of {tokenizer.name_or_path} reads a text otherwise when it adds special "
                             f"tokens: {whole}, without them {bare}")
        return whole[:starts[0]]
    if family.prepend_bos and tokenizer.bos_token_id is None:
        raise InputError(f"the tokenizer of {tokenizer.name_or_path} has no BOS token, and a {family.architecture} "
                         "model starts with one")
    return [tokenizer.bos_token_id] if family.prepend_bos else []
