"""E(c): from the condition's pixels to features at the latents' resolution, 8 times smaller.

ControlNet paper, section 3.2. Both forms end in a zero convolution to the UNet's width, and are a
plain nn.Sequential, so that the tensors keep their published names (`input_hint_block.0.weight`,
...). A file does not say which form it has; the size of the first kernel does.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from controlnet.zero_convolution import zero_convolution


class GaussianConv2d(nn.Conv2d):
    """A convolution with Gaussian weights of He's scale, sqrt(2 / fan_in), which keeps a signal's
    size through a ReLU (He et al. 2015)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1,
                 padding: int = 0):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding)
        self.init_weights()

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        if self.weight.is_meta:  # nothing to draw, for which PyTorch would import its compiler
            return
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu", generator=generator)
        nn.init.zeros_(self.bias)


class PaperConv2d(GaussianConv2d):
    """A 4x4 convolution that keeps the resolution (stride 1) or halves it (stride 2).

    An even kernel at stride 1 needs one pixel more of padding on the right and bottom.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__(in_channels, out_channels, 4, stride)

    def forward(self, x: Tensor) -> Tensor:
        after = 2 if self.stride[0] == 1 else 1
        return super().forward(F.pad(x, (1, after, 1, after)))


def paper_condition_encoder(out_channels: int) -> nn.Sequential:
    """The encoder as the paper describes it: four convolutions, 4x4 kernels, stride 2, ReLU, 16 to
    128 channels, Gaussian weights.

    Four strides of 2 would shrink 512 pixels to 32, but the latents have 64, so one stride must be
    1. It is the last, where the pictures are smallest: a first convolution at full resolution would
    make all others work at twice the resolution.
    """
    layers: list[nn.Module] = []
    for in_channels, channels, stride in ((3, 16, 2), (16, 32, 2), (32, 64, 2), (64, 128, 1)):
        layers += [PaperConv2d(in_channels, channels, stride), nn.ReLU()]
    return nn.Sequential(*layers, zero_convolution(128, out_channels))


def released_condition_encoder(out_channels: int) -> nn.Sequential:
    """The encoder of the released code and of every published file: eight 3x3 convolutions with
    SiLU, three of them with stride 2."""
    layers: list[nn.Module] = []
    for in_channels, channels, stride in ((3, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1),
                                          (32, 96, 2), (96, 96, 1), (96, 256, 2)):
        layers += [nn.Conv2d(in_channels, channels, 3, stride, padding=1), nn.SiLU()]
    return nn.Sequential(*layers, zero_convolution(256, out_channels, kernel_size=3))


def is_paper_encoder(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a control network's tensors have the paper's E(c): its first kernel is 4x4."""
    return tensors["input_hint_block.0.weight"].shape[-1] == 4
