"""The settings: of a training run, of an evaluation, of a teacher cache. Each is declared here and nowhere else.

Nothing below the entry points and the builders ever sees these classes.
"""

from todi.settings.caching import CacheConfig
from todi.settings.evaluation import EvalConfig
from todi.settings.launchers import LAUNCHER_VARIABLES
from todi.settings.published import PUBLISHED
from todi.settings.samples import SamplesConfig
from todi.settings.shared import (
    AUTO_TOKENIZER,
    CACHE_MODES,
    CROSS_ENTROPY,
    KERNELS,
    ROUGE_TOKENIZERS,
    SET_NAME,
    TODAY,
    named_numbers,
    recorded,
)
from todi.settings.training import (
    DataConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    StudentConfig,
    TeacherCacheConfig,
    TeacherConfig,
    TrainConfig,
)

__all__ = [
    "AUTO_TOKENIZER", "CACHE_MODES", "CROSS_ENTROPY", "CacheConfig", "DataConfig", "EvalConfig", "KERNELS",
    "LAUNCHER_VARIABLES", "ObjectiveConfig", "OptimConfig", "PUBLISHED", "ROUGE_TOKENIZERS", "RunConfig",
    "SET_NAME", "SamplesConfig", "StudentConfig", "TODAY", "TeacherCacheConfig", "TeacherConfig", "TrainConfig",
    "named_numbers", "recorded",
]
