"""A plugin for the runs of the benchmarks: what a process uses in its steps, start and evaluation apart.

    python -m todi.train --plugins benchmarks/step_usage.py --report-to step_usage ...     # writes RUN/usage.json
"""

import json
import resource
from collections.abc import Mapping
from typing import Any

from todi.training.monitors import MONITORS, RunInfo


@MONITORS.register("step_usage")
class StepUsage:
    """Seconds of processor time in the program and in the kernel, and pages mapped, from the end of the second step on.

    In the first two memory is used that was never used before.
    """

    def __init__(self, run: RunInfo):
        self._file = run.folder / "usage.json"
        self._before: tuple[float, ...] = ()

    def step_done(self, step: int) -> None:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        now = (usage.ru_utime, usage.ru_stime, usage.ru_minflt)
        if step == 2:
            self._before = now
        elif step > 2:
            used = [later - earlier for later, earlier in zip(now, self._before, strict=True)]
            self._file.write_text(json.dumps(dict(zip(("user", "system", "faults"), used, strict=True))))

    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass
