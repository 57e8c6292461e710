"""What is known of a model before its weights are loaded, and whether it can be used at all."""

import logging
from dataclasses import dataclass

from transformers import PretrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from todi.errors import InputError, collecting
from todi.models.adapters import check_adapter
from todi.models.checks import check_architecture, check_positions, check_vocabulary
from todi.models.families import Family, family_of
from todi.models.loading import check_weights, load_config, load_tokenizer
from todi.models.tokenizers import start_ids
from todi.runtime.device import Precision

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelInputs:
    """What is known of a model before its weights are loaded."""

    path: str
    config: PretrainedConfig
    family: Family
    tokenizer: Tokenizer
    precision: Precision
    adapter: str | None


def read_model(path: str, model_type: str, adapter: str | None, precision: Precision | None, max_length: int,
               trust_remote_code: bool, trained: bool = False) -> ModelInputs:
    """What is known of a model and its adapter, to be `trained` or not, short of weights.

    Raises:
        InputError: with every problem.
    """
    model_config = load_config(path, trust_remote_code)
    problems: list[str] = []
    family = tokenizer = None
    with collecting(problems):
        family = _family(model_type, model_config.model_type)
    if adapter:
        with collecting(problems):
            check_adapter(adapter, model_config, path, trust_remote_code, trained)
    with collecting(problems):
        check_architecture(model_config, path, trained, trust_remote_code)
        check_weights(path, trust_remote_code)
    with collecting(problems):
        check_positions(model_config, max_length, path)
    with collecting(problems):
        tokenizer = load_tokenizer(path, trust_remote_code)
        check_vocabulary(model_config, tokenizer, path)
    if trained and family and tokenizer:
        with collecting(problems):
            start = tokenizer.convert_ids_to_tokens(start_ids(tokenizer, family))
            if start and family.prepend_bos is None:
                logger.info("every sequence starts with %s, which the tokenizer of %s adds", " ".join(start), path)
    if problems:
        raise InputError(problems)
    return ModelInputs(path, model_config, family, tokenizer, precision, adapter)


def _family(model_type: str, architecture: str) -> Family:
    try:
        return family_of(model_type, architecture)
    except ValueError as error:
        raise InputError(str(error)) from None
