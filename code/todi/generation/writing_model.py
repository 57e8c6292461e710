"""The model that writes responses: what is known of it before its weights are loaded, and with them."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from todi.data.template_date import noted_date
from todi.errors import InputError, collecting
from todi.generation.decoding import Decoding
from todi.generation.padding import check_decoding
from todi.models.adapters import base_of, merge_adapter
from todi.models.inputs import ModelInputs, read_model
from todi.models.loading import checksum_or_commit, load_model
from todi.models.probe import check_model
from todi.runtime.allocator import who_allocates
from todi.runtime.checksums import UNREAD, model_checksum
from todi.runtime.device import choose_precision
from todi.runtime.distributed import World
from todi.settings import DecodingConfig

logger = logging.getLogger(__name__)


def read_writing_model(path: str | None, adapter: str | None, precision: str, device: torch.device, max_length: int,
                       trust_remote_code: bool) -> ModelInputs | None:
    """What is known of a model, or of an adapter and its base, short of weights; None where neither is named.

    Args:
        path: of an adapter its own base, where this is None.
        precision: the setting.

    Raises:
        InputError: with every problem.
    """
    problems: list[str] = []
    chosen = model = None
    with collecting(problems):
        chosen = choose_precision(precision, device)
    with collecting(problems):
        if path or adapter:
            model = read_model(path or base_of(adapter), "auto", adapter, chosen, max_length, trust_remote_code)
    if problems:
        raise InputError(problems)
    return model


def load_writing_model(inputs: ModelInputs, decoding: Decoding, world: World, device: torch.device,
                       trust_remote_code: bool) -> PreTrainedModel:
    """The model with its weights, its LoRA adapter merged.

    Raises:
        InputError: it does not do what is counted on here.
    """
    logger.info("device: %s x %d; precision: %s (%s)", device.type, world.size, inputs.precision.name,
                inputs.precision.reason)
    logger.info("allocator: %s", who_allocates())
    model = load_model(inputs.path, inputs.precision.dtype, device, trust_remote_code)
    if inputs.adapter:
        model = merge_adapter(model, inputs.adapter)
    check_model(model, inputs.path)
    if decoding.num_beams == 1:
        check_decoding(model, inputs.path, inputs.tokenizer.pad_token_id)
    logger.info("model: %s%s, attention: %s", inputs.path,
                f" with adapter {inputs.adapter}" if inputs.adapter else "", model.config._attn_implementation)
    return model


def what_writes(inputs: ModelInputs, decoding: Decoding, device: torch.device, template_date: str,
                trust_remote_code: bool, of_weights: bool = True) -> dict[str, Any]:
    """Whatever a response depends on besides its prompt and its seed, by name; JSON values.

    Args:
        template_date: `TemplateDate.noted`.
        of_weights: whether a model that lies here is read; else `UNREAD` stands for its checksum.
    """
    checksum = model_checksum if of_weights else lambda _: UNREAD
    return {**dataclasses.asdict(decoding), "precision": inputs.precision.name, "device": device.type,
            "model": checksum_or_commit(inputs.path, checksum, trust_remote_code),
            "adapter": inputs.adapter and checksum(Path(inputs.adapter)), **noted_date(template_date)}


def build_decoding(config: DecodingConfig, max_new_tokens: int, no_repeat_ngram_size: int) -> Decoding:
    """How the responses are written."""
    return Decoding(max_length=config.max_length, max_new_tokens=max_new_tokens,
                    max_prompt_length=config.max_prompt_length, do_sample=config.do_sample,
                    temperature=config.temperature, top_p=config.top_p, top_k=config.top_k,
                    no_repeat_ngram_size=no_repeat_ngram_size, num_beams=config.num_beams)
