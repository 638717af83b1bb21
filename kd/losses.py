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


def layer_errors(student: Sequence[Tensor], teacher: Sequence[Tensor], variance: Sequence[Tensor], by_sample: bool = False) -> Tensor:
    """(13,): of each output ||(A_t - mu_t) / sigma_t - (A_s - mu_t) / sigma_t||^2 = ||A_t - A_s||^2 / sigma_t^2, mean over all elements.

    (13, B) `by_sample`: mean over each sample's elements.
    Both are normalised with the *teacher's* mean and deviation (over the whole batch), so that every layer counts the same however
    large its values are, and the student has to match scale and offset too; with its own statistics it would not. The mean cancels.
    The teacher's `variance`, one an output, does not depend on the student, and no gradient reaches the teacher.
    """
    if len(student) != len(teacher):
        raise ValueError(f"expected as many outputs of the student as of the teacher, {len(teacher)}, got {len(student)}")
    errors = []
    for a_s, a_t, sigma2 in zip(student, teacher, variance, strict=True):
        error = (a_t.detach().float() - a_s.float()).square()
        mean = error.flatten(1).mean(dim=1) if by_sample else error.mean()
        errors.append(mean / sigma2.detach().clamp_min(1e-8))  # an untrained teacher's outputs are zero
    return torch.stack(errors)


def layerwise_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """L_layer: the mean of `layer_errors` over the 13 outputs."""
    return layer_errors(student, teacher, [a_t.float().var() for a_t in teacher]).mean()
