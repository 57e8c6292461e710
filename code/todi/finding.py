"""Models by their names: in model_hub/, and the best that runs have left in outputs/."""

from collections.abc import Mapping
from pathlib import Path

from todi.errors import InputError
from todi.models.families import other_name
from todi.training.scores import Kept

Given = dict[str, list[str]]  # an option's name -> the words of its value


def find_models(variables: Mapping[str, str]) -> Given:
    """The student in model_hub/, and the teacher: its newest SFT run's best, or model_hub/'s with that as adapter."""
    family, name = variables.get("FAMILY"), variables.get("CKPT_NAME")
    found = {"model_type": [family]} if family else {}
    if family and name:
        found["model_path"] = [_folder("model_hub", family, name)]
    family, name = variables.get("TEACHER_FAMILY", family), variables.get("TEACHER_NAME")
    peft = variables.get("TEACHER_PEFT", "full")
    if peft not in ("lora", "full"):
        raise InputError(f"TEACHER_PEFT must be lora or full, got {peft!r}")
    if family:
        found["teacher_model_type"] = [family]
    if family and name and "TEACHER_CALLABLE" not in variables:
        tuned = best_checkpoint(Path(_folder("outputs", family, name), "sft"))
        found |= ({"teacher_model_path": [_folder("model_hub", family, name)], "teacher_peft_path": [tuned]}
                  if peft == "lora" else {"teacher_model_path": [tuned]})
    return found


def _folder(root: str, family: str, name: str) -> str:
    """Of a model: by its name or, where only that is there, by its other one, of the published scripts or of ours."""
    folders = [Path(root, family, one) for one in (name, other_name(family, name)) if one]
    return str(next(filter(Path.is_dir, folders), folders[0]))


def best_checkpoint(runs: Path) -> str:
    """The best checkpoint of the newest run in a folder of runs, or the folder itself where there is none yet."""
    checkpoints = [path for path in runs.glob("*/epoch*") if Kept.named(path.name)]
    return str(best_of_run(max(checkpoints, key=_written).parent)) if checkpoints else str(runs)


def best_of_run(run: Path) -> Path | None:
    """The best of the checkpoints that a run keeps; None where there is none yet."""
    checkpoints = {path: kept for path in run.glob("epoch*") if (kept := Kept.named(path.name))}
    return max(checkpoints, key=lambda path: checkpoints[path].order, default=None)


def _written(checkpoint: Path) -> float:
    """When its weights were; the folder itself changes when it is scored."""
    return max((file.stat().st_mtime for file in checkpoint.glob("*.safetensors")),
               default=checkpoint.parent.stat().st_mtime)
