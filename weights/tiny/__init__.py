"""The shipped tiny model, Stable Diffusion 1.x at a tenth of the width for 64 x 64 circles; its
ControlNet, which `make.py` makes with it; and the students that were distilled from that."""

from pathlib import Path

SD = Path(__file__).parent / "sd.safetensors"
CONTROLNET = SD.with_name("controlnet.safetensors")
STUDENTS = SD.with_name("students")  # a folder of NAME.safetensors


def is_base(checkpoint: Path) -> bool:
    """Whether a --checkpoint is this model: what is shipped beside it fits no other."""
    return checkpoint.absolute() == SD.absolute()
