"""ControlNet (Zhang, Rao and Agrawala 2023): a trainable copy of the UNet's encoder that sees the condition, attached by zero convolutions."""

import torch
from torch import Tensor, nn

from controlnet.condition import paper_condition_encoder, released_condition_encoder
from controlnet.zero_convolution import zero_convolution
from unet import Encoder, UNet, UNetConfig
from unet.blocks import initialize
from unet.model import Features


class ControlNet(Encoder):
    """An encoder like the UNet's, with three additions:

    `input_hint_block`  E(c): the condition's features, added after the first convolution
    `zero_convs`        one zero convolution for each of the UNet's twelve skip connections
    `middle_block_out`  a zero convolution for the middle

    y_c = F(x) + Z(F_copy(x + E(c))): the frozen UNet F gets each output added to its own skip connection, so while the zero
    convolutions are zero, y_c = y exactly.

    `config` is this network's own. `target` is the UNet's if it differs: a student may be narrower, or have fewer blocks a level. Then
    the zero convolutions project to the UNet's widths, and each skip connection is fed by the block at the same place of the same
    level, or by the level's last block where the student has none there (`taps`).
    """

    architecture = "controlnet"  # a student has its own name; written into the files
    connects_to = "decoder"      # "encoder": `control` needs the UNet's features, and runs its encoder a second time

    only_middle = False          # True: the small mode of training, the twelve outputs for the skip connections are None

    def __init__(self, config: UNetConfig, target: UNetConfig | None = None, paper_encoder: bool = False):
        super().__init__(config)
        self.target = target = target or config
        if len(target.channel_mult) != len(config.channel_mult):
            raise ValueError(f"expected a control network of {len(target.channel_mult)} levels, as the UNet has, got {len(config.channel_mult)}")
        # Block `place` of a level has number level * (num_res_blocks + 1) + place.
        self.taps = [
            level * (config.num_res_blocks + 1) + min(place, config.num_res_blocks)
            for level in range(len(target.channel_mult))
            for place in range(target.num_res_blocks + 1)
        ]
        own, wanted = ([channels for _, channels in c.encoder_blocks()] for c in (config, target))
        self.input_hint_block = (paper_condition_encoder if paper_encoder else released_condition_encoder)(config.model_channels)
        self.zero_convs = nn.ModuleList(nn.Sequential(zero_convolution(own[tap], channels)) for tap, channels in zip(self.taps, wanted, strict=True))
        self.middle_block_out = nn.Sequential(zero_convolution(own[-1], wanted[-1]))

    @classmethod
    def from_unet(cls, unet: UNet, paper_encoder: bool = False, generator: torch.Generator | None = None) -> "ControlNet":
        """The trainable copy: the UNet's own encoder weights, a new E(c) drawn from `generator`, zero convolutions. On the UNet's device."""
        net = cls(unet.config, paper_encoder=paper_encoder)
        if generator is not None:
            initialize(net.input_hint_block, generator)
        own = net.state_dict()
        net.load_state_dict(own | {name: tensor for name, tensor in unet.state_dict().items() if name in own})
        return net.to(next(unet.parameters()))

    def forward(self, latents: Tensor, condition: Tensor, timesteps: Tensor, context: Tensor) -> list[Tensor]:
        """Noisy latents (B, 4, H, W), condition (B, 3, 8H, 8W) in [0, 1], timesteps (B,), text states (B, N, D) -> 13 tensors.

        The first twelve belong to the UNet's skip connections in encoder order, the last to its middle.
        """
        if condition.shape[-2:] != (8 * latents.shape[-2], 8 * latents.shape[-1]):
            raise ValueError(f"expected a condition 8 times as large as the latents {tuple(latents.shape[-2:])}, got {tuple(condition.shape[-2:])}")
        hint = self.input_hint_block(condition)                                 # (B, C, H, W)
        features = self.encode(latents, timesteps, context, added={0: hint})
        control = [None if self.only_middle else zero(features.skips[tap]) for zero, tap in zip(self.zero_convs, self.taps, strict=True)]
        return [*control, self.middle_block_out(features.middle)]

    def control(self, unet: UNet, features: Features, latents: Tensor, condition: Tensor, timesteps: Tensor) -> list[Tensor]:
        """The 13 tensors for a UNet whose encoder has made `features` of these latents. A ControlNet needs only its own encoder for that."""
        return self(latents, condition, timesteps, features.context)
