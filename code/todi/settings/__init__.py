"""The settings: of a training run, an evaluation, teacher text, a teacher cache. Each is declared here and nowhere
else.

Nothing below the entry points and the builders ever sees these classes.
"""

from todi.settings.caching import CacheConfig
from todi.settings.decoding import DecodingConfig
from todi.settings.evaluation import EvalConfig
from todi.settings.generation import GenerateConfig
from todi.settings.launchers import LAUNCHER_VARIABLES
from todi.settings.published import PUBLISHED
from todi.settings.samples import SamplesConfig
from todi.settings.shared import (
    AUTO_TOKENIZER,
    CACHE_MODES,
    CROSS_ENTROPY,
    KERNELS,
    NO_ADAPTER,
    ROUGE_TOKENIZERS,
    SET_NAME,
    TODAY,
    named_numbers,
    recorded,
)
from todi.settings.simulation import ClusterConfig, DoctorConfig
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
    "AUTO_TOKENIZER", "CACHE_MODES", "CROSS_ENTROPY", "CacheConfig", "ClusterConfig", "DataConfig", "DecodingConfig",
    "DoctorConfig", "EvalConfig", "GenerateConfig", "KERNELS", "LAUNCHER_VARIABLES", "NO_ADAPTER", "ObjectiveConfig",
    "OptimConfig", "PUBLISHED", "ROUGE_TOKENIZERS", "RunConfig", "SET_NAME", "SamplesConfig", "StudentConfig", "TODAY",
    "TeacherCacheConfig", "TeacherConfig", "TrainConfig", "named_numbers", "recorded",
]
