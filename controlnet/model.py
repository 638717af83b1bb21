"""ControlNet (Zhang, Rao and Agrawala 2023): a trainable copy of the UNet's encoder that sees the
condition, attached by zero convolutions."""

import torch
from torch import Tensor, nn

from controlnet.condition import paper_condition_encoder, released_condition_encoder
from controlnet.network import ControlNetwork
from controlnet.zero_convolution import zero_convolution
from unet import Encoder, Features, UNet, UNetConfig
from unet.blocks import initialize


class ControlNet(Encoder, ControlNetwork):
    """An encoder like the UNet's, with three additions:

    `input_hint_block`  E(c): the condition's features, added after the first convolution
    `zero_convs`        one zero convolution for each of the UNet's twelve skip connections
    `middle_block_out`  a zero convolution for the middle

    y_c = F(x) + Z(F_copy(x + E(c))): the frozen UNet F gets each output added to its own skip
    connection, so while the zero convolutions are zero, y_c = y exactly.

    A student may be narrower than the UNet, or have fewer blocks per level: then `config` is its
    own and `target` the UNet's. The zero convolutions project to the UNet's widths, and each skip
    connection is fed by the block at the same position of the same level, or by the level's last
    block where the student has none there (`taps`).
    """

    def __init__(self, config: UNetConfig, target: UNetConfig | None = None,
                 paper_encoder: bool = False, architecture: str = "controlnet"):
        super().__init__(config)
        self.target = target = target or config
        self.architecture = architecture
        if len(target.channel_mult) != len(config.channel_mult):
            raise ValueError(f"expected a control network of {len(target.channel_mult)} levels, as "
                             f"the UNet has, got {len(config.channel_mult)}")
        # Block `position` of a level has the index level * (num_res_blocks + 1) + position.
        self.taps = [
            level * (config.num_res_blocks + 1) + min(position, config.num_res_blocks)
            for level in range(len(target.channel_mult))
            for position in range(target.num_res_blocks + 1)
        ]
        own = [channels for _, channels in config.encoder_blocks()]
        unets = [channels for _, channels in target.encoder_blocks()]
        encoder = paper_condition_encoder if paper_encoder else released_condition_encoder
        self.input_hint_block = encoder(config.model_channels)
        self.zero_convs = nn.ModuleList(
            nn.Sequential(zero_convolution(own[tap], channels))
            for tap, channels in zip(self.taps, unets, strict=True))
        self.middle_block_out = nn.Sequential(zero_convolution(own[-1], unets[-1]))

    @classmethod
    def from_unet(cls, unet: UNet, paper_encoder: bool = False,
                  generator: torch.Generator | None = None,
                  architecture: str = "controlnet") -> "ControlNet":
        """The trainable copy: the UNet's own encoder weights, a new E(c) initialized from
        `generator`, zero convolutions. On the UNet's device."""
        net = cls(unet.config, paper_encoder=paper_encoder, architecture=architecture)
        if generator is not None:
            initialize(net.input_hint_block, generator)
        own = net.state_dict()
        copied = {name: tensor for name, tensor in unet.state_dict().items() if name in own}
        net.load_state_dict(own | copied)
        return net.to(next(unet.parameters()))

    def forward(self, latents: Tensor, condition: Tensor, timesteps: Tensor,
                context: Tensor) -> list[Tensor | None]:
        """Noisy latents (B, 4, H, W), condition (B, 3, 8H, 8W) in [0, 1], timesteps (B,), text
        states (B, N, D) -> 13 tensors: one for each of the UNet's skip connections in encoder
        order, then one for its middle. None: not connected (small mode)."""
        hint = self.hint(condition, latents)                                    # (B, C, H, W)
        features = self.encode(latents, timesteps, context, added={0: hint})
        outputs = [None if self.only_middle else zero(features.skips[tap])
                   for zero, tap in zip(self.zero_convs, self.taps, strict=True)]
        return [*outputs, self.middle_block_out(features.middle)]

    def control(self, latents: Tensor, condition: Tensor, timesteps: Tensor, context: Tensor,
                unet: UNet | None = None, features: Features | None = None) -> list[Tensor | None]:
        return self(latents, condition, timesteps, context)
