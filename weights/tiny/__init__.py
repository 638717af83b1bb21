"""The shipped tiny model, Stable Diffusion 1.x at a tenth of the width for 64 x 64 circles, its
teacher ControlNet and the students; `make.py` made it."""

from pathlib import Path

SD = Path(__file__).parent / "sd.safetensors"
CONTROLNET = SD.with_name("controlnet.safetensors")
STUDENTS = SD.with_name("students")
