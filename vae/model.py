"""The KL autoencoder of Stable Diffusion: 512 x 512 pixels <-> 64 x 64 latents of 4 channels (Rombach et al. 2022, appendix G).

Tensor names are those of the published checkpoints (there behind the prefix `first_stage_model.`).
Letters: B batch, C channels, H W height and width of the picture (h w: of the latents, H/8 and W/8).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DOWNSCALE = 8         # pixels a latent, along a side: three halvings
LATENT_CHANNELS = 4
LATENT_SCALE = 0.18215  # 1 / standard deviation of SD 1.x's latents: the denoiser sees unit variance


@dataclass(frozen=True)
class VAEConfig:
    """Numbers of an autoencoder. The defaults are Stable Diffusion's (1.x and 2.x have the same)."""

    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2   # residual blocks a level in the encoder (the decoder has one more)
    latent_channels: int = 4
    groups: int = 32          # of every GroupNorm; not visible in the shapes


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)  # 1e-6 everywhere in the autoencoder, 1e-5 in the UNet's residual blocks


class ResnetBlock(nn.Module):
    """x + conv(conv(x)); a 1x1 convolution on the shortcut where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all pixels of a feature map, as a residual."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.q, self.k, self.v = (nn.Conv2d(channels, channels, 1) for _ in range(3))
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (project(h).flatten(2).transpose(1, 2)[:, None] for project in (self.q, self.k, self.v))  # (B, 1, HW, C)
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).unflatten(2, x.shape[-2:])        # (B, C, H, W)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """Halve the resolution. Pads right and bottom only, by one pixel: symmetric padding would shift the picture."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """Residual blocks of one resolution, then (in all but the last level) a change of resolution."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, groups: int):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(in_channels if i == 0 else out_channels, out_channels, groups) for i in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        for change in ("downsample", "upsample"):
            if hasattr(self, change):
                x = getattr(self, change)(x)
        return x


class VAEEncoder(nn.Module):
    """Picture (B, 3, H, W) -> mean and log variance of the latents (B, 8, h, w)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [mult * config.channels for mult in config.channel_mult]
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            level = Level(widths[max(i - 1, 0)] if i else config.channels, width, config.num_res_blocks, config.groups)
            if i < len(widths) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(widths[-1], config.groups)
        self.norm_out = group_norm(widths[-1], config.groups)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class VAEDecoder(nn.Module):
    """Latents (B, 4, h, w) -> picture (B, 3, H, W). `up[0]` is the finest level and runs last, as in the published names."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [mult * config.channels for mult in config.channel_mult]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config.groups)
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            level = Level(widths[min(i + 1, len(widths) - 1)], width, config.num_res_blocks + 1, config.groups)
            if i > 0:
                level.upsample = Upsample(width)
            self.up.append(level)
        self.norm_out = group_norm(widths[0], config.groups)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        h = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class VAE(nn.Module):
    """The autoencoder. Pictures are in [-1, 1]; latents here are unscaled, the denoiser's are LATENT_SCALE times these."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = VAEEncoder(config), VAEDecoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, H, W) in [-1, 1], sides divisible by 8 -> mean and log variance, each (B, 4, h, w)."""
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)  # the original's bounds: exp(logvar) stays finite

    def decode(self, latents: Tensor) -> Tensor:
        """Unscaled latents (B, 4, h, w) -> pictures (B, 3, H, W), about [-1, 1]."""
        return self.decoder(self.post_quant_conv(latents))

    def to_images(self, latents: Tensor) -> Tensor:
        """The denoiser's latents (B, 4, h, w) -> pictures (B, 3, H, W) clamped to [0, 1]."""
        return (self.decode(latents / LATENT_SCALE) / 2 + 0.5).clamp(0, 1)


def sample_latents(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """Draw the denoiser's latents from what `VAE.encode` returned (the reparametrisation trick, Kingma and Welling 2014)."""
    return (mean + torch.exp(0.5 * logvar) * noise) * LATENT_SCALE


def infer_vae_config(shapes: Mapping[str, tuple[int, ...]], groups: int = 32) -> VAEConfig:
    """Read the config off the tensors' shapes (names without prefix). Raises ValueError if they are not an autoencoder's."""
    try:
        channels = shapes["encoder.conv_in.weight"][0]
        levels = 0
        mult = []
        while f"encoder.down.{levels}.block.0.conv1.weight" in shapes:
            mult.append(shapes[f"encoder.down.{levels}.block.0.conv1.weight"][0] // channels)
            levels += 1
        blocks = sum(f"encoder.down.0.block.{i}.conv1.weight" in shapes for i in range(16))
        latent_channels = shapes["post_quant_conv.weight"][0]
    except KeyError as missing:
        raise ValueError(f"expected the tensors of a Stable Diffusion autoencoder, {missing} is missing") from None
    return VAEConfig(channels, tuple(mult), blocks, latent_channels, groups)


SD_VAE = VAEConfig()
# weights/tiny: most of its weights are where the resolution is low and work cheap.
TINY_VAE = VAEConfig(channels=16, channel_mult=(1, 2, 4, 8), num_res_blocks=1, groups=4)
