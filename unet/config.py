"""The few numbers that make a Stable Diffusion UNet, the published presets, and how to read the numbers off a checkpoint's shapes."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class UNetConfig:
    """Numbers of a UNet or of one of its encoders (a ControlNet, a student). The defaults are Stable Diffusion 1.5's."""

    model_channels: int = 320                       # width of the first level
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)    # width of each level, in units of model_channels; the resolution halves between levels
    attention: tuple[bool, ...] = (True, True, True, False)  # which levels look at the prompt
    num_res_blocks: int = 2                         # residual blocks a level in the encoder (the decoder has one more)
    context_dim: int = 768                          # width of the text states
    num_heads: int | None = 8                       # SD 1.x: the same number of heads at every level ...
    head_dim: int | None = None                     # SD 2.x: ... or heads of the same width at every level
    linear_projections: bool = False                # SD 2.x: linear layers around the transformer instead of 1x1 convolutions
    groups: int = 32                                # of every GroupNorm. Shapes do not tell it, so a file's metadata must if it is not 32
    middle_attention: bool = True                   # False: the middle is one residual block (the lighter middle of a student)
    latent_channels: int = 4
    rank: int | None = None                         # of the LoHa layers of a student that has them

    def heads(self, channels: int) -> int:
        """Number of attention heads at a level of this many channels."""
        return self.num_heads if self.head_dim is None else channels // self.head_dim

    def encoder_blocks(self) -> list[tuple[int, int]]:
        """(level, channels) of every encoder block in order: the skip connections. Stable Diffusion has twelve:

        block     0     1     2     3     4     5     6     7     8     9    10    11
        what   conv   res   res  down   res   res  down   res   res  down   res   res
        level     0     0     0     1     1     1     2     2     2     3     3     3
        C       320   320   320   320   640   640   640  1280  1280  1280  1280  1280

        A level begins with the convolution that sets its resolution: the first one, or the downsampling (which keeps the width).
        """
        blocks, channels = [], self.model_channels
        for level, mult in enumerate(self.channel_mult):
            blocks.append((level, channels))
            channels = mult * self.model_channels
            blocks += [(level, channels)] * self.num_res_blocks
        return blocks


def infer_config(
    shapes: Mapping[str, tuple[int, ...]], groups: int = 32, num_heads: int | None = None, head_dim: int | None = None
) -> UNetConfig:
    """Read a UNet's or an encoder's config off the shapes of its tensors (names without prefix, `input_blocks.0.0.weight` ...).

    Shapes do not show the number of groups and of heads: `groups` is 32 in every published model; heads default to Stable
    Diffusion's rule, 8 heads for 1.x (convolutional projections), heads of width 64 for 2.x (linear projections), if neither their
    number nor their width is given.
    Raises ValueError if the tensors are not those of such a network.
    """
    try:
        width, latent_channels = shapes["input_blocks.0.0.weight"][:2]
        mult, attention, counts = [], [], [0]
        block = 1
        while (head := f"input_blocks.{block}.0") + ".in_layers.2.weight" in shapes or head + ".op.weight" in shapes:
            if head + ".op.weight" in shapes:
                counts.append(0)
            else:
                if counts[-1] == 0:
                    mult.append(shapes[head + ".in_layers.2.weight"][0] // width)
                    attention.append(f"input_blocks.{block}.1.norm.weight" in shapes)
                counts[-1] += 1
            block += 1
        to_k = next(shape for name, shape in shapes.items() if name.endswith("attn2.to_k.weight"))
        linear = next(len(shape) == 2 for name, shape in shapes.items() if name.endswith("proj_in.weight"))
    except (KeyError, StopIteration, ValueError) as problem:
        raise ValueError(f"expected the tensors of a Stable Diffusion encoder (input_blocks.0.0.weight, ...), found none of that shape: {problem}") from None
    if len(set(counts)) != 1 or counts[0] == 0:
        raise ValueError(f"expected the same number of residual blocks on every level, found {counts}")
    if not num_heads and not head_dim:
        num_heads, head_dim = (None, 64) if linear else (8, None)
    return UNetConfig(
        model_channels=width,
        channel_mult=tuple(mult),
        attention=tuple(attention),
        num_res_blocks=counts[0],
        context_dim=to_k[1],
        num_heads=num_heads,
        head_dim=head_dim,
        linear_projections=linear,
        groups=groups,
        middle_attention="middle_block.1.norm.weight" in shapes,
        latent_channels=latent_channels,
    )


SD15 = UNetConfig()
SD21 = UNetConfig(context_dim=1024, num_heads=None, head_dim=64, linear_projections=True)  # also SD-Turbo
TINY = UNetConfig(model_channels=32, context_dim=64, num_heads=2, groups=8)  # weights/tiny: SD 1.x at a tenth of the width
