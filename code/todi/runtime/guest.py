"""Being a guest in somebody's process, as a library is: everything is left as it was."""

import logging
import os
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
import transformers
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from todi.runtime.logs import Backlog


@contextmanager
def as_guest() -> Iterator[None]:
    """Until the block ends, this project runs in a process of the caller's; then the process is what it was.

    Random numbers, environment, logging, warnings, sys.excepthook (torch sets it with a process group), transformers'
    verbosity, the current GPU and TF32 are put back; what else a run takes (signal handlers, lock, process group) it
    gives back itself.
    """
    with ExitStack() as stack, warnings.catch_warnings():
        stack.callback(setattr, sys, "excepthook", sys.excepthook)
        for part in (_random_numbers, _environment, _logging, _transformers, _gpu):
            stack.enter_context(part())
        yield


@contextmanager
def _random_numbers() -> Iterator[None]:
    python, arrays, tensors = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
        torch.set_rng_state(tensors)
        if on_gpus is not None:
            torch.cuda.set_rng_state_all(on_gpus)


@contextmanager
def _environment() -> Iterator[None]:
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def _logging() -> Iterator[None]:
    """All lines are made, for train.log; the caller sees those that it would have seen."""
    ours = logging.getLogger("todi")
    handlers, propagate, level, wanted = ours.handlers, ours.propagate, ours.level, ours.getEffectiveLevel()
    ours.handlers, ours.propagate = [_ToCaller(wanted, handlers, propagate), Backlog()], False
    ours.setLevel(min(wanted, logging.INFO))
    try:
        yield
    finally:
        ours.handlers, ours.propagate = handlers, propagate
        ours.setLevel(level)


class _ToCaller(logging.Handler):
    """Hands records on to the handlers that the caller gave this project's logger, and to those above it."""

    def __init__(self, level: int, handlers: list[logging.Handler], propagate: bool):
        super().__init__(level)
        self.caller = logging.Logger("todi")
        self.caller.handlers, self.caller.propagate = handlers, propagate
        self.caller.parent = logging.getLogger("todi").parent

    def emit(self, record: logging.LogRecord) -> None:
        self.caller.callHandlers(record)


@contextmanager
def _transformers() -> Iterator[None]:
    """Its bars and remarks on loading would come between the lines of a progress bar."""
    its = transformers.utils.logging
    verbosity, bars, no_downloads = its.get_verbosity(), its.is_progress_bar_enabled(), are_progress_bars_disabled()
    its.set_verbosity_error()
    its.disable_progress_bar()
    try:
        yield
    finally:
        its.set_verbosity(verbosity)
        if bars:
            its.enable_progress_bar()  # and those of downloads
        (disable_progress_bars if no_downloads else enable_progress_bars)()


@contextmanager
def _gpu() -> Iterator[None]:
    current = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    tf32 = torch.backends.cuda.matmul.allow_tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        if current is not None:
            torch.cuda.set_device(current)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
