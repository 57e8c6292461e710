"""From settings to a simulation: models by their configurations, data as it is or as it is said to be; no weights."""

from itertools import chain

import torch

from todi.data.chat import render_sets
from todi.data.records import load_sets
from todi.data.template_date import TemplateDate
from todi.data.tokenize import Example, encode_examples
from todi.errors import InputError, collecting
from todi.models.families import family_of
from todi.models.inputs import ModelInputs
from todi.models.loading import load_config, load_tokenizer
from todi.options import problems
from todi.runtime.device import Precision, choose_precision
from todi.runtime.peaks import GPU_NAMES, Board, known_board
from todi.settings import ClusterConfig, DoctorConfig, TrainConfig
from todi.simulation import Simulation, Text
from todi.training.train_inputs import data_files

_CUDA = torch.device("cuda")


def read_simulation(config: DoctorConfig) -> Simulation:
    """What the settings name, without weights. Raises InputError with everything that is wrong."""
    found, train = problems(config), config.train
    board = student = text = None
    with collecting(found):
        board = _board(config.cluster.gpu)
    teachers: list[ModelInputs] = []
    with collecting(found):
        if board and train.student.model_path:
            precision = _precision(train.run.precision, board)
            student = describe(train.student.model_path, train.student.model_type, precision, train,
                               train.student.peft_path)
            teachers = _teachers(train, precision)
    with collecting(found):
        text = given_text(config.cluster, train) or (read_text(train, student) if student else None)
    if found:
        raise InputError(found)
    return Simulation(train, config.cluster, board, student, teachers, text)


def _board(name: str) -> Board:
    board = known_board(name)
    if board is None:
        raise InputError(f"--gpu must be one of {', '.join(GPU_NAMES)} or another of todi/runtime/peaks.py, got "
                         f"{name!r}")
    return board


def _teachers(config: TrainConfig, precision: Precision) -> list[ModelInputs]:
    if not config.objective.distils:
        return []
    if config.teacher.teacher_dtype:
        precision = choose_precision(config.teacher.teacher_dtype, _CUDA)
    return [describe(path, config.teacher.teacher_model_type, precision, config, adapter)
            for path, adapter in zip(config.teacher.teacher_model_path, config.teacher.adapters, strict=False)]


def _precision(name: str, board: Board) -> Precision:
    if name == "auto":
        has_bf16 = board.peak(torch.bfloat16) is not None
        return Precision("bf16" if has_bf16 else "fp16", f"{board.name} has {'' if has_bf16 else 'no '}bf16 arithmetic")
    chosen = choose_precision(name, _CUDA)
    if board.peak(chosen.dtype) is None:
        raise InputError(f"--precision {name}: {board.name} has no such products; use fp16, fp32 or auto")
    return chosen


def describe(path: str, model_type: str, precision: Precision, config: TrainConfig, adapter: str | None) -> ModelInputs:
    """A model by its configuration alone; it has no tokenizer. Raises InputError where there is none."""
    found = load_config(path, config.student.trust_remote_code)
    try:
        return ModelInputs(path, found, family_of(model_type, found.model_type), None, precision, adapter)
    except ValueError as error:
        raise InputError(str(error)) from None


def given_text(cluster: ClusterConfig, config: TrainConfig) -> Text | None:
    """Samples of the lengths that are given; a few are as long as --max-length allows. None where none is given."""
    if None in cluster.lengths:
        return None
    samples, prompt, response = cluster.lengths
    limit = config.data.max_length
    if prompt + response > limit:
        raise InputError(f"--prompt-tokens {prompt} and --response-tokens {response} are more than --max-length "
                         f"{limit}")
    longest = Example((0,) * limit, min(prompt, limit // 2))
    return Text(samples, [Example((0,) * (prompt + response), prompt)], [longest],
                f"{samples:,} samples, each assumed to have {prompt} + {response} tokens, the longest {limit}")


def read_text(config: TrainConfig, student: ModelInputs) -> Text:
    """The training data by the student's tokenizer. Raises InputError where either is not there or in order."""
    data, trust = config.data, config.student.trust_remote_code
    files, _ = data_files(data.data_dir)
    tokenizer = load_tokenizer(student.path, trust)
    sets = load_sets(files, data.train_num, responses=config.source.uses_responses)
    records = list(chain(*render_sets(sets, tokenizer, files, TemplateDate(data.template_date))))
    examples = encode_examples(records, tokenizer, student.family, data.max_length, data.max_prompt_length)
    return Text(len(examples), examples, examples, f"{len(examples):,} samples of {' '.join(data.data_dir)}")
