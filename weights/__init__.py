"""Floor 4: files <-> modules and nothing else. Base models, control networks, conversion between
namings, transfer to another base, download; tiny/ holds the shipped models."""

from weights.controlnet import load_controlnet, save_controlnet
from weights.stable_diffusion import StableDiffusion, load_stable_diffusion, save_stable_diffusion

__all__ = ["StableDiffusion", "load_controlnet", "load_stable_diffusion", "save_controlnet",
           "save_stable_diffusion"]
