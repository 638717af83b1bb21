"""ControlNet-Lite: plain convolutions from scratch in place of a copy of the SD encoder (ControlNet
paper, section 4.2, figure 8c)."""

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from controlnet.condition import GaussianConv2d, paper_condition_encoder
from controlnet.injection import control_through_encoder, encode_with, injection_points
from controlnet.network import ControlNetwork
from controlnet.zero_convolution import zero_convolution
from unet import Features, UNet, UNetConfig


class Lite(ControlNetwork):
    """One 3x3 convolution and a SiLU per block, half as wide as the UNet. Sees the noisy latents
    and E(c), neither timestep nor prompt.

    The tensors have a ControlNet's names. `connects_to` decoder: 13 outputs, one for each skip
    connection and one for the middle. Encoder: five, added inside the SD encoder.
    """

    def __init__(self, target: UNetConfig, connects_to: str = "decoder"):
        super().__init__()
        self.target, self.connects_to = target, connects_to
        self.architecture = "lite" if connects_to == "decoder" else "lite_encoder"
        self.config = replace(target, model_channels=target.model_channels // 2)
        own = [channels for _, channels in self.config.encoder_blocks()]
        unets = [channels for _, channels in target.encoder_blocks()]
        points = injection_points(target)
        self.input_hint_block = paper_condition_encoder(own[0])
        self.input_blocks = nn.ModuleList()
        channels = target.latent_channels
        for i, out_channels in enumerate(own):
            # Every level but the first begins with a stride of 2.
            stride = 2 if i in points and 0 < i < len(own) - 1 else 1
            self.input_blocks.append(GaussianConv2d(channels, out_channels, 3, stride, padding=1))
            channels = out_channels
        if connects_to == "encoder":
            self.zero_convs = nn.ModuleList(
                zero_convolution(own[i], channels) for i, channels in points.items())
        else:
            self.zero_convs = nn.ModuleList(map(zero_convolution, own, unets))
            self.middle_block = GaussianConv2d(own[-1], own[-1], 3, padding=1)
            self.middle_block_out = zero_convolution(own[-1], unets[-1])

    def forward(self, latents: Tensor, condition: Tensor) -> list[Tensor | None]:
        """Noisy latents (B, 4, H, W), condition (B, 3, 8H, 8W) -> 13 tensors, or the five to add
        inside the encoder."""
        h, skips = latents, []
        for i, convolution in enumerate(self.input_blocks):
            h = convolution(h) + self.hint(condition, latents) if i == 0 else convolution(h)
            h = F.silu(h)
            skips.append(h)
        if self.connects_to == "encoder":
            points = injection_points(self.target)
            return [zero(skips[i]) for zero, i in zip(self.zero_convs, points, strict=True)]
        outputs = [None if self.only_middle else zero(skip)
                   for zero, skip in zip(self.zero_convs, skips, strict=True)]
        return [*outputs, self.middle_block_out(F.silu(self.middle_block(h)))]

    def control(self, latents: Tensor, condition: Tensor, timesteps: Tensor, context: Tensor,
                unet: UNet | None = None, features: Features | None = None) -> list[Tensor | None]:
        if self.connects_to == "decoder":
            return self(latents, condition)
        return control_through_encoder(self, latents, condition, timesteps, context, unet, features)

    def changed_features(self, latents: Tensor, condition: Tensor, timesteps: Tensor,
                         context: Tensor, unet: UNet) -> Features:
        return encode_with(self(latents, condition), latents, timesteps, context, unet)
