"""The settings of a teacher cache."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from todi.options import option
from todi.settings.shared import (
    allocator_option,
    plugins_option,
    precision_option,
    teacher_cache_dtype_option,
    trust_remote_code_option,
)
from todi.settings.training import DataConfig, TeacherConfig


@dataclass(frozen=True)
class CacheConfig:
    """Makes a teacher cache, describes one, or compares one with its teacher."""

    command: str = option("", "what to do", choices=("build", "info", "verify"), flag="command")
    folder: str = option("", "of the cache", flag="folder")
    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    precision: str = precision_option()
    allocator: str = allocator_option()
    teacher_cache_dtype: str = teacher_cache_dtype_option()
    trust_remote_code: bool = trust_remote_code_option()
    plugins: tuple[str, ...] = plugins_option()
    samples: int = option(32, "samples that verify runs the teacher over again", least=0)
    seed: int = option(0, "of the choice of these samples")

    def rules(self) -> Iterator[str]:
        """What is wrong between these settings, a sentence each."""
        teachers = self.teacher.teacher_model_path
        if self.command == "build" and not teachers:
            yield "--teacher-model-path is required"
        if len(teachers) > 1:
            yield f"--teacher-model-path: a cache is of one teacher, got {' '.join(teachers)}; make one of each"
