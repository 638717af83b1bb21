"""Floor 4: files <-> modules and nothing else. Base models, control networks, conversion between
namings, transfer to another base, download; tiny/ holds the shipped models."""

from common.lazy import on_first_use

__getattr__ = on_first_use(__name__, {
    "controlnet": ["load_controlnet", "save_controlnet"],
    "stable_diffusion": ["StableDiffusion", "load_stable_diffusion", "save_stable_diffusion"],
})
