"""A causal language model in two parts: the backbone makes hidden states, the linear head makes logits of them."""

from collections.abc import Sequence

import torch
from peft import PeftModel
from torch import Tensor, nn

from todi.criterions import LinearHead
from todi.errors import InputError
from todi.models.loading import refusing
from todi.runtime.device import name_of


def backbone_and_head(model: nn.Module) -> tuple[nn.Module, LinearHead]:
    """Splits a causal language model (LoRA-wrapped or not) into what makes hidden states and its head.

    Returns:
        the backbone, whose `last_hidden_state` (B, T, H) feeds the head, and the head: its (V, H) weight is
        the model's own parameter, with the logit scale and soft-capping that the config asks for
        (Granite divides by `logits_scaling`, Cohere multiplies by `logit_scale`, Gemma caps at
        `final_logit_softcapping`).
    """
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    config = model.config
    projection = model.get_output_embeddings()
    if projection is None or projection.weight.ndim != 2:
        raise InputError(f"{type(model).__name__} has no linear language-model head")
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    head = LinearHead(projection.weight, getattr(projection, "bias", None),
                      softcap=getattr(config, "final_logit_softcapping", None), scale=scale)
    return model.base_model, head


@torch.no_grad()
def check_head(model: nn.Module, name: str) -> None:
    """Compares backbone + head with the model's own logits on a few tokens, once, when a model is loaded.

    Raises:
        InputError: they differ, so the model does something to its logits that this project does not know; or they
            are not finite, or the model cannot be run.
    """
    backbone, head = backbone_and_head(model)
    was_training = model.training
    model.eval()
    ids = torch.arange(3, 11, device=head.weight.device)[None]
    with refusing(f"{name} cannot be run"):  # some configurations make a model, but none that computes
        logits = model(input_ids=ids).logits.float()
        ours = head(backbone(input_ids=ids).last_hidden_state).float()
    model.train(was_training)
    if not logits.isfinite().all():
        raise InputError(f"{name}: its logits are not finite; its weights are damaged, or too large for "
                         f"{name_of(head.weight.dtype)}")
    error, size = (ours - logits).norm(), logits.norm()  # 0 of a head that is zero
    if not error <= 0.02 * size:  # bf16 alone gives a few thousandths
        raise InputError(f"{name}: logits computed from its hidden states differ from its own by {error / size:.0%}; "
                         "its head is of a kind that is not supported")


def labelled_rows(backbone: nn.Module, input_ids: Tensor, attention_mask: Tensor, rows: Tensor) -> Tensor:
    """Last hidden states of some positions of a batch.

    Args:
        input_ids, attention_mask: (B, T).
        rows: (N,) positions in the flattened (B * T) batch.

    Returns:
        (N, H), after the final norm.
    """
    return labelled_layers(backbone, input_ids, attention_mask, rows, ())[0]


def labelled_layers(backbone: nn.Module, input_ids: Tensor, attention_mask: Tensor, rows: Tensor,
                    layers: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
    """What `labelled_rows` returns, and the outputs (N, H) of some layers, by their number, counted from 1.

    The last layer's is taken after the final norm.
    """
    wanted = {"output_hidden_states": True} if layers else {}
    output = backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **wanted)
    return (output.last_hidden_state.flatten(0, 1)[rows],
            {layer: output.hidden_states[layer].flatten(0, 1)[rows] for layer in layers})
