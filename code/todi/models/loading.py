"""From a path or a Hub name to a configuration, a tokenizer, and a causal language model."""

import importlib.util
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import is_protobuf_available, is_sentencepiece_available

from todi.errors import InputError
from todi.registry import did_you_mean_beside

_SENTENCEPIECE = b"\n"  # the first field of its protocol buffer; tiktoken's files are text
_POINTER = b"version https://git-lfs"
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
    _ask_for_sentencepiece(Path(path))
    tokenizer = _load(AutoTokenizer, path, trust_remote_code)
    with refusing(f"the tokenizer of {path} cannot encode"):  # its settings are not looked at before
        tokenizer("a text")
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
        InputError: nothing is there, it is no causal language model, or `check_weights` would refuse it.
    """
    model = _read_model(path, trust_remote_code, dtype=dtype)
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


def check_weights(path: str, trust_remote_code: bool = False) -> None:
    """Whether the weights in a model folder are whole and those that its configuration describes; reads no numbers.

    A .gguf file and a model on the Hub are found out about when they are loaded.

    Raises:
        InputError: weights or generation settings cannot be read, or do not fit the configuration.
    """
    if not Path(path).is_dir():
        return
    for file in sorted(Path(path).glob("model*.safetensors")):
        with refusing(f"cannot read {file}"), safe_open(file, "pt"):
            pass  # it is whole; transformers does not say which one is not
    _read_model(path, trust_remote_code, device_map="meta")
    if (Path(path) / "generation_config.json").is_file():
        with refusing(f"cannot read generation_config.json of {path}"):  # transformers would go on without it
            ends = GenerationConfig.from_pretrained(path).eos_token_id
            torch.tensor([] if ends is None else ends, dtype=torch.long)


def empty_model(config: PretrainedConfig, trust_remote_code: bool = False,
                dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model of this configuration on the meta device: shapes without numbers. Raises InputError if there is none."""
    with refusing(f"no {config.model_type} model can be made of its configuration"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, dtype=dtype)


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Makes one line, "what: reason", of whatever a library raises about a file of the user's.

    What a damaged file does to a library is not to be foretold: an OSError, a TypeError, a missing package.
    """
    try:
        yield
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = f"{' '.join(str(error).split())[:300]} ({type(error).__name__})"
        if isinstance(error, pickle.UnpicklingError):  # whose advice is to load it unsafely
            reason = "it is no PyTorch file, or holds more than tensors, and those alone are read"
        raise InputError(f"{what}: {reason}") from error


def refuse_pointers(folder: Path) -> None:
    """Raises InputError where a file stands for one that Git LFS has not fetched."""
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.stat().st_size < 1024 and file.read_bytes().startswith(_POINTER):
            raise InputError(f"{file} is a Git LFS pointer, not the file itself; run `git lfs pull` in {folder}, or "
                             "download it again")


def _refuse_folders_of_models(folder: Path) -> None:
    """Refuses a run's folder, or a family's, where one of the models in it is meant."""
    within = sorted(file.parent.name for kind in ("", "adapter_") for file in folder.glob(f"*/{kind}config.json"))
    if within and not any((folder / name).is_file() for name in ("config.json", "tokenizer_config.json")):
        raise InputError(f"{folder} is no model, but the folder of {', '.join(within)}: give one of these")


def _ask_for_sentencepiece(folder: Path) -> None:
    """Refuses a SentencePiece file alone where nothing here can read it; transformers would ask for tiktoken."""
    file = next((file for file in folder.glob("*.model") if file.read_bytes().startswith(_SENTENCEPIECE)), None)
    if (file and not (folder / "tokenizer.json").is_file()
            and not (is_sentencepiece_available() and is_protobuf_available())):
        raise InputError(f"the tokenizer of {folder} is a SentencePiece file alone ({file.name}), and what reads it is "
                         "not installed: pip install sentencepiece protobuf. Or add the tokenizer.json of this model")


def _read_model(path: str, trust_remote_code: bool, **kwargs: Any) -> PreTrainedModel:
    """The model as transformers makes it of `path`, if all of its weights are there, and nothing else."""
    model, report = _load(AutoModelForCausalLM, path, trust_remote_code, output_loading_info=True,
                          ignore_mismatched_sizes=True, **kwargs)
    kind = type(model).__name__
    if report["mismatched_keys"]:  # transformers would go on with random ones of these and of those that are missing
        name, given, wanted = min(report["mismatched_keys"])
        raise InputError(f"{path} has {len(report['mismatched_keys'])} weights of other shapes than its configuration "
                         f"says, the first: {name} is {tuple(given)}, a {kind} needs {tuple(wanted)}")
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise InputError(f"{path} lacks {len(missing)} weights of a {kind}, the first: {missing[0]}")
    if report["unexpected_keys"]:  # and without these
        unexpected = sorted(report["unexpected_keys"])
        raise InputError(f"{path} has {len(unexpected)} weights that a {kind} of its configuration has not, the "
                         f"first: {unexpected[0]}")
    _check_tied(model, path)
    return model


def _check_tied(model: PreTrainedModel, path: str) -> None:
    """Refuses two matrices where the configuration says they are one; transformers would go on with both.

    Of a model on the meta device they are compared where its safetensors have both by these names.
    """
    said = model.get_expanded_tied_weights_keys(all_submodels=True)
    for target, source in said.items():
        untied = target not in model.all_tied_weights_keys
        if untied or (model.device.type == "meta" and _differ(path, target, source)):
            raise InputError(f"{path}: its configuration says that {target} is {source} (tie_word_embeddings), but its "
                             "weights have both, and they differ; if both are meant, set tie_word_embeddings to false "
                             "in its config.json")


def _differ(folder: str, *names: str) -> bool:
    """Whether a folder's safetensors have tensors by all of these names, which are not all the same."""
    found = []
    for file in sorted(Path(folder).glob("model*.safetensors")):
        with safe_open(file, "pt") as tensors:
            found += [tensors.get_tensor(name) for name in names if name in set(tensors.keys())]
    return len(found) == len(names) and not all(torch.equal(found[0], other) for other in found)


def _load(auto_class, path: str, trust_remote_code: bool, **kwargs):
    """`auto_class.from_pretrained` for all three sources, with one clear error."""
    place, what = Path(path), path
    if place.suffix == ".gguf" and place.is_file():
        source, kwargs = str(place.parent), {**kwargs, "gguf_file": place.name}
    elif place.is_dir():
        refuse_pointers(place)
        _refuse_folders_of_models(place)
        source = path
    elif is_hub_name(path):
        source, what = path, f"{path}, which is no folder here and so taken for a Hub name"
    else:
        raise InputError(f"no model at {path}: no such folder or .gguf file, and not the form of a Hub name; "
                         f"{did_you_mean_beside(place)}".rstrip("; "))
    with refusing(f"cannot read {auto_class.__name__[4:]} of {what}"):
        return auto_class.from_pretrained(source, trust_remote_code=trust_remote_code, **kwargs)


def is_hub_name(path: str) -> bool:
    """Whether `path` has the form `name` or `organisation/name` and does not point below a folder here."""
    return bool(_HUB_NAME.fullmatch(path)) and not path.startswith(".") and not Path(path.split("/")[0]).is_dir()


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
