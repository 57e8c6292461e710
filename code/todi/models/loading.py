"""From a path or a Hub name to a configuration, a tokenizer, and a causal language model."""

import importlib.util
import logging
import re
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from todi.errors import InputError
from todi.models.families import Family

logger = logging.getLogger(__name__)

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def load_config(path: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of a model folder, a .gguf file or a Hub name, without its weights.

    Of a multimodal model it is that of its text model, the only part that is used here.

    Raises:
        InputError: nothing is there, or it is no model.
    """
    return _load(AutoConfig, path, trust_remote_code).get_text_config()


def checksum_or_commit(model: str, checksum: Callable[[Path], str], trust_remote_code: bool = False) -> str | None:
    """`checksum` of a model or an adapter that lies here; of one on the Hub, its commit."""
    place = Path(model)
    return checksum(place) if place.exists() else load_config(model, trust_remote_code)._commit_hash


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

    Of a multimodal model (Gemma 3 from 4B on) it is the text model alone.

    Args:
        path: a model folder, a .gguf file (de-quantised), or a Hub name.
        attention: transformers' `attn_implementation`; chosen by `attention_for` when not given.

    Raises:
        InputError: nothing is there, it is no causal language model, or weights are missing.
    """
    model, report = _load(AutoModelForCausalLM, path, trust_remote_code, dtype=dtype, output_loading_info=True)
    if report["missing_keys"]:  # transformers would go on with random ones
        missing = sorted(report["missing_keys"])
        raise InputError(f"{path} lacks {len(missing)} weights of a {type(model).__name__}, the first: {missing[0]}")
    if getattr(model.config, "quantization_config", None) is not None:
        model = _without_quantization(model)
    if model.config.get_text_config() is not model.config:
        model = _text_model(model)
    model.set_attn_implementation(attention or attention_for(device, dtype, type(model)))
    model.name_or_path = path  # what an adapter will name as its base
    return model.to(device)


def attention_for(device: torch.device, dtype: torch.dtype, model_class: type[PreTrainedModel]) -> str:
    """flash-attention 2 where it is installed and device, precision and model allow it, else sdpa, else eager."""
    half = dtype in (torch.float16, torch.bfloat16)
    installed = importlib.util.find_spec("flash_attn") is not None
    if device.type == "cuda" and half and installed and model_class._supports_flash_attn:
        return "flash_attention_2"
    return "sdpa" if model_class._supports_sdpa else "eager"  # Gemma 2 caps its attention scores, sdpa cannot


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


def empty_model(config: PretrainedConfig, trust_remote_code: bool = False,
                dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model of this configuration on the meta device: shapes without numbers."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, dtype=dtype)


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


def _load_adapter(model: PreTrainedModel, path: str, is_trainable: bool = False) -> PeftModel:
    path = str(find_adapter(path))
    return PeftModel.from_pretrained(model, path, is_trainable=is_trainable, autocast_adapter_dtype=False)


def _text_model(model: PreTrainedModel) -> PreTrainedModel:
    """The causal language model inside a multimodal one; the rest of it is dropped."""
    text = empty_model(model.config.get_text_config())
    setattr(text, text.base_model_prefix, model.get_decoder())
    text.set_output_embeddings(model.get_output_embeddings())
    text.generation_config = model.generation_config
    return text


def _without_quantization(model: PreTrainedModel) -> PreTrainedModel:
    """A plain copy of a de-quantised model: one that remembers its GGUF file refuses `save_pretrained`."""
    settings = model.config.to_dict()
    settings.pop("quantization_config")
    plain = type(model)._from_config(type(model.config).from_dict(settings), dtype=model.dtype)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain
