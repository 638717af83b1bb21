"""Floor 3: what the distillation papers say. The student architectures, their start from the
teacher, and the losses. Nothing about runs, files or command lines."""

from common.lazy import on_first_use

# The students' names. Each is the name of a function in kd/students.py, which says what it is.
STUDENTS = ("original", "reduced_channel", "reduced_layer", "modulated", "loha", "mlp", "lite")

# Two of them as a paper draws them: one choice made otherwise, to compare (docs/experiments.md).
ALTERNATIVES = ("modulated_layers", "loha_convolutions")

__getattr__ = on_first_use(__name__, {
    "losses": ["diffusion_loss", "layerwise_loss", "teacher_loss"],
    "students": ["build_student"],
})
