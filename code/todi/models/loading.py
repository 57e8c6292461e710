"""From a path or a Hub name to a configuration, a tokenizer, and a causal language model."""

import importlib.util
import logging
import re
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from todi.criterions import LinearHead
from todi.models.families import Family
from todi.options import InputError

logger = logging.getLogger(__name__)

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_LORA_WEIGHT = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<part>[AB])(\.\w+)?\.weight")


def load_config(path: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of a model folder, a .gguf file or a Hub name, without its weights.

    Raises:
        InputError: nothing is there, or it is no model.
    """
    return _load(AutoConfig, path, trust_remote_code)


def load_tokenizer(path: str, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer that lies beside a model, with a pad token (EOS where it has none of its own).

    Raises:
        InputError: nothing is there, or it has no tokenizer or no EOS token.
    """
    tokenizer = _load(AutoTokenizer, path, trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of {path} has no EOS token, so no response could end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # never seen by a loss or by attention: padding is masked
    return tokenizer


def load_model(path: str, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False,
               attention: str | None = None) -> PreTrainedModel:
    """A causal language model on `device` with weights of `dtype`, ready to train and to save.

    Args:
        path: a model folder, a .gguf file (de-quantised), or a Hub name.
        attention: transformers' `attn_implementation`; chosen by `attention_for` when not given.

    Raises:
        InputError: nothing is there, or it is no causal language model.
    """
    model = _load(AutoModelForCausalLM, path, trust_remote_code, dtype=dtype,
                  attn_implementation=attention or attention_for(device, dtype))
    if getattr(model.config, "quantization_config", None) is not None:
        model = _without_quantization(model)
    return model.to(device)


def attention_for(device: torch.device, dtype: torch.dtype) -> str:
    """flash-attention 2 where it is installed and the device and the precision allow it, else sdpa."""
    half = dtype in (torch.float16, torch.bfloat16)
    installed = importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if device.type == "cuda" and half and installed else "sdpa"


def add_lora(model: PreTrainedModel, family: Family, rank: int, alpha: float, dropout: float,
             adapter_path: str | None = None) -> PeftModel:
    """Wraps `model` with a trainable LoRA adapter: a new one, or the one saved at `adapter_path`.

    The adapter's weights are kept in the model's dtype, so that DeepSpeed sees a single one.
    """
    if adapter_path:
        return _load_adapter(model, adapter_path, is_trainable=True)
    lora = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, lora_dropout=dropout,
                      target_modules=list(family.lora_targets) if family.lora_targets else None)
    return get_peft_model(model, lora, autocast_adapter_dtype=False)


def merge_adapter(model: PreTrainedModel, adapter_path: str) -> PreTrainedModel:
    """`model` with the LoRA adapter saved at `adapter_path` merged into its weights."""
    return _load_adapter(model, adapter_path).merge_and_unload()


def backbone_and_head(model: nn.Module) -> tuple[nn.Module, LinearHead]:
    """Splits a causal language model (LoRA-wrapped or not) into what makes hidden states and its head.

    Returns:
        the backbone, whose `last_hidden_state` (B, T, H) feeds the head, and the head: its (V, H) weight is
        the model's own parameter, with the logit scale and soft-capping that the config asks for
        (Granite divides by `logits_scaling`, Cohere multiplies by `logit_scale`, Gemma caps at
        `final_logit_softcapping`).
    """
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    config = model.config.get_text_config()
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
        InputError: they differ, so the model does something to its logits that this project does not know.
    """
    backbone, head = backbone_and_head(model)
    was_training = model.training
    model.eval()
    ids = torch.arange(3, 11, device=head.weight.device)[None]
    logits = model(input_ids=ids).logits.float()
    ours = head(backbone(input_ids=ids).last_hidden_state).float()
    model.train(was_training)
    error = ((ours - logits).norm() / logits.norm()).item()
    if not error < 0.02:  # bf16 alone gives a few thousandths
        raise InputError(f"{name}: logits computed from its hidden states differ from its own by {error:.0%}; "
                         "its head is of a kind that is not supported")


def _load(auto_class, path: str, trust_remote_code: bool, **kwargs):
    """`auto_class.from_pretrained` for all three sources, with one clear error."""
    place = Path(path)
    if place.suffix == ".gguf" and place.is_file():
        source, kwargs = str(place.parent), {**kwargs, "gguf_file": place.name}
    elif place.is_dir() or is_hub_name(path):
        source = path
    else:
        raise InputError(f"no model at {path}: no such folder or .gguf file, and not the form of a Hub name")
    try:
        return auto_class.from_pretrained(source, trust_remote_code=trust_remote_code, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"cannot read {auto_class.__name__[4:]} of {path}: {reason}") from error


def is_hub_name(path: str) -> bool:
    """Whether `path` has the form `name` or `organisation/name` and does not point below a folder here."""
    return bool(_HUB_NAME.fullmatch(path)) and not path.startswith(".") and not Path(path.split("/")[0]).is_dir()


def find_adapter(path: str) -> Path:
    """The folder of a LoRA adapter. Raises InputError when `path` is none."""
    if not (Path(path) / "adapter_config.json").is_file():
        raise InputError(f"no LoRA adapter at {path}: adapter_config.json is not there")
    return Path(path)


def check_adapter(path: str, config: PretrainedConfig, model_path: str, trust_remote_code: bool = False) -> None:
    """Whether the LoRA adapter at `path` fits a model of this configuration; reads no weights of the model.

    Raises:
        InputError: there is no adapter, or it was made for another model.
    """
    file = find_adapter(path) / "adapter_model.safetensors"
    if not file.is_file():
        raise InputError(f"no LoRA adapter at {path}: {file.name} is not there")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
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


def _load_adapter(model: PreTrainedModel, path: str, is_trainable: bool = False) -> PeftModel:
    path = str(find_adapter(path))
    return PeftModel.from_pretrained(model, path, is_trainable=is_trainable, autocast_adapter_dtype=False)


def _without_quantization(model: PreTrainedModel) -> PreTrainedModel:
    """A plain copy of a de-quantised model: one that remembers its GGUF file refuses `save_pretrained`."""
    settings = model.config.to_dict()
    settings.pop("quantization_config")
    plain = type(model)._from_config(type(model.config).from_dict(settings), dtype=model.dtype)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain
