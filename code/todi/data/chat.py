"""Chat data -> prompts, by the tokenizer's own chat template."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase as Tokenizer

from todi.data.records import Message, Record, check_text
from todi.data.template_date import TemplateDate
from todi.errors import InputError

logger = logging.getLogger(__name__)

_PROBE = "What is said here, word by word."  # stands for a message, to see what a template makes of it


def render(records: Sequence[Record], tokenizer: Tokenizer, source: str | Path,
           date: TemplateDate | None = None) -> list[Record]:
    """Fills in `prompt` and `end` of chat records; others stay as they are.

    The prompt is the templated conversation up to where the assistant's last message begins, and the response ends
    with the token that the template puts behind that message.

    Args:
        source: where the records are from, for error messages.
        date: that the template may write; today's when not given.

    Raises:
        InputError: the tokenizer has no chat template, or it refuses a conversation or changes what is said in it.
    """
    if not any(record.messages for record in records):
        return list(records)
    if not tokenizer.chat_template:
        raise InputError(f"{source} has `messages`, but the tokenizer of {tokenizer.name_or_path} has no chat "
                         "template; give `prompt` and `output`, or take a model with a template")
    with (date or TemplateDate()).in_force():
        return _render(records, tokenizer, source)


def render_sets(sets: Sequence[Sequence[Record]], tokenizer: Tokenizer, files: Sequence[Path],
                date: TemplateDate) -> list[list[Record]]:
    """`render` for each of several sets, which come from these files."""
    return [render(records, tokenizer, file, date) for records, file in zip(sets, files, strict=True)]


def _render(records: Sequence[Record], tokenizer: Tokenizer, source: str | Path) -> list[Record]:
    ends: dict[frozenset[str], str] = {}  # by who speaks
    rendered = []
    for number, record in enumerate(records, 1):
        roles = frozenset(message.role for message in record.messages)
        try:
            prompt = _prompt(tokenizer, record.messages)
            if roles not in ends:
                _check_all_is_said(tokenizer, record.messages, prompt)
                ends[roles] = _end(tokenizer, record.messages, prompt)
            rendered.append(dataclasses.replace(record, prompt=prompt, end=ends[roles]))
        except Exception as error:  # a template is a program: whatever it raises is its way to refuse
            raise InputError(f"{source}: the chat template of {tokenizer.name_or_path} refuses conversation {number}: "
                             f"{_in_a_line(error)}") from None
    return rendered


def _prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
    prompt = _apply(tokenizer, messages, add_generation_prompt=True)
    if not prompt.strip():
        raise ValueError("it makes an empty prompt of it")
    check_text("what it makes of it", prompt)
    return prompt


def _check_all_is_said(tokenizer: Tokenizer, messages: Sequence[Message], prompt: str) -> None:
    """Raises ValueError where it makes no difference to the prompt what one of the messages says."""
    for place, message in enumerate(messages):
        other = [*messages[:place], dataclasses.replace(message, content=_PROBE), *messages[place + 1:]]
        if message.content != _PROBE and _apply(tokenizer, other, add_generation_prompt=True) == prompt:
            raise ValueError(f"it leaves out what the {message.role} says")


def _end(tokenizer: Tokenizer, messages: Sequence[Message], prompt: str) -> str:
    """The added token behind a message of the assistant's; EOS where the template has none.

    Raises:
        ValueError: the template does not say what the assistant says.
    """
    whole = _apply(tokenizer, [*messages, Message("assistant", _PROBE)])
    before, found, behind = whole.rpartition(_PROBE)
    if not found:
        raise ValueError("it leaves out or changes what the assistant says, so that no response could be learnt")
    between = before.removeprefix(prompt) if before.startswith(prompt) else ""
    if between.strip():
        logger.warning("warning: the chat template of %s writes %r before a response, but not at the end of a prompt: "
                       "responses are learnt and written without it", tokenizer.name_or_path, between)
    added = [token for token in tokenizer.get_added_vocab() if behind.lstrip().startswith(token)]
    return max(added, key=len, default=tokenizer.eos_token)


def _apply(tokenizer: Tokenizer, messages: Sequence[Message], **options: bool) -> str:
    return tokenizer.apply_chat_template([*map(dataclasses.asdict, messages)], tokenize=False, **options)


def _in_a_line(error: Exception) -> str:
    kind = "" if isinstance(error, TemplateError | ValueError) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())[:300]
