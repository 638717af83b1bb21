"""The student architectures: each is a ControlNet with a few words changed, and starts exactly at the base model (y_c = y)."""

from collections.abc import Callable
from dataclasses import replace

import torch

from controlnet import ControlNet
from unet import UNet
from unet.blocks import initialize


def reduced_layer(unet: UNet) -> ControlNet:
    """One residual block a level instead of two, and one in the middle without attention: 13 outputs from 9 backbone layers.

    Neighbouring layers of a ControlNet say nearly the same, so one layer can feed several of the UNet's skip connections, each through
    its own zero convolution: on SD 1.5 outputs 1 and 2 share a layer, 4 and 5, 7 and 8, 10 and 11. E(c) is the paper's, a seventh of
    the released block's work.
    """
    return ControlNet(replace(unet.config, num_res_blocks=1, middle_attention=False), target=unet.config, paper_encoder=True)


STUDENTS: dict[str, Callable[[UNet], ControlNet]] = {"reduced_layer": reduced_layer}


def build_student(name: str, unet: UNet, generator: torch.Generator | None = None) -> ControlNet:
    """A student with fresh weights for this UNet, by its name in STUDENTS; the weights are drawn from `generator` if one is given.

    Raises ValueError for an unknown name.
    """
    if name not in STUDENTS:
        raise ValueError(f"expected a student among {', '.join(STUDENTS)}, got {name!r}")
    student = STUDENTS[name](unet)
    student.architecture = name
    return student if generator is None else initialize(student, generator)
