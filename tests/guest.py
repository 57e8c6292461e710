"""A program that uses the library as a host would, and compares its process before and after.

    python tests/guest.py PLAN.json OUTPUT.json

The plan has `student`, `teacher`, `data`, `sets_dir`, `folder` and `settings`.
"""

import gc
import json
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import psutil
import todi
import todi.api  # what importing leaves behind is no call's
import torch
import torch.distributed as dist
import transformers
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import groups
from todi.training.monitors import MONITORS, RunInfo

STEP = 3


def snapshot() -> dict[str, object]:
    """What a process has that a library could leave changed, in words."""
    gc.collect()  # what a signal cut short is freed in time, as in any program
    loggers = {name: logging.getLogger(name) for name in (None, "todi", "transformers", "DeepSpeed", "torch")}
    return {
        "signals": {number: str(signal.getsignal(number)) for number in (1, 2, 10, 12, 13, 15, 17)},
        "loggers": {str(name): [str(one.handlers), one.propagate, one.level, one.disabled, one.filters]
                    for name, one in loggers.items()},
        "transformers": [transformers.utils.logging.get_verbosity(),
                         transformers.utils.logging.is_progress_bar_enabled()],
        "environment": dict(os.environ),
        "python's numbers": str(random.getstate()), "numpy's numbers": str(np.random.get_state()),
        "torch's numbers": str(torch.get_rng_state().tolist()),
        "process group": [dist.is_initialized() and dist.get_backend(), str(groups._WORLD_GROUP)],
        "torch": [str(torch.get_default_dtype()), torch.is_grad_enabled(), torch.get_num_threads(),
                  torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()],
        "engines": sum(isinstance(one, DeepSpeedEngine | ZeROOptimizer) for one in gc.get_objects()),
        "threads": sorted(thread.name for thread in threading.enumerate() if "TMonitor" not in type(thread).__name__),
        "files": sorted(file.path for file in psutil.Process().open_files()),
        "warnings": str(warnings.filters), "excepthook": str(sys.excepthook),
        "path": [place for place in sys.path if "setuptools" not in place],  # it adds to it when DeepSpeed imports it
        "others": [os.getcwd(), gc.isenabled(), matplotlib.rcParams._get_backend_or_none()],
    }


def is_free(folder: Path) -> bool:
    """Whether nobody holds the lock of a run."""
    return not (folder / ".lock").exists()


@MONITORS.register("stopper")
class Stopper:
    """Signals this process at a step, as Ctrl-C does."""

    number = signal.SIGINT

    def __init__(self, run: RunInfo):
        self.started = run.step

    def log(self, kind: str, step: int, values: dict) -> None:
        if step == STEP and not self.started:
            signal.raise_signal(self.number)

    def close(self) -> None:
        pass


class Host:
    """A program of somebody's, that calls the library and looks at its own process before and after.

    Attributes:
        changed: by the name of a call, what it left changed: before and after.
        heard: log lines and signals that reached the host.
    """

    def __init__(self):
        self.changed, self.heard = {}, []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: self.heard.append(record.getMessage())
        logging.getLogger().addHandler(handler)
        signal.signal(signal.SIGTERM, lambda number, frame: self.heard.append("SIGTERM"))
        random.seed(1)
        np.random.seed(2)
        torch.manual_seed(3)

    def call(self, name: str, function: Callable, *words: object, **settings: object) -> object:
        """What the function returns, or the KeyboardInterrupt or InputError that it raises."""
        before = snapshot()
        try:
            returned = function(*words, **settings)
        except (KeyboardInterrupt, todi.InputError) as error:
            returned = error
        after = snapshot()
        self.changed[name] = {what: [before[what], after[what]] for what in before if before[what] != after[what]}
        return returned


def losses(result: object) -> list[float]:
    return [line["loss"] for line in result.of("train")]


def calls(host: Host, folder: Path, plan: dict, common: dict) -> dict[str, object]:
    """Two runs, an evaluation, and one that is refused."""
    first = host.call("distil", todi.distil, save_dir=folder / "first", **common)
    second = host.call("another", todi.distil, save_dir=folder / "second", **common | {"teacher": None},
                       objective="cross_entropy", peft="lora", peft_lora_r=4)
    evaluation = host.call("evaluate", second.evaluate, ["tiny"], sets_dir=plan["sets_dir"], seeds=[1])
    refused = host.call("refused", todi.distil, save_dir=folder / "third", lr_rate=1, **common)
    return {"first": losses(first), "second": losses(second), "scores": evaluation.scores, "refused": str(refused),
            "free": [is_free(run.folder) for run in (first, second)], "text": [repr(first), repr(evaluation)],
            "html": [first._repr_html_(), evaluation._repr_html_()],
            "best": [str(first.best), str(second.best)]}


def stops(host: Host, folder: Path, common: dict) -> dict[str, object]:
    """Ctrl-C in a script, and in a notebook that then goes on; SIGTERM; a thread, where signals are not seen."""
    stop = {"report_to": "stopper", **common}
    found = {"script": repr(host.call("in a script", todi.distil, save_dir=folder / "script", **stop))}
    sys.ps1 = ">>> "
    for name in ("early", "late"):
        result = host.call(name, todi.distil, save_dir=folder / "notebook", **stop)
        found[name] = {"stopped": result.stopped, "losses": losses(result), "text": repr(result)}
    Stopper.number = signal.SIGTERM
    host.call("terminated", todi.distil, save_dir=folder / "terminated", **stop)
    thread = threading.Thread(target=lambda: found.update(
        thread=losses(todi.distil(save_dir=folder / "thread", **common))))
    thread.start()
    thread.join()
    return found


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(plan["folder"])
    common = {"student": plan["student"], "teacher": plan["teacher"], "data": plan["data"], **plan["settings"]}
    if plan["own_group"]:  # a host's own: it must be there afterwards, and work
        dist.init_process_group("gloo")
    host = Host()
    found = calls(host, folder, plan, common)
    if "RANK" not in os.environ:
        found |= stops(host, folder, common)
    if plan["own_group"]:
        total = torch.ones(1)
        dist.all_reduce(total)
        found["all reduced"] = total.item()
    if os.environ.get("RANK", "0") == "0":
        Path(sys.argv[2]).write_text(json.dumps(found | {"changed": host.changed, "heard": host.heard}))


if __name__ == "__main__":
    main()
