"""The page of all settings."""

from todi.options import markdown_tables
from todi.settings.caching import CacheConfig
from todi.settings.decoding import DecodingConfig
from todi.settings.evaluation import EvalConfig
from todi.settings.generation import GenerateConfig
from todi.settings.launchers import LAUNCHER_VARIABLES
from todi.settings.simulation import ClusterConfig
from todi.settings.training import DataConfig, TeacherConfig, TrainConfig


def page() -> str:
    """docs/settings.md."""
    launchers = "\n".join(f"| `{name}` | {help} |" for name, help in LAUNCHER_VARIABLES.items())
    return f"""# Settings

Made from the declarations in `code/todi/settings/` by `python -m todi.settings > docs/settings.md`.

A launcher takes the variables; its words go to the Python command as they are, and win. A variable that is empty is not
given. Of a list the values are separated by spaces, quoted as in a shell. Yes and no are `1` and `0`. A name that no
setting has, but nearly, is refused.

## Training: `python -m todi.train`, `todi.doctor`

"At resume" says what may change when a run goes on: "may change", for it does not alter what is computed; "with force",
under `RESUME=force` alone, which says what changes and computes with the new value from there on; "fixed", never, for a
resume state holds it. Of what is not a setting, the data may change with force; the student's files, the
samples of a step (over all devices) and of an epoch are fixed. [deepspeed.md](deepspeed.md) has the keys of a DeepSpeed
file.

{markdown_tables(TrainConfig, ("variable", "option", "default", "allowed", "at resume", "meaning"))}

## Simulation: `python -m todi.doctor`

With the settings above it says what a run will need on other machines, by arithmetic: [scaling.md](scaling.md).

{markdown_tables(ClusterConfig, ("option", "default", "allowed", "meaning"))}

## What launchers understand besides

`PEFT=full` trains every weight though the launcher has an adapter; `TEACHER_PEFT_PATH=none` leaves the teacher's out.

| variable | meaning |
| --- | --- |
{launchers}

## Evaluation: `python -m todi.evaluate`

{markdown_tables(EvalConfig, ("variable", "option", "default", "allowed", "meaning"))}

## Teacher text: `python -m todi.generate`

Besides its own, the settings of how a response is written above.

{markdown_tables(GenerateConfig, ("variable", "option", "default", "allowed", "meaning"), leave_out=(DecodingConfig,))}

## Teacher cache: `python -m todi.cache`

Besides its own, the settings of the teacher and of the data above.

{markdown_tables(CacheConfig, ("option", "default", "allowed", "meaning"), leave_out=(TeacherConfig, DataConfig))}
"""
