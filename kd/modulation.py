"""Modulation: a scale and a shift for every channel, so that outputs that share a layer need not share its size (FiLM, Perez et al. 2018)."""

import torch
from torch import Tensor, nn


class Modulation(nn.Module):
    """h -> scale * h + shift, one scale and one shift a channel; the identity at the start."""

    def __init__(self, channels: int):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, h: Tensor) -> Tensor:
        return self.scale[:, None, None] * h + self.shift[:, None, None]    # (B, C, H, W)
