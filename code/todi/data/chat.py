"""Chat data -> prompts, by the tokenizer's own chat template."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase as Tokenizer

from todi.data.records import Message, Record
from todi.errors import InputError


def render(records: Sequence[Record], tokenizer: Tokenizer, source: str | Path) -> list[Record]:
    """Fills in `prompt` and `end` of chat records; others stay as they are.

    The prompt is the templated conversation up to where the assistant's last message begins, and the response ends
    with the token that the template puts behind that message.

    Args:
        source: where the records are from, for error messages.

    Raises:
        InputError: the tokenizer has no chat template, or it refuses a conversation.
    """
    if not any(record.messages for record in records):
        return list(records)
    if not tokenizer.chat_template:
        raise InputError(f"{source} has `messages`, but the tokenizer of {tokenizer.name_or_path} has no chat "
                         "template; give `prompt` and `output`, or take a model with a template")
    end = _end(tokenizer)
    rendered = []
    for number, record in enumerate(records, 1):
        try:
            rendered.append(dataclasses.replace(record, prompt=_prompt(tokenizer, record.messages), end=end))
        except TemplateError as error:
            raise InputError(f"{source}: the chat template of {tokenizer.name_or_path} refuses conversation {number}: "
                             f"{error}") from None
    return rendered


def render_sets(sets: Sequence[Sequence[Record]], tokenizer: Tokenizer, files: Sequence[Path]) -> list[list[Record]]:
    """`render` for each of several sets, which come from these files."""
    return [render(records, tokenizer, file) for records, file in zip(sets, files, strict=True)]


def _prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
    return tokenizer.apply_chat_template([*map(dataclasses.asdict, messages)], tokenize=False,
                                         add_generation_prompt=True)


def _end(tokenizer: Tokenizer) -> str:
    """The added token behind a message of the assistant's; EOS where the template has none."""
    question = [{"role": "user", "content": "question"}]
    whole = tokenizer.apply_chat_template([*question, {"role": "assistant", "content": "answer"}], tokenize=False)
    behind = whole[whole.rindex("answer") + len("answer"):].lstrip()
    added = [token for token in tokenizer.get_added_vocab() if behind.startswith(token)]
    return max(added, key=len, default=tokenizer.eos_token)
