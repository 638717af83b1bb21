"""Modulation: outputs that share a layer need not share its scale (FiLM, Perez et al. 2018; squeeze
and excitation, Hu et al. 2018)."""

from torch import Tensor, nn

from controlnet import ControlNet
from unet import UNetConfig
from unet.blocks import zero_module


class Modulation(nn.Module):
    """h -> (1 + scale) h + shift, with a scale and a shift for every channel, computed from the
    layer's own mean over the pixels. The identity at the start.

    Plain parameters would add nothing: the 1x1 convolution that follows can absorb a constant scale
    and shift. These depend on the input (and on the timestep, which moves every channel's mean).
    """

    def __init__(self, channels: int):
        super().__init__()
        bottleneck = max(16, channels // 16)
        self.net = nn.Sequential(nn.Linear(channels, bottleneck), nn.SiLU(),
                                 zero_module(nn.Linear(bottleneck, 2 * channels)))

    def forward(self, h: Tensor) -> Tensor:
        statistics = self.net(h.mean(dim=(2, 3)))[:, :, None, None]     # (B, 2C, 1, 1)
        scale, shift = statistics.chunk(2, dim=1)                       # (B, C, 1, 1) each
        return (1 + scale) * h + shift                                  # (B, C, H, W)


class ModulatedControlNet(ControlNet):
    """A ControlNet with the paper's E(c) and a modulation before each zero convolution, so that two
    outputs of one layer are modulated apart. `after_layers`: one after each layer of the backbone
    instead, and the next layer sees what it has made."""

    def __init__(self, config: UNetConfig, target: UNetConfig, architecture: str = "modulated",
                 after_layers: bool = False):
        super().__init__(config, target, paper_encoder=True, architecture=architecture)
        if after_layers:
            widths = [channels for _, channels in config.encoder_blocks()]
            layers = [*self.input_blocks, self.middle_block]
            for layer, channels in zip(layers, [*widths, widths[-1]], strict=True):
                layer.append(Modulation(channels))
            return
        for output in [*self.zero_convs, self.middle_block_out]:
            output.insert(0, Modulation(output[0].in_channels))
