"""How much memory a training run will need on each device, from its settings and its inputs; no weights are loaded."""

import dataclasses
from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import nn

from todi.criterions.linear import peak_bytes
from todi.data.tokenize import Example
from todi.generation.together import cache_bytes, prompts_read_together, rows_written_together
from todi.models.adapters import adapter_outline, add_lora
from todi.models.inputs import ModelInputs
from todi.models.loading import empty_model
from todi.runtime.distributed import World
from todi.settings import OptimConfig, StudentConfig, TrainConfig
from todi.teacher.spread import held_numbers
from todi.training.gpu_memory import with_what_a_gpu_adds
from todi.training.memory import (
    Memory,
    Shape,
    measure_shape,
    offload,
    peak,
    peak_on_cpu,
    resident_bytes,
    training_state,
)
from todi.training.prefill import prefill_bytes
from todi.training.train_inputs import TrainInputs, build_loss_terms, longest_sample


def estimate_memory(config: TrainConfig, inputs: TrainInputs, student: Shape, examples: Sequence[Example], world: World,
                    device: torch.device, cached: Sequence[bool] = (), teacher_ranks: int = 1) -> Memory:
    """Bytes of the fullest moment of the training on one device: on a CPU, of a process.

    Args:
        teacher_ranks: over which the teachers' weights are spread.
    """
    optim = config.optim
    longest, longest_response = longest_sample(config, examples)
    samples = samples_of(optim, longest - 1)
    rows = samples * longest_response
    trust = config.student.trust_remote_code
    teacher = sum(teacher_bytes(model, rows, from_cache, trust, teacher_ranks)
                  for model, from_cache in zip_longest(inputs.teachers, cached, fillvalue=False))
    if inputs.teacher_function:
        teacher = rows * student.vocabulary * 4  # its logits; what it computes them with is its own affair
    vocabulary = min([student.vocabulary, *(model.config.vocab_size for model in inputs.teachers)])
    loss = peak_bytes(rows, vocabulary, student.hidden, width=student.width, head_trained=student.head_trained,
                      teachers=max(len(inputs.teachers), int(config.objective.distils)),
                      chunk_size=config.objective.loss_chunk_size, device=device)
    zero = inputs.deepspeed_config["zero_optimization"]
    state = training_state(student, zero["stage"], world.size)
    writing = student.prefill + cache_bytes(inputs.student.config, texts_at_a_time(config, inputs),
                                            config.data.max_length, student.width)
    forward = max(student.activations + loss, writing)
    if device.type == "cpu":
        return peak_on_cpu(state, forward=forward, width=student.width, teacher=teacher, base=resident_bytes())
    state, offloaded = offload(state, zero)
    memory = peak(state, forward=forward, accumulates=accumulates(optim, longest - 1, world.size), teacher=teacher,
                  base=0)
    return dataclasses.replace(with_what_a_gpu_adds(memory, student, zero, world), offloaded=offloaded)


def texts_at_a_time(config: TrainConfig, inputs: TrainInputs) -> int:
    """How many texts the student writes together at most, for dev scores and to be trained on; 0 where it writes none.
    """
    found, length = [0], config.data.max_length
    if config.run.eval_gen:
        together = rows_written_together(config.run.eval_batch_size, inputs.student, length)
        responses = len(inputs.dev) * config.run.eval_gen_repeat_times  # not known of a run that is only simulated
        found.append(min(together, responses or together))
    if config.source.on_policy:
        found.append(rows_written_together(config.source.sample_batch_size, inputs.student, length))
    return max(found)


def accumulates(optim: OptimConfig, longest: int, ranks: int) -> bool:
    """Whether a step may have several micro-batches: it is cut so, or --max-tokens holds less than --batch-size."""
    return optim.accumulation(ranks) > 1 or optim.tokens(longest) < optim.batch_size * longest


def samples_of(optim: OptimConfig, longest: int) -> int:
    """Of `longest` tokens, so many as a micro-batch may have; a packed one has more, shorter ones in their place."""
    return -(-optim.tokens(longest) // longest)


def teacher_bytes(inputs: ModelInputs, rows: int, cached: bool, trust_remote_code: bool, ranks: int) -> int:
    """Of a teacher's weights, or its head where the rest is cached, and of its hidden states of a micro-batch.

    Args:
        rows: labelled ones of the micro-batch.
        ranks: over which the weights are spread.
    """
    model = empty_model(inputs.config, trust_remote_code)
    if cached:
        weights = model.get_output_embeddings().weight.numel()
    else:
        weights = held_numbers(model, ranks) if ranks > 1 else model.num_parameters()
    return (weights + rows * inputs.config.hidden_size) * inputs.precision.dtype.itemsize


def student_shape(config: TrainConfig, inputs: TrainInputs, length: int, device: torch.device) -> Shape:
    """Of the student and of what further terms of the loss train, for micro-batches of samples of `length` tokens."""
    model = outline(config.student, inputs.student)
    shape = measure_shape(model, samples_of(config.optim, length), length, device,
                          config.student.gradient_checkpointing)
    prompts, prefill = prompts_read_together(texts_at_a_time(config, inputs), inputs.student.config), 0
    if prompts:
        read = config.data.max_prompt_length
        prefill = (prefill_bytes(model, prompts, read, device)
                   + cache_bytes(inputs.student.config, prompts, read, shape.width))
    with torch.device("meta"):
        terms = build_loss_terms(config.objective, inputs.student, inputs.teachers).values()
    sizes = tuple(parameter.numel() for term in terms for parameter in term.parameters())
    return dataclasses.replace(shape, parameters=shape.parameters + sum(sizes), trained=shape.trained + sum(sizes),
                               sizes=shape.sizes + sizes, prefill=prefill)


def outline(config: StudentConfig, inputs: ModelInputs) -> nn.Module:
    """The student without numbers, adapters included."""
    model = empty_model(inputs.config, config.trust_remote_code, inputs.precision.dtype)
    if not config.peft:
        return model
    if config.peft_path:
        return adapter_outline(config.peft_path, model)
    return add_lora(model, inputs.family, config.peft_lora_r, config.peft_lora_alpha, config.peft_lora_dropout,
                    config.peft_lora_targets)
