"""Knowledge distillation: light students of a ControlNet."""

from kd.ablations import ABLATIONS, FinetunedEncoder
from kd.lite import Lite
from kd.losses import diffusion_loss, layerwise_loss, teacher_loss
from kd.students import STUDENTS, build_student

# Every architecture that a file can name, besides the ControlNet (which shapes tell): the base's config -> network.
ARCHITECTURES = STUDENTS | {"lite_encoder": lambda config: Lite(config, connects_to="encoder"), "finetune": FinetunedEncoder}

__all__ = ["ABLATIONS", "ARCHITECTURES", "STUDENTS", "build_student", "diffusion_loss", "layerwise_loss", "teacher_loss"]
