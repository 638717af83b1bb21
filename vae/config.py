"""The few numbers that make an autoencoder, and how to read them off a checkpoint's shapes."""

from collections.abc import Mapping
from dataclasses import dataclass

LATENT_CHANNELS = 4
DOWNSCALE = 8  # pixels per latent along a side: three halvings between four levels


@dataclass(frozen=True)
class VAEConfig:
    """Numbers of an autoencoder. The defaults are Stable Diffusion's, 1.x and 2.x."""

    channels: int = 128                            # width of the first level
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)   # widths of the levels / channels
    num_res_blocks: int = 2                        # per level; one more in the decoder
    latent_channels: int = LATENT_CHANNELS
    groups: int = 32                               # of every GroupNorm


def infer_vae_config(shapes: Mapping[str, tuple[int, ...]], groups: int = 32) -> VAEConfig:
    """Read the config off the tensors' shapes (names without prefix). ValueError for others."""
    try:
        channels = shapes["encoder.conv_in.weight"][0]
        mult = []
        while (name := f"encoder.down.{len(mult)}.block.0.conv1.weight") in shapes:
            mult.append(shapes[name][0] // channels)
        blocks = sum(f"encoder.down.0.block.{i}.conv1.weight" in shapes for i in range(16))
        latent_channels = shapes["post_quant_conv.weight"][0]
    except KeyError as missing:
        raise ValueError(f"expected a Stable Diffusion autoencoder, {missing} is missing") from None
    return VAEConfig(channels, tuple(mult), blocks, latent_channels, groups)


SD_VAE = VAEConfig()
# weights/tiny: most of its weights are where the resolution is low and work cheap.
TINY_VAE = VAEConfig(channels=16, channel_mult=(1, 2, 4, 8), num_res_blocks=1, groups=4)
