"""Whether a model fits its adapter, its tokenizer and the wanted lengths, as far as its configuration tells."""

import re

from safetensors import safe_open
from transformers import PretrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from todi.errors import InputError
from todi.models.loading import empty_model, find_adapter

_LORA_WEIGHT = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<part>[AB])(\.\w+)?\.weight")


def check_adapter(path: str, config: PretrainedConfig, model_path: str, trust_remote_code: bool = False) -> None:
    """Whether the LoRA adapter at `path` fits a model of this configuration; reads no weights of the model.

    Raises:
        InputError: there is no adapter, or it was made for another model.
    """
    file = find_adapter(path) / "adapter_model.safetensors"
    if not file.is_file():
        raise InputError(f"no LoRA adapter at {path}: {file.name} is not there")
    shapes = {name: tuple(weight.shape)
              for name, weight in empty_model(config, trust_remote_code).named_parameters()}
    with safe_open(file, "pt") as weights:
        for key in weights.keys():  # noqa: SIM118, it is no dict
            found = _LORA_WEIGHT.fullmatch(key)
            if found is None:
                continue
            # A is (rank, in) and B (out, rank); a layer's weight is (out, in), or (in, out) in GPT-2.
            size = weights.get_slice(key).get_shape()[1 if found["part"] == "A" else 0]
            if size not in shapes.get(f"{found['layer']}.weight", ()):
                raise InputError(f"the LoRA adapter at {path} was made for another model than {model_path}: its "
                                 f"{found['layer']} has {size} {'inputs' if found['part'] == 'A' else 'outputs'}, the "
                                 f"model's weight there is {shapes.get(found['layer'] + '.weight', 'missing')}")


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
