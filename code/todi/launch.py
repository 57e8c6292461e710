"""Turns the launchers' variables into options, by the declarations in todi/settings/.

    FAMILY=gpt2 CKPT_NAME=gpt2-base TEACHER_NAME=gpt2-xlarge KD_OBJ=ToDi python -m todi.launch train --lr 1e-3
    SETS="dolly vicuna" python -m todi.launch evaluate --model-path CKPT
    TEACHER_FAMILY=gpt2 TEACHER_NAME=gpt2-xlarge python -m todi.launch generate

prints the options of todi.train, todi.evaluate or todi.generate, quoted for a shell: what the variables say and no
option says, then the given options as they are. For a training and for teacher text it also finds the models by their
names, and names the folder that is written to; that is always the last word, after --save-dir.
"""

import argparse
import difflib
import hashlib
import os
import re
import shlex
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from todi.earlier import SPREAD, folder_to_go_on_in
from todi.errors import InputError, run_main
from todi.finding import Given, find_models
from todi.options import LONGEST_NAME, Option, declared, possible_path, spell
from todi.runtime.sole_process import check_sole_process
from todi.settings import (
    CROSS_ENTROPY,
    LAUNCHER_VARIABLES,
    NO_ADAPTER,
    PUBLISHED,
    EvalConfig,
    GenerateConfig,
    SamplesConfig,
    TeacherCacheConfig,
    TeacherConfig,
    TrainConfig,
)

_TRAINING, _EVALUATION, _GENERATION = (
    {one.name: one for options in declared(config_type).values() for one in options}
    for config_type in (TrainConfig, EvalConfig, GenerateConfig))
_TEACHER = {one.name: one for one in declared(TeacherConfig)[TeacherConfig]}
# What a shell may hold for its distillations while it also fine-tunes.
_OF_DISTILLATION = {name for name in _TRAINING if name.startswith("kd_")} | {
    one.name for group in (TeacherConfig, TeacherCacheConfig, SamplesConfig) for one in declared(group)[group]}
# Already part of the name of a run.
_BY_NAMES = {"criterion", "kd_objective", "kd_rate", "kd_temperature", "peft", "peft_lora_r", "peft_lora_alpha",
             "peft_lora_dropout", "precision", "num_epochs", "batch_size", "gradient_accumulation_steps", "lr", "seed",
             "model_type", "teacher_model_type"}
_BOOLEANS = {"1": True, "true": True, "0": False, "false": False}
_ALIKE = 0.85
_ADDRESS = r"[A-Za-z0-9_.-]+|[0-9A-Fa-f]*(:[0-9A-Fa-f.]*){2,}(%\w+)?"  # of IPv6 there are at least two colons
_FOREIGN = {"NGPUS", "NODES"}  # batch systems set them


def main() -> None:
    """Compose, print."""
    command, *words = sys.argv[1:] or [""]
    if command not in _COMMANDS:
        raise InputError(f"usage: python -m todi.launch {'|'.join(_COMMANDS)} [OPTION...], got {command!r}")
    sys.stdout.buffer.write(os.fsencode(f"{shlex.join(_COMMANDS[command](words, os.environ))}\n"))


def training_options(words: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The options of todi.train, --save-dir last.

    Raises:
        InputError: a variable that is none of ours but looks like it, or with a value that cannot be.
    """
    variables = set_variables(environment)
    save_dir, words = _split_off_save_dir(words)
    given = find_models(variables) | read_values(_TRAINING, variables)
    # words for what a launcher has and its user does not want
    if given.get("peft") == ["full"]:
        del given["peft"]
    if given.get("teacher_peft_path") == [NO_ADAPTER]:
        del given["teacher_peft_path"]
    said = set(read_values(_TRAINING, variables)) - _BY_NAMES
    if "SKEW_LAMBDA" in variables:
        said.add("kd_params")
        given["kd_params"] = [*given.get("kd_params", ()), f"skew_lambda={variables['SKEW_LAMBDA']}"]
    if given.get("criterion") == [CROSS_ENTROPY]:
        given = {name: value for name, value in given.items() if name not in _OF_DISTILLATION}
    save_dir = save_dir or "".join(given.pop("save_dir", ())) or _find_run(given, variables, said, words)
    return [*compose(_TRAINING, given, words), *words, "--save-dir", save_dir]


def evaluation_options(words: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The options of todi.evaluate. Raises InputError like `training_options`."""
    return [*compose(_EVALUATION, read_values(_EVALUATION, set_variables(environment)), words), *words]


def generation_options(words: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The options of todi.generate, whose model is the teacher, --save-dir last.

    Raises:
        InputError: like `training_options`, or the variables name no teacher, several, or a function.
    """
    variables = set_variables(environment)
    save_dir, words = _split_off_save_dir(words)
    teacher = find_models(variables) | read_values(_TEACHER, variables)
    model = teacher.get("teacher_model_path", [])
    if len(model) != 1 or "teacher_callable" in teacher:
        raise InputError("text is written by one model: set TEACHER_NAME or TEACHER_MODEL_PATH, not TEACHER_CALLABLE")
    given = read_values(_GENERATION, variables) | {"model_path": model}
    adapter = teacher.get("teacher_peft_path", [NO_ADAPTER])
    if adapter != [NO_ADAPTER]:
        given["peft_path"] = adapter
    save_dir = save_dir or "".join(given.pop("save_dir", ())) or name_text(given, variables)
    return [*compose(_GENERATION, given, words), *words, "--save-dir", save_dir]


_COMMANDS: dict[str, Callable[[Sequence[str], Mapping[str, str]], list[str]]] = {
    "train": training_options, "evaluate": evaluation_options, "generate": generation_options}


def our_variables() -> set[str]:
    """The names of all variables that mean something to a launcher."""
    options = [*_TRAINING.values(), *_EVALUATION.values(), *_GENERATION.values()]
    return {*LAUNCHER_VARIABLES, *(variable for one in options for variable in one.variables)}


def set_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that are set and not empty. Raises InputError for those that are nearly ours."""
    options = [*_TRAINING.values(), *_EVALUATION.values(), *_GENERATION.values()]
    ours = our_variables()
    meant = {one.name.upper(): one.variables[0] for one in options if one.variables} | {name: name for name in ours}
    variables = {name: value for name, value in environment.items() if value}
    check_processes(variables)
    problems = list(check_words(variables))
    for name in sorted(variables.keys() & PUBLISHED.keys()):
        print(f"note: {name}, of the published scripts, is not used here: {PUBLISHED[name]}", file=sys.stderr)
    for name in variables.keys() - ours - _FOREIGN - PUBLISHED.keys():
        near = difflib.get_close_matches(name, meant, n=1, cutoff=_ALIKE) if name.isupper() else []
        problems += [f"unknown variable {name}; did you mean {meant[one]}?" for one in near]
    if problems:
        raise InputError(sorted(problems))
    return variables


def check_processes(variables: Mapping[str, str]) -> None:
    """Raises InputError where the number of processes or the place of this node among the nodes cannot be."""
    def whole(name: str, default: str, least: int, most: int | None = None) -> int:
        text = variables.get(name, default)
        # as bash reads it too: 08 is none there
        if not re.fullmatch("0|[1-9][0-9]{0,8}", text) or int(text) < least:
            raise InputError(f"{name} must be a whole number of at least {least}, got {text!r}")
        if most is not None and int(text) > most:
            raise InputError(f"{name} must be at most {most}, got {text}")
        return int(text)

    whole("NPROC", "1", 1)
    whole("HANG_TIMEOUT", "1800", 0)
    nodes = whole("NNODES", "1", 1)
    rank = whole("NODE_RANK", "" if nodes > 1 else "0", 0)
    if rank >= nodes:
        raise InputError(f"NODE_RANK must be below NNODES={nodes}, got {rank}")
    if nodes > 1:
        whole("MASTER_PORT", "29500", 1, 65_535)
        whole("RENDEZVOUS_TIMEOUT", "900", 1)
        if "MASTER_ADDR" not in variables:
            raise InputError(f"NNODES={nodes} needs MASTER_ADDR, the name of the first node")
        if not re.fullmatch(_ADDRESS, variables["MASTER_ADDR"]):
            raise InputError("MASTER_ADDR must be a name or an address, without a port (MASTER_PORT), got "
                             f"{variables['MASTER_ADDR']!r}")
    check_sole_process(variables)


def check_words(variables: Mapping[str, str]) -> Iterator[str]:
    """What is wrong with further variables of the launchers, a sentence each."""
    for name in ("DRY_RUN", "DOCTOR"):
        if variables.get(name, "1") != "1":
            yield f"{name} must be 1, or not set, got {variables[name]!r}"
    for name in ("FAMILY", "CKPT_NAME", "TEACHER_FAMILY", "TEACHER_NAME"):
        try:
            possible_path(variables.get(name, ""))
        except argparse.ArgumentTypeError as error:
            yield f"{name} {error}"


def read_values(options: Mapping[str, Option], variables: Mapping[str, str]) -> Given:
    """What the variables say of the options. Raises InputError with every value that cannot be read."""
    given, problems = {}, []
    for name, one in options.items():
        variable = next((variable for variable in one.variables if variable in variables), None)
        if variable:
            try:
                given[name] = _split(one, variables[variable])
            except ValueError as error:
                problems.append(f"{variable}: {error}, got {variables[variable]!r}")
            except argparse.ArgumentTypeError as error:
                problems.append(f"{variable} {error}")
    if problems:
        raise InputError(problems)
    return given


def _split(one: Option, text: str) -> list[str]:
    """The words of a variable's value: of a list, those that a shell would see, but the path of something as it is."""
    if one.type is bool and text.lower() not in _BOOLEANS:
        raise ValueError(f"must be {', '.join(_BOOLEANS)}")
    return list(map(possible_path, shlex.split(text) if one.many and not os.path.exists(text) else [text]))


def compose(options: Mapping[str, Option], given: Given, words: Sequence[str]) -> Iterator[str]:
    """The words of a command line that say what is given, but for options that are among `words`."""
    said = {word.split("=")[0] for word in words}
    for name, one in options.items():
        negative = f"--no-{one.flag[2:]}"
        if name not in given or said.intersection([*one.flags, negative]):
            continue
        value = given[name]
        if one.type is bool:
            yield one.flag if _BOOLEANS[value[0].lower()] else negative
        elif len(value) == 1 and value[0].startswith("-"):
            yield f"{one.flag}={value[0]}"  # it would be taken for an option
        else:
            yield from (one.flag, *value)


def name_run(given: Given, variables: Mapping[str, str], said: Collection[str]) -> str:
    """The folder of a run, below outputs/. Earlier runs are found by it: a change of it would start them anew.

    Args:
        said: settings that variables gave; those that decide a run and are in no other part of the name, and are not
            what they are by themselves, are added at its end.
    """
    def text(name: str) -> str:
        return " ".join(given[name]) if name in given else spell(_TRAINING[name].default)

    def required(name: str) -> str:
        if name not in variables:
            raise InputError(f"set {name} or SAVE_DIR: the folder of the run is named by it")
        return variables[name]

    adapter = "default"
    if "peft" in given:
        adapter = (f"{text('peft')}-rank={text('peft_lora_r')}-alpha={text('peft_lora_alpha')}"
                   f"-dropout={text('peft_lora_dropout')}")
    criterion, config = text("criterion"), f"{adapter}-{text('precision')}"
    task, parts = "sft", [config]
    if criterion != CROSS_ENTROPY:
        task, parts = criterion, [f"kd^obj={text('kd_objective')}", config, f"teacher={required('TEACHER_NAME')}",
                                  f"kd^rate={text('kd_rate')}", f"kd^temp={text('kd_temperature')}"]
    devices = int(variables.get("NPROC", 1)) * int(variables.get("NNODES", 1))
    batch = f"{text('batch_size')}x{text('gradient_accumulation_steps')}x{devices}"
    parts = [f"criterion={criterion}", *parts, f"epoch={text('num_epochs')}", f"bsz={batch}", f"lr={text('lr')}",
             f"seed={text('seed')}"]
    parts += [f"{name}={text(name).replace('/', '-')}" for name, one in _TRAINING.items()
              if name in said and (name in SPREAD or not one.may_change) and text(name) != spell(one.default)]
    return f"outputs/{required('FAMILY')}/{required('CKPT_NAME')}/{task}/{_fitting('__'.join(parts))}"


def _find_run(given: Given, variables: Mapping[str, str], said: Collection[str], words: Sequence[str]) -> str:
    """The folder of a run: the one of its name, unless it goes on in one of other devices, or is to start anew."""
    named = name_run(given, variables, said)
    if given.get("resume") == ["never"] or re.search("--resume[ =]never", " ".join(words)):
        return named
    found = folder_to_go_on_in(named)
    for busy in found.busy:
        print(f"note: {busy}", file=sys.stderr)
    if found.folder != named:
        print(f"note: the run in {found.folder} goes on, which was spread over devices otherwise (SAVE_DIR or "
              "RESUME=never begins another)", file=sys.stderr)
    return found.folder


def name_text(given: Given, variables: Mapping[str, str]) -> str:
    """The folder of a teacher's text: data/<set>-by-<teacher>, beside the prompts; names of several sets are joined."""
    if "TEACHER_NAME" not in variables:
        raise InputError("set TEACHER_NAME or TEXT_DIR: the folder of the text is named by it")
    folders = list(map(Path, given.get("data_dir", _GENERATION["data_dir"].default)))
    teacher = variables["TEACHER_NAME"].replace("/", "-")
    return str(folders[0].parent / _fitting(f"{'+'.join(folder.name for folder in folders)}-by-{teacher}"))


def _fitting(name: str) -> str:
    """A name that a file system takes: a long one is cut off and ends in a checksum of all of it."""
    encoded = os.fsencode(name)
    if len(encoded) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:12]
    return f"{encoded[:LONGEST_NAME - 14].decode(errors='ignore')}__{digest}"


def _split_off_save_dir(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The last --save-dir of a command line, and the other words."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--save-dir")
    try:
        known, others = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise InputError(str(error)) from None
    return known.save_dir, others


if __name__ == "__main__":
    run_main(main)
