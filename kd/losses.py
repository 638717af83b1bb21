"""The three losses of distillation. Their sum, each with its weight, trains a student; teacher and Stable Diffusion are frozen.

Letters: eps_s what the UNet predicts under the student's control, eps_t under the teacher's, eps the noise that was added.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def diffusion_loss(eps_s: Tensor, eps: Tensor) -> Tensor:
    """L_d = ||eps_s - eps||^2, the loss of every diffusion model; mean over all elements. Both (B, 4, H, W)."""
    return (eps_s - eps).square().mean()


def teacher_loss(eps_s: Tensor, eps_t: Tensor) -> Tensor:
    """L_td = ||eps_s - eps_t||^2: predict what the teacher makes the UNet predict; mean over all elements. No gradient to the teacher."""
    return (eps_s - eps_t.detach()).square().mean()


def layerwise_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """L_layer: mean over the 13 outputs of ||(A_t - mu_t) / sigma_t - (A_s - mu_t) / sigma_t||^2 = ||A_t - A_s||^2 / sigma_t^2.

    Both are normalised with the *teacher's* mean and deviation (over the whole tensor), so that every layer counts the same however
    large its values are, and the student has to match scale and offset too; with its own statistics it would not. The mean cancels.
    The teacher's statistics do not depend on the student, and no gradient reaches the teacher.
    """
    if len(student) != len(teacher):
        raise ValueError(f"expected as many outputs of the student as of the teacher, {len(teacher)}, got {len(student)}")
    losses = []
    for a_s, a_t in zip(student, teacher, strict=True):
        a_t = a_t.detach().float()
        variance = a_t.var().clamp_min(1e-8)  # an untrained teacher's outputs are all zero
        losses.append((a_t - a_s.float()).square().mean() / variance)
    return torch.stack(losses).mean()
