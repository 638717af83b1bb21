"""Which timesteps a run trains on, and how much an error counts at each of them."""

import torch
from torch import Tensor

from diffusion import TIMESTEPS, ddim_timesteps, x0_weights


def training_timesteps(choice: str) -> Tensor:
    """(N,) timesteps that are drawn from, ascending. `choice`: `uniform`, all of them, or
    SPACING:N, those at which N steps of sampling meet the network: whoever takes no others needs
    no others."""
    if choice == "uniform":
        return torch.arange(TIMESTEPS)
    spacing, steps = choice.split(":")
    return torch.tensor(ddim_timesteps(int(steps), spacing)).flip(0)


def error_weights(choice: str, weighting: str, prediction: str) -> Tensor | None:
    """(1000,) what a squared error of the prediction counts at each timestep; None: 1 everywhere.

    `weighting` x0: as much as the picture x0 suffers from it (`x0_weights`), divided by its mean
    over the timesteps that are trained on, so that the losses keep their size."""
    if weighting == "noise":
        return None
    weights = x0_weights(torch.arange(TIMESTEPS), prediction)
    return (weights / weights[training_timesteps(choice)].mean()).float()
