"""A causal language model in two parts: the backbone makes hidden states, the linear head makes logits of them."""

from collections.abc import Mapping, Sequence

from peft import PeftModel
from torch import Tensor, nn
from transformers import PretrainedConfig

from todi.criterions import LinearHead
from todi.errors import InputError

# What configurations call what they do to logits.
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
_DIVISORS = ("logits_scaling",)
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def backbone_and_head(model: nn.Module) -> tuple[nn.Module, LinearHead]:
    """Splits a causal language model (LoRA-wrapped or not) into what makes hidden states and its head.

    Returns:
        the backbone, whose `last_hidden_state` (B, T, H) feeds the head, and the head: its (V, H) weight is
        the model's own parameter, with the logit scale and soft-capping that the config asks for
        (Granite divides by `logits_scaling`, Cohere multiplies by `logit_scale`, Gemma caps at
        `final_logit_softcapping`). `todi.models.probe` finds out whether it asks for something else.
    """
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    config = model.config
    projection = model.get_output_embeddings()
    if projection is None or projection.weight.ndim != 2:
        raise InputError(f"{type(model).__name__} has no linear language-model head")
    scale = _first(config, _MULTIPLIERS) or 1.0 / (_first(config, _DIVISORS) or 1.0)
    head = LinearHead(projection.weight, getattr(projection, "bias", None), softcap=_first(config, _CAPS), scale=scale)
    backbone = model.base_model
    return getattr(model, "model", model) if backbone is model else backbone, head  # Llama 4's goes by another name


def _first(config: PretrainedConfig, names: Sequence[str]) -> float | None:
    return next((value for name in names if (value := getattr(config, name, None))), None)


def layers_name(model: nn.Module) -> str:
    """The dotted name of the list of transformer layers, such as `model.layers` or `transformer.h`."""
    count = model.config.num_hidden_layers
    names = [name for name, module in model.named_modules()
             if isinstance(module, nn.ModuleList) and len(module) == count]
    if not names:
        raise InputError(f"{type(model).__name__} has no list of {count} layers")
    return min(names, key=len)


def labelled_rows(backbone: nn.Module, inputs: Mapping[str, Tensor], rows: Tensor) -> Tensor:
    """Last hidden states of some positions of a batch.

    Args:
        inputs: that the backbone is called with; `input_ids` (B, T) is one.
        rows: (N,) positions in the flattened (B * T) batch.

    Returns:
        (N, H), after the final norm.
    """
    return labelled_layers(backbone, inputs, rows, ())[0]


def labelled_layers(backbone: nn.Module, inputs: Mapping[str, Tensor], rows: Tensor,
                    layers: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
    """What `labelled_rows` returns, and the outputs (N, H) of some layers, by their number, counted from 1.

    The last layer's is taken after the final norm.
    """
    wanted = {"output_hidden_states": True} if layers else {}
    output = backbone(**inputs, use_cache=False, **wanted)
    return (output.last_hidden_state.flatten(0, 1)[rows],
            {layer: output.hidden_states[layer].flatten(0, 1)[rows] for layer in layers})
