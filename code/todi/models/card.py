"""The model card of a checkpoint: what it was made of, how, how good it is, and how to load it."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from todi.models.families import Family
from todi.settings import CROSS_ENTROPY

Card = Callable[[Mapping[str, float]], str]  # from the metrics of a checkpoint to its README.md


@dataclass(frozen=True)
class Base:
    """A model that a checkpoint was made from.

    Attributes:
        path: as it was given.
        adapter: a LoRA adapter that was part of it, as it was given.
    """

    path: str
    family: Family
    adapter: str | None = None

    @property
    def hub_name(self) -> str | None:
        """Its name on the Hugging Face Hub, where it is a plain copy from there."""
        names = self.family.hub
        name = self.family.own_name(Path(self.path).name)
        return self.path if self.path in names.values() else names.get(name)

    def __str__(self) -> str:
        known = f" ({self.hub_name})" if self.hub_name else ""
        return f"`{self.path}`{known}" + (f" with the adapter `{self.adapter}`" if self.adapter else "")


def model_card(settings: Mapping[str, Any], data: Mapping[str, str], versions: Mapping[str, str], student: Base,
               teachers: Sequence[Base], metrics: Mapping[str, float]) -> str:
    """The README.md of a checkpoint, in the form of the Hugging Face Hub.

    Args:
        settings: of the run, as args.json holds them.
        data: SHA-256 of each data file, by path.
        versions: of the libraries that trained it.
        teachers: none for SFT, or where the settings name a function in their place.
        metrics: on the dev set.
    """
    lora = settings["student"]["peft"] == "lora"
    licence = f"The weights of the student are under {_named(student.family.licence)}, which holds for this checkpoint."
    if teachers:
        theirs = dict.fromkeys(_named(teacher.family.licence) for teacher in teachers)  # a set would lose the order
        licence += f" The teacher's are under {' and '.join(theirs)}."
    used = {part: settings[part] for part in ("student", "objective", "optim", "data")}
    sections = {
        f"# {_title(settings, student)}": _summary(settings, student, teachers),
        "## Metrics": _table(("on the dev set", ""), {name: f"{value:.4f}" for name, value in metrics.items()}),
        "## Data": _table(("file", "SHA-256"), {f"`{path}`": f"`{digest}`" for path, digest in data.items()}),
        "## How to load": f"```python\n{_loading(student, lora)}\n```",
        "## Settings": f"```json\n{json.dumps(used, indent=2)}\n```",
        "## Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "## Licence": licence,
    }
    body = "\n\n".join(f"{title}\n\n{text}" for title, text in sections.items())
    return f"---\n{_front_matter(settings, student, lora)}\n---\n\n{body}\n"


def _distils(settings: Mapping[str, Any]) -> bool:
    return settings["objective"]["criterion"] != CROSS_ENTROPY


def _front_matter(settings: Mapping[str, Any], student: Base, lora: bool) -> str:
    lines = [f"license: {student.family.licence_id or 'other'}",
             f"library_name: {'peft' if lora else 'transformers'}", "pipeline_tag: text-generation"]
    if student.hub_name:  # the Hub takes nothing but its own names here
        lines += [f"base_model: {student.hub_name}", f"base_model_relation: {'adapter' if lora else 'finetune'}"]
    tags = ["todi", "knowledge-distillation" if _distils(settings) else "sft", *(["lora"] if lora else [])]
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in tags)])


def _title(settings: Mapping[str, Any], student: Base) -> str:
    how = settings["objective"]["kd_objective"] if _distils(settings) else "SFT"
    return f"{Path(student.path).name}, {how}"


def _summary(settings: Mapping[str, Any], student: Base, teachers: Sequence[Base]) -> str:
    objective = settings["objective"]
    what = "A LoRA adapter on" if settings["student"]["peft"] else "From"
    if not _distils(settings):
        return f"{what} {student}, trained by supervised fine-tuning (cross-entropy on the responses)."
    parameters = f" ({', '.join(objective['kd_params'])})" if objective["kd_params"] else ""
    return (f"{what} {student}, distilled from {_taught_by(settings['teacher'], teachers)} by "
            f"{objective['kd_objective']}{parameters} at temperature {objective['kd_temperature']:g}; "
            f"loss = (1 - {objective['kd_rate']:g}) cross-entropy + {objective['kd_rate']:g} divergence.")


def _taught_by(settings: Mapping[str, Any], teachers: Sequence[Base]) -> str:
    if not teachers:
        return f"the teacher `{settings['teacher_callable']}`"
    if len(teachers) == 1:
        return f"the teacher {teachers[0]}"
    weights = settings["teacher_weights"] or [1] * len(teachers)
    return "the mean of the teachers " + ", ".join(f"{teacher} (weight {weight:g})"
                                                   for teacher, weight in zip(teachers, weights, strict=True))


def _loading(student: Base, lora: bool) -> str:
    if not lora:
        return ('from transformers import AutoModelForCausalLM, AutoTokenizer\n\n'
                'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")\n'
                'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")')
    return ('from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n'
            f'base = AutoModelForCausalLM.from_pretrained("{student.hub_name or student.path}")\n'
            'model = PeftModel.from_pretrained(base, "THIS_FOLDER").merge_and_unload()\n'
            'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")')


def _table(header: tuple[str, str], rows: Mapping[str, str]) -> str:
    lines = [header, ("---", "---"), *rows.items()]
    return "\n".join(f"| {left} | {right} |" for left, right in lines)


def _named(licence: str) -> str:
    return f"the {licence} licence" if " " not in licence else f"the {licence}"
