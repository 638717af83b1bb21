"""One forward and backward pass as in `train.py`'s loop, for the benchmarks of its cost."""

import torch
from torch import Tensor

from controlnet import ControlledUNet
from kd.losses import distillation_losses
from training import parallel
from training.breakdown import breakdown
from unet import UNet


def forward_backward(unet: UNet, student: ControlledUNet, teacher_unet: ControlledUNet | None,
                     inputs: tuple[Tensor, ...], target: Tensor, *, layer_only: bool = False,
                     bf16: bool = False) -> None:
    """`inputs`: noisy latents, condition, timesteps and text states. `target`: the noise.
    `teacher_unet`: the UNet under the teacher's control. `layer_only`: L_layer alone."""
    noisy_latents, _, timesteps, context = inputs
    with torch.autocast(noisy_latents.device.type, torch.bfloat16, enabled=bf16):
        with torch.no_grad():
            features = None if layer_only else unet.encode(noisy_latents, timesteps, context)
            teacher_out = teacher_unet and teacher_unet(*inputs, features)
        student_out = student(*inputs, features)
    variance = teacher_out and parallel.variances(teacher_out.control)
    losses = distillation_losses(student_out, teacher_out, target, variance)
    sum(losses.values()).backward()
    breakdown(student_out, teacher_out, target, timesteps, variance)
