"""The library's door: `todi.distil` and `todi.evaluate` do what the commands do, and leave the process as it was.

    result = todi.distil(student="model_hub/small", teacher="model_hub/large", data="data/mine",
                         save_dir="outputs/mine", lr=1e-4, num_epochs=3)
    result.best, result.metrics, result.evaluate(sets=["mine"])

Both build the settings that the command line builds and call the function that the command calls. Under torchrun, or
where there is a process group already, every rank calls them alike.
"""

import gc
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike, fspath
from pathlib import Path
from typing import Any, ClassVar

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

import todi.evaluate
from todi.errors import InputError
from todi.given import Records, data_folders, is_path, model_path, on_first_rank, sets_folder
from todi.options import from_keywords
from todi.results import Evaluation, Result
from todi.runtime.device import choose_device, settle_tf32
from todi.runtime.distributed import TIMEOUT, World, process_group, world_from_environment
from todi.runtime.guest import as_guest
from todi.runtime.signals import Interrupted
from todi.settings import CROSS_ENTROPY, EvalConfig, TrainConfig
from todi.train import train
from todi.training.monitors import MONITORS, RunInfo, scalars

Model = str | PathLike | PreTrainedModel

BAR = "progress"  # the monitor that is shown where a library is called from
_GIVEN_AS = {"model_path": "student", "teacher_model_path": "teacher", "data_dir": "data", "kd_objective": "objective",
             "criterion": "objective"}
_EVALUATED_ALIKE = ("max_length", "max_prompt_length", "trust_remote_code", "rouge_tokenizer")


def distil(student: Model, teacher: Model | Sequence[Model] | None = None, *, data: Any, save_dir: str | PathLike,
           objective: str = "ToDi", tokenizer: Tokenizer | None = None, progress: bool = True,
           **settings: Any) -> Result:
    """Trains a student, as `python -m todi.train` does, and leaves the process as it was.

    Ctrl-C saves the state of the run. In a notebook or at Python's prompt the result so far is returned; in a script
    KeyboardInterrupt goes on. The same call goes on with the run; one that has finished is returned as it is.

    Args:
        student, teacher: paths, Hub names or loaded models; several teachers are averaged. A loaded model is written
            into inputs/ of `save_dir`, and is not altered itself.
        data: a folder with train.jsonl and dev.jsonl, or several; {"train": records, "dev": records}; or the records
            to train on, every tenth of which is kept apart as dev. Records are a list of dicts or a datasets.Dataset.
        save_dir: where checkpoints, metrics and states go.
        objective: a divergence (docs/settings.md, KD_OBJ), or cross_entropy: SFT, without a teacher.
        tokenizer: of loaded models.
        progress: show a bar.
        settings: any setting of `python -m todi.train --help`, by its name with underscores: lr=1e-4, peft="lora".

    Raises:
        InputError: everything that is wrong with the settings, or with what they name.
        RunError: the run cannot go on.
    """
    problems = [f"{name} is given as {argument}=" for name, argument in _GIVEN_AS.items() if name in settings]
    if problems:
        raise InputError(problems)
    teachers = () if teacher is None else teacher if isinstance(teacher, (list, tuple)) else (teacher,)
    settings |= {"criterion": CROSS_ENTROPY} if objective == CROSS_ENTROPY else {"kd_objective": objective}
    settings |= {"save_dir": save_dir, "report_to": _trackers(settings.get("report_to", ()), progress)}
    names = [one if is_path(one) else "a loaded model" for one in (student, *teachers)]
    # before anything is written
    asked = from_keywords(TrainConfig, {"model_path": names[0], "teacher_model_path": names[1:], **settings}, _GIVEN_AS)
    folder, stop = Path(save_dir), None
    with _in_this_process(settings.get("process_group_timeout", TIMEOUT)) as (world, device):
        paths = on_first_rank(world, lambda: {
            "model_path": model_path(student, tokenizer, folder / "inputs", "student"),
            "teacher_model_path": [model_path(one, tokenizer, folder / "inputs", "teacher") for one in teachers],
            "data_dir": data_folders(data, folder / "inputs", asked.source.uses_responses)})
        config = from_keywords(TrainConfig, paths | settings)
        settle_tf32(config.run.tf32, device)
        try:
            train(config, world, device)
        except Interrupted as interrupted:
            stop = interrupted.with_traceback(None)  # whose frames hold the engine
        world.barrier()  # the files of the result are the first rank's
    if stop:
        _pass_on(stop)
    defaults = {name: settings[name] for name in _EVALUATED_ALIKE if name in settings}
    return Result(folder, stopped=str(stop) if stop else None, evaluate=evaluate, settings=defaults)


def evaluate(model: Model, *, sets: Sequence[str] | Mapping[str, Records] | None = None,
             save_dir: str | PathLike | None = None, tokenizer: Tokenizer | None = None,
             **settings: Any) -> Evaluation:
    """Scores a model by ROUGE-L, as `python -m todi.evaluate` does, and leaves the process as it was.

    What is done already, with the same settings, model and data, is not done again.

    Args:
        model: a path, that of a LoRA adapter among them, a Hub name or a loaded model, which needs `save_dir`.
        sets: names of folders in `sets_dir` (a setting) that have a valid.jsonl; or records by a name for the set.
        save_dir: where eval/ goes; the model's own folder when not given.
        tokenizer: of a loaded model.
        settings: any setting of `python -m todi.evaluate --help`, by its name with underscores: seeds=[10, 20].

    Raises:
        InputError: everything that is wrong with the settings, or with what they name.
    """
    if not is_path(model) and save_dir is None:
        raise InputError("save_dir is required for a loaded model: it has no folder that results could go to")
    folder = Path(fspath(model) if save_dir is None else save_dir)
    chosen: dict[str, Any] = {} if save_dir is None else {"save_dir": folder}
    if sets is not None and not isinstance(sets, Mapping):
        chosen["sets"] = sets
    with _in_this_process(settings.get("process_group_timeout", TIMEOUT)) as (world, device):
        def paths() -> dict[str, Any]:
            path = model_path(model, tokenizer, folder / "inputs", "model")
            kind = "peft_path" if (Path(path) / "adapter_config.json").is_file() else "model_path"
            if not isinstance(sets, Mapping):
                return {kind: path}
            return {kind: path, "sets_dir": sets_folder(sets, folder / "inputs"), "sets": tuple(sets)}

        config = from_keywords(EvalConfig, {**on_first_rank(world, paths), **chosen, **settings})
        results = todi.evaluate.evaluate(config, world, device)
        if results is None:
            raise InputError("check_only: there is nothing to return; python -m todi.evaluate --check-only checks")
        return Evaluation(config.folder, results)


def _trackers(given: str | Sequence[str], progress: bool) -> tuple[str, ...]:
    return (*((given,) if isinstance(given, str) else given), *((BAR,) if progress else ()))


@contextmanager
def _in_this_process(timeout: float) -> Iterator[tuple[World, torch.device]]:
    """This process among its fellows, able to talk, and its device; afterwards everything is as it was."""
    world = world_from_environment()
    device = choose_device(world.local_rank)
    with as_guest():
        try:
            with process_group(world, device, timeout):
                yield world, device
        finally:
            gc.collect()  # an engine is full of circles, and would keep the memory of the device


def _pass_on(stop: Interrupted) -> None:
    """What the caller makes of a signal: at a prompt, Ctrl-C only ends the run."""
    if stop.number != signal.SIGINT:
        signal.raise_signal(stop.number)
    elif not hasattr(sys, "ps1"):  # IPython has it too
        raise KeyboardInterrupt(str(stop))


@MONITORS.register(BAR)
class Bar:
    """A bar of tqdm's, of the form that suits a terminal or a notebook."""

    _SHOWN: ClassVar = ("loss", "kd", "ce", "rouge_l")

    def __init__(self, run: RunInfo):
        # a notebook that is kept without widgets has a line for each time that the bar is drawn
        self._bar = tqdm(total=run.total_steps, initial=run.step, unit="step", desc=Path(run.name).name, mininterval=2)

    def step_done(self, step: int) -> None:
        """Moves on."""
        self._bar.update(step - self._bar.n)

    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Shows the losses."""
        numbers = scalars(kind, values)
        shown = {name: f"{numbers[f'{kind}/{name}']:.3f}" for name in self._SHOWN if f"{kind}/{name}" in numbers}
        self._bar.set_postfix({kind if name == "loss" and kind == "dev" else name: value
                               for name, value in shown.items()}, refresh=kind == "dev")

    def close(self) -> None:
        """Leaves it as it is."""
        self._bar.close()
