"""Knowledge distillation: light students of a ControlNet."""

from kd.losses import diffusion_loss, layerwise_loss, teacher_loss
from kd.students import STUDENTS, build_student

__all__ = ["STUDENTS", "build_student", "diffusion_loss", "layerwise_loss", "teacher_loss"]
