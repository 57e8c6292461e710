"""Everything that an evaluation reads before any weights are loaded."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from todi.data.chat import render
from todi.data.records import Record, load_records
from todi.data.template_date import TemplateDate
from todi.data.tokenize import Example, encode_examples
from todi.errors import InputError, collecting
from todi.evaluation.results import is_set_name
from todi.evaluation.rouge_tokens import choose_tokenizer
from todi.evaluation.set_files import earlier_value
from todi.generation.decoding import Decoding
from todi.models.adapters import check_adapter, find_adapter
from todi.models.checks import check_architecture, check_positions, check_vocabulary
from todi.models.families import Family, family_of
from todi.models.loading import check_weights, load_config, load_tokenizer
from todi.python_files import load_plugins
from todi.runtime.device import Precision, choose_precision
from todi.settings import TODAY, EvalConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalInputs:
    """What was read, short of weights.

    Attributes:
        model_path: --model-path or the adapter's own base.
        examples: of each set, its records as they are read by the model.
        rouge_tokenizers: of each set, what ROUGE-L compares; never auto.
        template_date: `TemplateDate.noted` of the one date of the chat template.
    """

    model_path: str
    family: Family
    tokenizer: Tokenizer
    precision: Precision
    sets: dict[str, list[Record]]
    examples: dict[str, list[Example]]
    rouge_tokenizers: dict[str, str]
    template_date: str


def read_inputs(config: EvalConfig, device: torch.device) -> EvalInputs:
    """Everything that `config` names, short of weights.

    Raises:
        InputError: with every problem of settings, paths and data.
    """
    load_plugins(config.plugins)
    problems = config.problems()
    model_path = family = tokenizer = precision = sets = None
    examples = {}
    with collecting(problems):
        precision = choose_precision(config.precision, device)
    if config.model_path or config.peft_path:
        with collecting(problems):
            model_path = config.model_path or _base_model(config.peft_path)
            model_config = load_config(model_path, config.trust_remote_code)
            check_architecture(model_config, model_path, trust_remote_code=config.trust_remote_code)
            check_weights(model_path, config.trust_remote_code)
            if config.peft_path:
                check_adapter(config.peft_path, model_config, model_path, config.trust_remote_code)
            family = family_of("auto", model_config.model_type)
            tokenizer = load_tokenizer(model_path, config.trust_remote_code)
            check_vocabulary(model_config, tokenizer, model_path)
            check_positions(model_config, config.max_length, model_path)
    with collecting(problems):
        sets = _read_sets(Path(config.sets_dir), list(filter(is_set_name, config.sets)), config.limit)
    if tokenizer and sets:
        date = TemplateDate(config.template_date, earlier_value(config.folder, list(sets), "template_date"))
        for name, records in sets.items():
            with collecting(problems):
                sets[name] = render(records, tokenizer, Path(config.sets_dir) / name, date)
                examples[name] = encode_examples(sets[name], tokenizer, family, config.max_length,
                                                 config.max_prompt_length)
    if problems:
        raise InputError(problems)
    rouge_tokenizers = {name: choose_tokenizer(config.rouge_tokenizer, [record.references for record in records], name)
                        for name, records in sets.items()}
    return EvalInputs(model_path, family, tokenizer, precision, sets, examples, rouge_tokenizers, date.noted)


def noted_date(inputs: EvalInputs) -> dict[str, str]:
    """The entry "template_date" of what describes responses; none where no template writes a date."""
    return {} if inputs.template_date == TODAY else {"template_date": inputs.template_date}


def decoding_of(config: EvalConfig) -> Decoding:
    """How the responses are written."""
    return Decoding(max_length=config.max_length, max_new_tokens=config.max_new_tokens,
                    max_prompt_length=config.max_prompt_length, do_sample=config.do_sample,
                    temperature=config.temperature, top_p=config.top_p, top_k=config.top_k,
                    no_repeat_ngram_size=config.no_repeat_ngram_size, num_beams=config.num_beams)


def _base_model(adapter: str) -> str:
    """The model that a LoRA adapter was trained on. Raises InputError when the adapter does not say."""
    file = find_adapter(adapter) / "adapter_config.json"
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError, RecursionError):
        raise InputError(f"{file} is not a JSON object") from None
    if not (base and isinstance(base, str)):
        raise InputError(f"{file} does not name the base model; give it as --model-path")
    return base


def _read_sets(folder: Path, names: Sequence[str], limit: int | None) -> dict[str, list[Record]]:
    """The records of each set that is there. Raises InputError for bad lines, or when none is there."""
    files = {name: folder / name / "valid.jsonl" for name in names}
    found = {name: file for name, file in files.items() if file.is_file()}
    missing = [str(file) for name, file in files.items() if name not in found]
    if names and not found and (folder / "valid.jsonl").is_file():
        raise InputError(f"{folder} is a set itself: it has valid.jsonl. Give the folder that it is in, and its name: "
                         f"--sets-dir {folder.parent} --sets {folder.name}, or SETS_DIR={folder.parent} "
                         f"SETS={folder.name}")
    if names and not found:
        raise InputError(f"none of the sets is there; looked for {', '.join(missing)}")
    if missing:
        logger.warning("sets that are not there and are skipped: %s", ", ".join(missing))
    problems: list[str] = []
    sets = {}
    for name, file in found.items():
        with collecting(problems):
            sets[name] = load_records(file, limit)
    if problems:
        raise InputError(problems)
    logger.info("sets: %s", ", ".join(f"{name} ({len(records)})" for name, records in sets.items()))
    return sets
