"""The latent diffusion UNet (Rombach et al. 2022) with the tensor names of the published checkpoints.

The encoder is a class of its own because a ControlNet is one: `UNet(Encoder)` adds a decoder, `ControlNet(Encoder)` zero convolutions.
`encode` never sees the control, so one encoding serves several decodings: with and without control, the teacher's and the student's.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unet.attention import SpatialTransformer
from unet.blocks import Downsample, ResBlock, Upsample, timestep_embedding, zero_module
from unet.config import UNetConfig


class Features(NamedTuple):
    """What an encoder hands to a decoder."""

    skips: list[Tensor]  # one a block, finest first (twelve in Stable Diffusion)
    middle: Tensor       # (B, C, H/8, W/8)
    time: Tensor         # (B, E) time embedding
    context: Tensor      # (B, N, D) text states


class Block(nn.Sequential):
    """A row of the UNet: a few layers run one after the other, each given what it needs besides x."""

    def forward(self, x: Tensor, time: Tensor, context: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, time)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            elif isinstance(layer, Upsample):
                x = layer(x, size)
            else:
                x = layer(x)
        return x


class Encoder(nn.Module):
    """First half of the UNet: twelve blocks of falling resolution, then the middle block."""

    checkpointing = False  # True: recompute each block in the backward pass instead of storing its activations

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        width, time_channels = config.model_channels, 4 * config.model_channels
        self.time_embed = nn.Sequential(nn.Linear(width, time_channels), nn.SiLU(), nn.Linear(time_channels, time_channels))

        self.input_blocks = nn.ModuleList([Block(nn.Conv2d(config.latent_channels, width, 3, padding=1))])
        channels = width
        for level, mult in enumerate(config.channel_mult):
            if level > 0:
                self.input_blocks.append(Block(Downsample(channels)))
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(self._row(level, channels, mult * width))
                channels = mult * width

        self.middle_block = Block(ResBlock(channels, channels, time_channels, config.groups))
        if config.middle_attention:
            self.middle_block.append(self._transformer(channels))
            self.middle_block.append(ResBlock(channels, channels, time_channels, config.groups))

    def _transformer(self, channels: int) -> SpatialTransformer:
        c = self.config
        return SpatialTransformer(channels, c.context_dim, c.heads(channels), c.groups, c.linear_projections)

    def _row(self, level: int, in_channels: int, out_channels: int) -> Block:
        row = Block(ResBlock(in_channels, out_channels, 4 * self.config.model_channels, self.config.groups))
        if self.config.attention[level]:
            row.append(self._transformer(out_channels))
        return row

    def _run(self, block: Block, x: Tensor, time: Tensor, context: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, time, context, size, use_reentrant=False)
        return block(x, time, context, size)

    def set_checkpointing(self, enabled: bool) -> None:
        """Recompute each block in the backward pass instead of storing its activations."""
        self.checkpointing = enabled

    def encode(self, latents: Tensor, timesteps: Tensor, context: Tensor, added: Mapping[int, Tensor] | None = None) -> Features:
        """Noisy latents (B, 4, H, W), timesteps (B,) in [0, 1000), text states (B, N, D) -> Features.

        `added` maps a block's number to a tensor that is added to that block's output: a ControlNet adds its encoded condition to block 0.
        """
        added = added or {}
        time = self.time_embed(timestep_embedding(timesteps, self.config.model_channels).to(latents.dtype))
        h, skips = latents, []
        for number, block in enumerate(self.input_blocks):
            h = self._run(block, h, time, context)
            if number in added:
                h = h + added[number]
            skips.append(h)
        return Features(skips, self._run(self.middle_block, h, time, context), time, context)


class UNet(Encoder):
    """The denoiser: predicts the noise in the latents (or v, for SD 2.1 at 768)."""

    def __init__(self, config: UNetConfig):
        super().__init__(config)
        width = config.model_channels
        skip_channels = [channels for _, channels in config.encoder_blocks()]
        self.output_blocks = nn.ModuleList()
        channels = skip_channels[-1]
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            for i in range(config.num_res_blocks + 1):  # every row consumes one skip connection
                row = self._row(level, channels + skip_channels.pop(), mult * width)
                channels = mult * width
                if level > 0 and i == config.num_res_blocks:
                    row.append(Upsample(channels))
                self.output_blocks.append(row)
        self.out = nn.Sequential(
            nn.GroupNorm(config.groups, channels, eps=1e-5), nn.SiLU(), zero_module(nn.Conv2d(channels, config.latent_channels, 3, padding=1))
        )

    def decode(self, features: Features, control: Sequence[Tensor | None] | None = None) -> Tensor:
        """Second half. `control`: one tensor for each skip connection, in encoder order, then one for the middle (13 in all); each is added.

        None instead of a tensor: that place is not connected.
        """
        skips, h, time, context = list(features.skips), features.middle, features.time, features.context
        if control is not None:
            if len(control) != len(skips) + 1:
                raise ValueError(f"expected {len(skips) + 1} control tensors (one a skip connection, then the middle), got {len(control)}")
            skips = [skip if c is None else skip + c for skip, c in zip(skips, control[:-1], strict=True)]
            h = h + control[-1]
        for block in self.output_blocks:
            h = torch.cat([h, skips.pop()], dim=1)
            h = self._run(block, h, time, context, size=skips[-1].shape[-2:] if skips else None)
        return self.out(h)

    def forward(self, latents: Tensor, timesteps: Tensor, context: Tensor, control: Sequence[Tensor] | None = None) -> Tensor:
        """Noisy latents (B, 4, H, W), timesteps (B,), text states (B, N, D), control (13 tensors or None) -> predicted noise (B, 4, H, W)."""
        return self.decode(self.encode(latents, timesteps, context), control)
