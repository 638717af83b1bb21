"""Modulation: outputs that share a layer need not share its scale (FiLM, Perez et al. 2018; squeeze and excitation, Hu et al. 2018)."""

from torch import Tensor, nn

from unet.blocks import zero_module


class Modulation(nn.Module):
    """h -> (1 + scale) h + shift, a scale and a shift for every channel, told by the layer's own mean over the pixels. The identity at the start.

    A scale and a shift that are plain parameters could be absorbed by the 1x1 convolution behind them: the network could say nothing new,
    and it does not help. These depend on the input (on the timestep too, which moves every channel's mean), and cannot. On the tiny model,
    L_layer after 150 steps of distillation: 0.226 without a modulation, 0.224 with plain parameters, 0.215 with this one, 0.210 with
    scale and shift from the time embedding (behind this one until step 100, and it would have to be handed to every output).
    """

    def __init__(self, channels: int):
        super().__init__()
        bottleneck = max(16, channels // 16)
        self.net = nn.Sequential(nn.Linear(channels, bottleneck), nn.SiLU(), zero_module(nn.Linear(bottleneck, 2 * channels)))

    def forward(self, h: Tensor) -> Tensor:
        scale, shift = self.net(h.mean(dim=(2, 3)))[:, :, None, None].chunk(2, dim=1)   # (B, C, 1, 1) each
        return (1 + scale) * h + shift                                                  # (B, C, H, W)
