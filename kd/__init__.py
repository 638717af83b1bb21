"""Floor 3: what the distillation papers say. The student architectures, their start from the
teacher, and the losses. Nothing about runs, files or command lines."""

from kd.losses import diffusion_loss, layerwise_loss, teacher_loss
from kd.students import STUDENTS, build_student

__all__ = ["STUDENTS", "build_student", "diffusion_loss", "layerwise_loss", "teacher_loss"]
