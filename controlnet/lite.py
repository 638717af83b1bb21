"""ControlNet-Lite: plain convolutions from scratch where a ControlNet has a copy of the SD encoder (ControlNet paper, section 4.2, figure 8c)."""

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from controlnet import zero_convolution
from controlnet.condition import GaussianConv2d, paper_condition_encoder
from controlnet.injection import control_through_encoder, places
from unet import UNet, UNetConfig
from unet.model import Features


class Lite(nn.Module):
    """One 3x3 convolution and a SiLU a block, half as wide as the UNet; sees the noisy latents and E(c), neither timestep nor prompt.

    The names are a ControlNet's. `connects_to` decoder: 13 outputs, one for each skip connection and one for the middle. Encoder: five
    outputs, added inside the SD encoder (`kd/injection.py`).
    """

    only_middle = False  # as in a ControlNet

    def __init__(self, target: UNetConfig, connects_to: str = "decoder"):
        super().__init__()
        self.target, self.connects_to = target, connects_to
        self.architecture = "lite" if connects_to == "decoder" else "lite_encoder"
        self.config = replace(target, model_channels=target.model_channels // 2)
        own, wanted = ([channels for _, channels in c.encoder_blocks()] for c in (self.config, target))
        firsts = places(target)  # a level begins with a stride of 2, in all but the first level
        self.input_hint_block = paper_condition_encoder(own[0])
        self.input_blocks, channels = nn.ModuleList(), target.latent_channels
        for number, out in enumerate(own):
            stride = 2 if number in firsts and 0 < number < len(own) - 1 else 1
            self.input_blocks.append(GaussianConv2d(channels, out, 3, stride, padding=1))
            channels = out
        if connects_to == "encoder":
            self.zero_convs = nn.ModuleList(zero_convolution(own[number], channels) for number, channels in firsts.items())
        else:
            self.zero_convs = nn.ModuleList(zero_convolution(*channels) for channels in zip(own, wanted, strict=True))
            self.middle_block = GaussianConv2d(own[-1], own[-1], 3, padding=1)
            self.middle_block_out = zero_convolution(own[-1], wanted[-1])

    def forward(self, latents: Tensor, condition: Tensor, timesteps: Tensor, context: Tensor) -> list[Tensor]:
        """Noisy latents (B, 4, H, W), condition (B, 3, 8H, 8W) -> 13 tensors, or 5 for the places inside the encoder."""
        h, hiddens = latents, []
        for number, convolution in enumerate(self.input_blocks):
            h = convolution(h) + self.input_hint_block(condition) if number == 0 else convolution(h)
            h = F.silu(h)
            hiddens.append(h)
        if self.connects_to == "encoder":
            return [zero(hiddens[number]) for zero, number in zip(self.zero_convs, places(self.target), strict=True)]
        control = [None if self.only_middle else zero(h) for zero, h in zip(self.zero_convs, hiddens, strict=True)]
        return [*control, self.middle_block_out(F.silu(self.middle_block(h)))]

    def control(self, unet: UNet, features: Features, latents: Tensor, condition: Tensor, timesteps: Tensor) -> list[Tensor]:
        """The 13 tensors for a UNet whose encoder has made `features` of these latents."""
        outputs = self(latents, condition, timesteps, features.context)
        if self.connects_to == "decoder":
            return outputs
        return control_through_encoder(unet, features, latents, timesteps, dict(zip(places(self.target), outputs, strict=True)))
