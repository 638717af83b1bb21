"""The drawings model: the tiny model's shape, for 128 x 128 pictures of OpenMoji's drawings, which
`make.py` makes, and the data that it is made from. CC BY-SA 4.0, see NOTICE."""

from pathlib import Path

DATA = Path(__file__).parent / "data"  # train/ and held_out/, made by data/openmoji.py
SD = Path(__file__).parent / "sd.safetensors"
CONTROLNET = SD.with_name("controlnet.safetensors")
STUDENTS = SD.with_name("students")  # a folder of NAME.safetensors
