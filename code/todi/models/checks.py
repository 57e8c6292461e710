"""Whether a model fits its tokenizer, the wanted lengths and the loss, as far as its configuration tells."""

from transformers import PretrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from todi.errors import InputError
from todi.models.loading import empty_model

# Settings that add to a model's own training loss: what, and the names of its factor where that is another setting.
_FURTHER_LOSSES = {
    "output_router_logits": ("the load-balancing loss of its router", ("router_aux_loss_coef", "aux_loss_coef")),
    "z_loss_coefficient": ("a z-loss", ()),
}


def check_architecture(config: PretrainedConfig, name: str, trained: bool = False,
                       trust_remote_code: bool = False) -> None:
    """Whether a model sees earlier tokens alone and, where it is `trained`, asks for no loss but the cross-entropy.

    Raises:
        InputError: it does not; `todi.models.probe` finds out about a loaded model what its configuration does not say.
    """
    causal = {module.is_causal for module in empty_model(config, trust_remote_code).modules()
              if hasattr(module, "is_causal")}
    if causal == {False}:
        raise InputError(f"{name}: a {config.model_type} model of this configuration attends to later tokens, so it "
                         "cannot be trained to predict them (is_decoder, bidirectional attention)")
    for setting, (loss, coefficients) in _FURTHER_LOSSES.items() if trained else ():
        if getattr(config, setting, None) and all(getattr(config, factor, None) != 0 for factor in coefficients):
            raise InputError(f"{name}: its configuration asks for {loss} besides the cross-entropy ({setting} is "
                             f"{getattr(config, setting)}), which is not computed here; set it to false or 0 to train "
                             "without it")


def check_checkpointing(config: PretrainedConfig, name: str, trust_remote_code: bool = False) -> None:
    """Whether activations of such a model can be recomputed. Raises InputError where they cannot."""
    kind = type(empty_model(config, trust_remote_code))
    if not kind.supports_gradient_checkpointing:
        raise InputError(f"--gradient-checkpointing: a {kind.__name__}, as {name} is, cannot recompute activations")


def check_positions(config: PretrainedConfig, max_length: int, name: str) -> None:
    """Whether a model has positions for texts of `max_length` tokens. Raises InputError when it has not."""
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and 0 < most < max_length:  # XLNet's -1 is no limit
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
