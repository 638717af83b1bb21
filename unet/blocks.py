"""The parts of the denoiser: timestep embedding, residual block, down- and upsampling.

Letters in the shapes of this folder: B batch, C channels, H W height and width of a feature map,
N tokens (or pixels), D width of a token, E width of the time embedding.
"""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding of timesteps (B,) -> (B, dim) in float32, cosines first,
    wavelengths from 2 pi to 10,000 * 2 pi in geometric steps (Vaswani et al. 2017, section 3.5)."""
    half = dim // 2
    index = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequencies = torch.exp(-math.log(10_000) * index / half)
    angles = timesteps.float()[:, None] * frequencies[None]     # (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def zero_module(layer: nn.Module) -> nn.Module:
    """Set a layer's parameters to zero: the residual branch that it ends starts as nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


@torch.no_grad()
def initialize(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """Initialize every convolution and linear layer from PyTorch's default distribution, but with
    an explicit generator, and return the module. What `zero_module` made zero stays zero; a layer
    with a distribution of its own has a method `init_weights(generator)`."""
    for layer in module.modules():
        if hasattr(layer, "init_weights"):
            layer.init_weights(generator)
        elif isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.weight.any():
            bound = layer.weight[0].numel() ** -0.5  # PyTorch's default: +- 1 / sqrt(fan_in)
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            if layer.bias is not None:
                nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
    return module


class ResBlock(nn.Module):
    """x + conv(conv(x) + time): two 3x3 convolutions; the time embedding is added between them."""

    def __init__(self, in_channels: int, out_channels: int, time_channels: int, groups: int):
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, in_channels, eps=1e-5), nn.SiLU(),
            nn.Conv2d(in_channels, out_channels, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_channels, out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, out_channels, eps=1e-5), nn.SiLU(),
            nn.Identity(),  # a dropout of 0: the published name of the convolution is out_layers.3
            zero_module(nn.Conv2d(out_channels, out_channels, 3, padding=1)))
        self.skip_connection = (nn.Identity() if in_channels == out_channels else
                                nn.Conv2d(in_channels, out_channels, 1))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.in_layers(x)                                   # (B, C_out, H, W)
        h = h + self.emb_layers(time)[:, :, None, None]         # + (B, C_out, 1, 1)
        return self.skip_connection(x) + self.out_layers(h)     # (B, C_out, H, W)


class Downsample(nn.Sequential):
    """Halve the resolution with a convolution: (B, C, H, W) -> (B, C, ceil(H/2), ceil(W/2))."""

    def __init__(self, channels: int):
        super().__init__(OrderedDict(op=nn.Conv2d(channels, channels, 3, stride=2, padding=1)))


class Upsample(nn.Module):
    """Nearest-neighbour upsampling to the next skip's size (2H or 2H - 1), then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
