"""ToDi: token-wise distillation of language models via fine-grained divergence control.

    import todi

    result = todi.distil(student="model_hub/small", teacher="model_hub/large", data="data/mine", save_dir="outputs/m")
    result.evaluate(sets=["mine"])

docs/library.md has the rest. What is named here is imported when it is first used.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "distil": "todi.api", "ToDiTrainer": "todi.hf_trainer", "InputError": "todi.errors", "RunError": "todi.errors",
    "encode_file": "todi.hf_teachers",
}
__all__ = ["InputError", "RunError", "ToDiTrainer", "distil", "encode_file", "evaluate"]


def __getattr__(name: str) -> Any:
    if name == "evaluate":  # a module that can be called; see its end
        return importlib.import_module("todi.evaluate")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'todi' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
