"""The shipped tiny model, Stable Diffusion 1.x at a tenth of the width for 64 x 64 circles; its
ControlNet, which `make.py` makes with it; and the students that were distilled from that."""

from pathlib import Path

SD = Path(__file__).parent / "sd.safetensors"
CONTROLNET = SD.with_name("controlnet.safetensors")
STUDENTS = SD.with_name("students")  # a folder of NAME.safetensors

# The same model for 1 to 4 steps (few_steps.py), its ControlNet and students.
TURBO = Path(__file__).parent / "turbo" / "sd.safetensors"
TURBO_CONTROLNET = TURBO.with_name("controlnet.safetensors")
TURBO_STUDENTS = TURBO.with_name("students")


def is_base(checkpoint: Path) -> bool:
    """Whether a --checkpoint is this model: what is shipped beside it fits no other."""
    return checkpoint.absolute() == SD.absolute()
