"""Whether a model fits its tokenizer and the wanted lengths, as far as its configuration tells."""

from transformers import PretrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from todi.errors import InputError


def check_positions(config: PretrainedConfig, max_length: int, name: str) -> None:
    """Whether a model has positions for texts of `max_length` tokens. Raises InputError when it has not."""
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and max_length > most:
        raise InputError(f"--max-length is {max_length}, but {name} has {most} positions")


def reachable_tokens(tokenizer: Tokenizer) -> list[tuple[int, str]]:
    """Every token that text, padding or the end of a response can give, by its id.

    Other special tokens, such as Gemma's for images in its text-only models, are left out: text never has them.
    """
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    unreachable = special - {tokenizer.pad_token, tokenizer.eos_token}
    return sorted((i, token) for token, i in tokenizer.get_vocab().items() if token not in unreachable)


def check_vocabulary(config: PretrainedConfig, tokenizer: Tokenizer, name: str) -> None:
    """Whether the embedding matrix has a row for every reachable token. Raises InputError when it has not."""
    beyond = [(i, token) for i, token in reachable_tokens(tokenizer) if i >= config.vocab_size]
    if beyond:
        raise InputError(f"{name} has {config.vocab_size} vocabulary entries, but its tokenizer has {len(beyond)} "
                         f"beyond them, the first: {beyond[0][1]!r} is {beyond[0][0]}; take the tokenizer that was "
                         "made for this model")
