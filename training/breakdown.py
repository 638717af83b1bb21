"""Losses by timestep and by layer, for the log: the total is nearly flat, because most of it is
noise that nobody can predict."""

from collections.abc import Sequence

import torch
from torch import Tensor

from controlnet import Prediction
from diffusion import TIMESTEPS
from kd.losses import connected, diffusion_loss, layer_errors, teacher_loss

BUCKETS = 4  # quarters of [0, 1000): the first polishes details, the last decides on the layout
COUNTS = "samples by timestep"


def by_timestep(losses: Tensor, timesteps: Tensor) -> Tensor:
    """(4,): losses (B,) summed over the samples with a timestep (B,) in each quarter."""
    buckets = timesteps * BUCKETS // TIMESTEPS
    return losses.new_zeros(BUCKETS).index_add(0, buckets, losses)


@torch.no_grad()
def breakdown(student: Prediction, teacher: Prediction | None, target: Tensor, timesteps: Tensor,
              teacher_variance: Sequence[Tensor] | None) -> dict[str, Tensor]:
    """Sums over the batch's samples by bucket, and the 13 layers' errors; `averages` reads them.

    The losses are those of `kd.losses`, applied to each sample alone by `torch.vmap`.
    """
    ones = torch.ones(len(timesteps), device=timesteps.device)
    sums = {COUNTS: by_timestep(ones, timesteps), "passes": ones[0]}
    if teacher:
        outputs = connected(student, teacher.control, teacher_variance)
        errors = torch.vmap(layer_errors, in_dims=(0, 0, None), out_dims=1)(*outputs)  # (13, B)
        sums["L_layer shares"] = errors.mean(dim=1)
        sums["L_layer by timestep"] = by_timestep(errors.mean(dim=0), timesteps)
    if student.noise_pred is not None:
        losses = torch.vmap(diffusion_loss)(student.noise_pred, target)                # (B,)
        sums["L_d by timestep"] = by_timestep(losses, timesteps)
        if teacher:
            losses = torch.vmap(teacher_loss)(student.noise_pred, teacher.noise_pred)
            sums["L_td by timestep"] = by_timestep(losses, timesteps)
    return sums


def gradient_norm(norm: Tensor) -> dict[str, Tensor]:
    """The norm of a step's gradient for the log; not of a step that is not taken for it."""
    return {"gradient": torch.where(norm.isfinite(), norm, 0), "steps": torch.ones_like(norm)}


def add_to(sums: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Add what the log will show to sums that stay on the device, in float64."""
    for name, value in values.items():
        sums[name] = sums.get(name, 0) + value.detach().double()


def averages(sums: dict[str, Tensor]) -> dict[str, float | list[float | None]]:
    """A log entry: sums over forward passes and steps become means, the layers' errors shares.

    The mean of a bucket without samples is None.
    """
    sums = {name: value.cpu() for name, value in sums.items()}
    passes, steps, counts = sums.pop("passes"), sums.pop("steps", None), sums.pop(COUNTS).tolist()
    entry = {}
    for name, value in sums.items():
        if name.endswith("shares"):
            entry[name] = (value / value.sum()).tolist()
        elif name.endswith("by timestep"):
            pairs = zip(value.tolist(), counts, strict=True)
            entry[name] = [total / count if count else None for total, count in pairs]
        else:
            entry[name] = (value / (steps if name == "gradient" else passes)).tolist()
    return entry
