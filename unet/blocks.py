"""The parts of the denoiser: timestep embedding, residual block, down- and upsampling.

Letters used in the shapes of this folder: B batch, C channels, H W height and width, N tokens, D width, E width of the time embedding.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding of timesteps (B,) -> (B, dim) in float32: dim/2 cosines first, then dim/2 sines.

    Wavelengths grow geometrically from 2 pi to 10,000 * 2 pi (Vaswani et al. 2017, section 3.5; DDPM uses the same).
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half)
    angles = timesteps.float()[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def zero_module(layer: nn.Module) -> nn.Module:
    """Set a layer's parameters to zero, so that the residual branch it ends starts as nothing. Its input is not zero, so it learns."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


@torch.no_grad()
def initialize(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """Draw every convolution and linear layer again from PyTorch's default distribution, but from an explicit generator.

    Layers that were zero_module on purpose stay zero; a layer with a distribution of its own has a method `init_weights(generator)`. Returns the module.
    """
    for layer in module.modules():
        if hasattr(layer, "init_weights"):
            layer.init_weights(generator)
        elif isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.weight.any():
            bound = layer.weight[0].numel() ** -0.5  # U(-1/sqrt(fan_in), 1/sqrt(fan_in)), the default of nn.Conv2d and nn.Linear
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            if layer.bias is not None:
                nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
    return module


class ResBlock(nn.Module):
    """x + conv(conv(x) + time): two 3x3 convolutions, the time embedding added to every pixel between them."""

    def __init__(self, in_channels: int, out_channels: int, time_channels: int, groups: int):
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(groups, in_channels, eps=1e-5), nn.SiLU(), nn.Conv2d(in_channels, out_channels, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_channels, out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, out_channels, eps=1e-5),
            nn.SiLU(),
            nn.Identity(),  # a dropout of 0 in the original; it holds place 2, so that the convolution keeps its published name
            zero_module(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.in_layers(x)                               # (B, out, H, W)
        h = h + self.emb_layers(time)[:, :, None, None]     # (B, out, 1, 1) is added to every pixel
        return self.skip_connection(x) + self.out_layers(h)


class Downsample(nn.Module):
    """Halve the resolution with a stride-2 convolution; an odd size is rounded up."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)                                   # (B, C, ceil(H/2), ceil(W/2))


class Upsample(nn.Module):
    """Nearest-neighbour upsampling to the size of the next skip connection (twice the size, or one less), then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
