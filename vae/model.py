"""The KL autoencoder of Stable Diffusion (Rombach et al. 2022, appendix G). Letters: B batch,
C channels, H W height and width of the picture or a feature map, h w of the latents."""

from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae.config import VAEConfig

LATENT_SCALE = 0.18215  # 1 / standard deviation of SD 1.x's latents: the UNet sees unit variance
group_norm = partial(nn.GroupNorm, eps=1e-6)  # 1e-5 in the UNet's residual blocks


class ResnetBlock(nn.Module):
    """x + conv(conv(x)); a 1x1 convolution on the shortcut where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = group_norm(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = (nn.Identity() if in_channels == out_channels else
                             nn.Conv2d(in_channels, out_channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all pixels of a feature map, as a residual."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = group_norm(groups, channels)
        self.q, self.k, self.v = (nn.Conv2d(channels, channels, 1) for _ in range(3))
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)                                            # (B, C, H, W)
        q, k, v = (project(h).flatten(2).transpose(1, 2)[:, None]   # (B, 1, HW, C)
                   for project in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)[:, 0]           # (B, HW, C)
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, x.shape[-2:]))


class Downsample(nn.Sequential):
    """Halve the resolution. Pads one pixel on the right and bottom only, as the original does:
    symmetric padding would shift the picture."""

    def __init__(self, channels: int):
        super().__init__(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)),
                                     conv=nn.Conv2d(channels, channels, 3, stride=2, padding=0)))


class Upsample(nn.Sequential):
    """Double the resolution."""

    def __init__(self, channels: int):
        super().__init__(OrderedDict(nearest=nn.Upsample(scale_factor=2.0, mode="nearest"),
                                     conv=nn.Conv2d(channels, channels, 3, padding=1)))


class Middle(nn.Sequential):
    """The lowest resolution: attention between two residual blocks."""

    def __init__(self, channels: int, groups: int):
        super().__init__(OrderedDict(block_1=ResnetBlock(channels, channels, groups),
                                     attn_1=AttnBlock(channels, groups),
                                     block_2=ResnetBlock(channels, channels, groups)))


class Level(nn.Sequential):
    """Residual blocks of one resolution; all but the last level then change it."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, groups: int):
        blocks = nn.Sequential(ResnetBlock(in_channels, out_channels, groups))
        for _ in range(num_blocks - 1):
            blocks.append(ResnetBlock(out_channels, out_channels, groups))
        super().__init__(OrderedDict(block=blocks))


class VAEEncoder(nn.Module):
    """Picture (B, 3, H, W) -> mean and log variance of the latents, in one tensor (B, 8, h, w)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels = config.channels
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.down = nn.Sequential()
        for i, mult in enumerate(config.channel_mult):
            level = Level(channels, mult * config.channels, config.num_res_blocks, config.groups)
            channels = mult * config.channels
            if i < len(config.channel_mult) - 1:
                level.add_module("downsample", Downsample(channels))
            self.down.append(level)
        self.mid = Middle(channels, config.groups)
        self.norm_out = group_norm(config.groups, channels)
        self.conv_out = nn.Conv2d(channels, 2 * config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        h = self.mid(self.down(self.conv_in(images)))               # (B, C, h, w)
        return self.conv_out(F.silu(self.norm_out(h)))              # (B, 8, h, w)


class VAEDecoder(nn.Module):
    """Latents (B, 4, h, w) -> picture (B, 3, H, W)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [mult * config.channels for mult in config.channel_mult]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config.groups)
        self.up = nn.ModuleList()  # up[0] is the finest level and runs last: the published names
        for i, (width, coarser) in enumerate(zip(widths, [*widths[1:], widths[-1]], strict=True)):
            level = Level(coarser, width, config.num_res_blocks + 1, config.groups)
            if i > 0:
                level.add_module("upsample", Upsample(width))
            self.up.append(level)
        self.norm_out = group_norm(config.groups, widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        h = self.mid(self.conv_in(latents))                         # (B, C, h, w)
        for level in reversed(self.up):
            h = level(h)                                            # (B, C, 2h, 2w), ...
        return self.conv_out(F.silu(self.norm_out(h)))              # (B, 3, H, W)


class VAE(nn.Module):
    """Pictures in [-1, 1] <-> unscaled latents; the denoiser's are LATENT_SCALE times these."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = VAEEncoder(config)
        self.decoder = VAEDecoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, H, W), sides divisible by 8 -> mean, log variance, each (B, 4, h, w)."""
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)  # the original's bounds: exp(logvar) stays finite

    def decode(self, latents: Tensor) -> Tensor:
        """Unscaled latents (B, 4, h, w) -> pictures (B, 3, H, W), about [-1, 1]."""
        return self.decoder(self.post_quant_conv(latents))

    def to_images(self, latents: Tensor) -> Tensor:
        """The denoiser's latents (B, 4, h, w) -> pictures (B, 3, H, W) clamped to [0, 1]."""
        return (self.decode(latents / LATENT_SCALE) / 2 + 0.5).clamp(0, 1)


def sample_latents(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """The denoiser's latents, sampled from the normal distribution that `VAE.encode` returned (the
    reparametrisation trick, Kingma and Welling 2014). All are (B, 4, h, w)."""
    return (mean + torch.exp(0.5 * logvar) * noise) * LATENT_SCALE
