"""The latent diffusion UNet (Rombach et al. 2022).

The encoder is a class of its own because a ControlNet is one: `UNet(Encoder)` adds a decoder,
`ControlNet(Encoder)` zero convolutions. `encode` never sees the control, so one encoding serves
several decodings: with and without control, the teacher's and the student's. The letters in the
shapes are those of `unet/blocks.py`; H and W are the latents'.
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

    skips: list[Tensor]  # one for each block, finest first (twelve in Stable Diffusion)
    middle: Tensor       # (B, C, H/8, W/8)
    time: Tensor         # (B, E) time embedding
    context: Tensor      # (B, N, D) text states


class Block(nn.Sequential):
    """A block of the UNet: layers that run one after the other, each with the inputs it needs."""

    def forward(self, x: Tensor, time: Tensor, context: Tensor,
                size: tuple[int, int] | None = None) -> Tensor:
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
    """First half of the UNet: the twelve blocks of `UNetConfig.encoder_blocks`, then the middle."""

    checkpointing = False  # see `set_checkpointing`

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        width = channels = config.model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))

        first = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        self.input_blocks = nn.ModuleList([Block(first)])
        for level, mult in enumerate(config.channel_mult):
            if level > 0:
                self.input_blocks.append(Block(Downsample(channels)))
            for _ in range(config.num_res_blocks):
                block = self._block(channels, mult * width, config.attention[level])
                self.input_blocks.append(block)
                channels = mult * width

        self.middle_block = self._block(channels, channels, config.middle_attention)
        if config.middle_attention:
            self.middle_block.append(ResBlock(channels, channels, 4 * width, config.groups))

    def _block(self, in_channels: int, out_channels: int, attention: bool) -> Block:
        c = self.config
        block = Block(ResBlock(in_channels, out_channels, 4 * c.model_channels, c.groups))
        if attention:
            block.append(SpatialTransformer(out_channels, c.context_dim, c.heads(out_channels),
                                            c.groups, c.linear_projections))
        return block

    def set_checkpointing(self, enabled: bool) -> None:
        """Whether the backward pass computes each block again instead of storing activations."""
        self.checkpointing = enabled

    def _run(self, block: Block, *inputs: Tensor | tuple[int, int] | None) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def encode(self, latents: Tensor, timesteps: Tensor, context: Tensor,
               added: Mapping[int, Tensor] | None = None) -> Features:
        """Noisy latents (B, 4, H, W), timesteps (B,) in [0, 1000), text states (B, N, D). `added`:
        tensors to add to the outputs of blocks, by index; a ControlNet adds E(c) to block 0."""
        added = added or {}
        sinusoids = timestep_embedding(timesteps, self.config.model_channels)
        time = self.time_embed(sinusoids.to(latents.dtype))     # (B, E)
        h = latents                                             # (B, 4, H, W)
        skips = []
        for i, block in enumerate(self.input_blocks):
            h = self._run(block, h, time, context)              # (B, C, H/2^level, W/2^level)
            if i in added:
                h = h + added[i]
            skips.append(h)
        middle = self._run(self.middle_block, h, time, context)  # (B, C, H/8, W/8)
        return Features(skips, middle, time, context)


class UNet(Encoder):
    """The denoiser: predicts the noise in the latents (or v, for SD 2.1 at 768 pixels)."""

    def __init__(self, config: UNetConfig):
        super().__init__(config)
        width = config.model_channels
        skip_channels = [channels for _, channels in config.encoder_blocks()]
        self.output_blocks = nn.ModuleList()
        channels = skip_channels[-1]
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            for i in range(config.num_res_blocks + 1):  # every block consumes one skip connection
                channels += skip_channels.pop()
                block = self._block(channels, mult * width, config.attention[level])
                channels = mult * width
                if level > 0 and i == config.num_res_blocks:
                    block.append(Upsample(channels))
                self.output_blocks.append(block)
        self.out = nn.Sequential(
            nn.GroupNorm(config.groups, channels, eps=1e-5), nn.SiLU(),
            zero_module(nn.Conv2d(channels, config.latent_channels, 3, padding=1)))

    def decode(self, features: Features, control: Sequence[Tensor | None] | None = None) -> Tensor:
        """Second half. `control`: one tensor to add to each skip connection, in encoder order, then
        one for the middle (ValueError if not 13 in all); None where a skip has no control."""
        skips = list(features.skips)
        h = features.middle                                     # (B, C, H/8, W/8)
        if control is not None:
            if len(control) != len(skips) + 1:
                raise ValueError(f"expected {len(skips) + 1} control tensors, got {len(control)}")
            skips = [skip if output is None else skip + output
                     for skip, output in zip(skips, control[:-1], strict=True)]
            h = h + control[-1]
        for block in self.output_blocks:
            h = torch.cat([h, skips.pop()], dim=1)              # (B, C + C_skip, H/2^l, W/2^l)
            size = skips[-1].shape[-2:] if skips else None      # of the next skip, for upsampling
            h = self._run(block, h, features.time, features.context, size)
        return self.out(h)                                      # (B, 4, H, W)

    def forward(self, latents: Tensor, timesteps: Tensor, context: Tensor,
                control: Sequence[Tensor | None] | None = None) -> Tensor:
        """The inputs of `encode` and, if any, the 13 of `decode` -> noise_pred (B, 4, H, W)."""
        return self.decode(self.encode(latents, timesteps, context), control)
