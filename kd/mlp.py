"""ControlNet-MLP: does the control need to look at a neighbourhood at all? (L. Zhang, "Why
ControlNets use deep encoder?", 2023.)"""

import torch.nn.functional as F
from torch import Tensor, nn

from controlnet import ControlNetwork
from controlnet.condition import GaussianConv2d, paper_condition_encoder
from controlnet.injection import control_through_encoder, encode_with, injection_points
from controlnet.zero_convolution import zero_convolution
from unet import Features, UNet, UNetConfig
from unet.blocks import timestep_embedding


class MLP(ControlNetwork):
    """A multi-layer perceptron for every pixel (1x1 convolutions), with average pooling between the
    levels.

    Its outputs enter the SD encoder at five points, each through a zero convolution: the encoder,
    which knows pictures, does the rest. Unlike the published one it sees the noisy latents and the
    timestep; without both it cannot follow the teacher (docs/experiments.md).
    """

    connects_to = "encoder"

    def __init__(self, target: UNetConfig):
        super().__init__()
        self.architecture = "mlp"
        self.config = self.target = target
        width = channels = target.model_channels
        self.input_hint_block = paper_condition_encoder(width)
        self.latents_in = GaussianConv2d(target.latent_channels, width, 1)
        self.time_embed = nn.Linear(width, width)
        self.levels = nn.ModuleList()
        self.zero_convs = nn.ModuleList()
        for out_channels in injection_points(target).values():
            self.levels.append(nn.Sequential(
                GaussianConv2d(channels, out_channels, 1), nn.SiLU(),
                GaussianConv2d(out_channels, out_channels, 1), nn.SiLU()))
            self.zero_convs.append(zero_convolution(out_channels, out_channels))
            channels = out_channels

    def forward(self, latents: Tensor, condition: Tensor, timesteps: Tensor) -> list[Tensor]:
        """Noisy latents (B, 4, H, W), condition (B, 3, 8H, 8W), timesteps (B,) -> the five tensors
        to add inside the encoder."""
        embedding = timestep_embedding(timesteps, self.config.model_channels).to(latents)
        time = self.time_embed(embedding)[:, :, None, None]                     # (B, C, 1, 1)
        h = self.hint(condition, latents) + self.latents_in(latents) + time     # (B, C, H, W)
        outputs = []
        for i, (level, zero) in enumerate(zip(self.levels, self.zero_convs, strict=True)):
            if 0 < i < len(self.levels) - 1:            # the last two have the same resolution
                h = F.avg_pool2d(h, 2, ceil_mode=True)  # rounds up, as the SD encoder does
            h = level(h)
            outputs.append(zero(h))
        return outputs

    def control(self, latents: Tensor, condition: Tensor, timesteps: Tensor, context: Tensor,
                unet: UNet | None = None, features: Features | None = None) -> list[Tensor]:
        return control_through_encoder(self, latents, condition, timesteps, context, unet, features)

    def changed_features(self, latents: Tensor, condition: Tensor, timesteps: Tensor,
                         context: Tensor, unet: UNet) -> Features:
        return encode_with(self(latents, condition, timesteps), latents, timesteps, context, unet)
