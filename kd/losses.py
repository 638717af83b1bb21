"""The three losses of distillation. Their weighted sum trains a student.

To try another loss, L_x: write its equation here, add it to `distillation_losses`, and give its
weight an option `loss_x` in `training/settings.py`. In the first --layer-only-steps of a run only
L_layer is computed.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from controlnet import Prediction


def diffusion_loss(noise_pred: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """L_d = ||noise_pred - target||^2, the loss of every diffusion model; mean over all elements.

    Both (B, 4, H, W). `target`: the noise, or v for a UNet that predicts v. `weights`: (B,), what
    each sample counts, by its timestep.
    """
    error = (noise_pred - target).square()
    return (error if weights is None else weights.view(-1, 1, 1, 1) * error).mean()


def teacher_loss(noise_pred: Tensor, teacher_noise_pred: Tensor,
                 weights: Tensor | None = None) -> Tensor:
    """L_td = ||noise_pred - teacher's noise_pred||^2: predict what the UNet predicts under the
    teacher's control; mean over all elements. No gradient reaches the teacher."""
    return diffusion_loss(noise_pred, teacher_noise_pred.detach(), weights)


def layer_errors(student_out: Sequence[Tensor], teacher_out: Sequence[Tensor],
                 teacher_variance: Sequence[Tensor]) -> Tensor:
    """(13,): for each output ||(A_t - mu_t) / sigma_t - (A_s - mu_t) / sigma_t||^2, mean over all
    elements. The mean cancels, so it is ||A_t - A_s||^2 / sigma_t^2.

    Both are normalised with the *teacher's* statistics over the whole batch, so that every layer
    counts the same however large its values are, and the student has to match scale and offset too;
    normalised with its own it would not. No gradient reaches the teacher.

    The papers leave open what sigma_t^2 is a variance over. An output A is (B, C, H, W), and

        layer     sigma_t^2    = var A[:, :, :, :], over B, C, H and W: a number (), the default
        channel   sigma_t,c^2  = var A[:, c, :, :], over B, H and W:    a number each channel, (C,)

    By channel, each one counts the same within its layer too, also one in which little happens.
    """
    if len(student_out) != len(teacher_out):
        raise ValueError(f"expected as many outputs of the student as of the teacher, "
                         f"{len(teacher_out)}, got {len(student_out)}")
    errors = []
    for a_s, a_t, variance in zip(student_out, teacher_out, teacher_variance, strict=True):
        square = (a_t.detach().float() - a_s.float()).square()
        error = square.mean(dim=(-2, -1)) if variance.ndim else square.mean()
        error = error / variance.detach().clamp_min(1e-8)  # an untrained teacher's is zero
        errors.append(error.mean())
    return torch.stack(errors)


def layerwise_loss(student_out: Sequence[Tensor], teacher_out: Sequence[Tensor],
                   teacher_variance: Sequence[Tensor] | None = None) -> Tensor:
    """L_layer: the mean of `layer_errors` over the 13 outputs. `teacher_variance`: one an output,
    () or by channel (C,), over the batches of all processes; one number of this batch if it is not
    given."""
    variance = teacher_variance or [a_t.float().var() for a_t in teacher_out]
    return layer_errors(student_out, teacher_out, variance).mean()


def connected(student: Prediction, *others: Sequence[Tensor]) -> list[list[Tensor]]:
    """Drop the student's unconnected outputs (small mode), and the same entries of `others`."""
    pairs = [pair for pair in zip(student.control, *others, strict=True) if pair[0] is not None]
    return [list(column) for column in zip(*pairs, strict=True)]


def distillation_losses(student: Prediction, teacher: Prediction | None, target: Tensor,
                        teacher_variance: Sequence[Tensor] | None = None,
                        weights: Tensor | None = None) -> dict[str, Tensor]:
    """Every loss that the two predictions allow, by name: L_layer with a teacher, L_d with a
    noise_pred (not in the first phase, which does not decode), L_td with both. `weights`: (B,),
    what each sample counts in L_d and L_td."""
    losses = {}
    if teacher:
        others = [teacher.control] + ([teacher_variance] if teacher_variance else [])
        losses["L_layer"] = layerwise_loss(*connected(student, *others))
    if student.noise_pred is not None:
        losses["L_d"] = diffusion_loss(student.noise_pred, target, weights)
        if teacher:
            losses["L_td"] = teacher_loss(student.noise_pred, teacher.noise_pred, weights)
    return losses


def weighted_sum(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The loss that is minimised."""
    return sum(weights[name] * loss for name, loss in losses.items())
