"""The few numbers that make a UNet, presets, and how to read them off a checkpoint's shapes."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count


@dataclass(frozen=True)
class UNetConfig:
    """A UNet's, or a lone encoder's (a ControlNet, a student). The defaults are SD 1.5's."""

    model_channels: int = 320                                # width of the first level
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)             # widths of the levels / model_channels
    attention: tuple[bool, ...] = (True, True, True, False)  # levels that attend to the prompt
    num_res_blocks: int = 2            # residual blocks per level; one more in the decoder
    context_dim: int = 768             # width of the text states
    num_heads: int | None = 8          # SD 1.x: the same number of heads at every level ...
    head_dim: int | None = None        # SD 2.x: ... or heads of the same width at every level
    linear_projections: bool = False   # SD 2.x: around the transformer, not 1x1 convolutions
    groups: int = 32                   # of every GroupNorm
    middle_attention: bool = True      # False: the middle is one residual block (some students)
    latent_channels: int = 4           # of the autoencoder
    rank: int | None = None            # of the LoHa layers of a student that has them

    def heads(self, channels: int) -> int:
        """Number of attention heads at a level of this many channels."""
        return self.num_heads if self.head_dim is None else channels // self.head_dim

    def encoder_blocks(self) -> list[tuple[int, int]]:
        """(level, channels) of every encoder block in order: the skip connections. Stable Diffusion
        has twelve:

        block     0     1     2     3     4     5     6     7     8     9    10    11
        what   conv   res   res  down   res   res  down   res   res  down   res   res
        level     0     0     0     1     1     1     2     2     2     3     3     3
        C       320   320   320   320   640   640   640  1280  1280  1280  1280  1280

        A level begins with the convolution that sets its resolution: the first one, or the
        downsampling to half the size (which keeps the width).
        """
        blocks = []
        channels = self.model_channels
        for level, mult in enumerate(self.channel_mult):
            blocks.append((level, channels))
            channels = mult * self.model_channels
            blocks += [(level, channels)] * self.num_res_blocks
        return blocks


def infer_config(shapes: Mapping[str, tuple[int, ...]], groups: int = 32,
                 num_heads: int | None = None, head_dim: int | None = None) -> UNetConfig:
    """Read the config off the shapes of a UNet's or an encoder's tensors (names without prefix).

    Shapes show neither `groups`, 32 in every published model, nor heads: by default Stable
    Diffusion's, 8 with convolutional projections (1.x), of width 64 with linear ones (2.x). Raises
    ValueError if the tensors are not such a network's.
    """
    mult, attention, res_blocks = [], [], [0]  # an entry per level
    try:
        width, latent_channels = shapes["input_blocks.0.0.weight"][:2]
        for block in count(1):
            convolution = f"input_blocks.{block}.0.in_layers.2.weight"
            if f"input_blocks.{block}.0.op.weight" in shapes:
                res_blocks.append(0)
            elif convolution in shapes:
                if res_blocks[-1] == 0:
                    mult.append(shapes[convolution][0] // width)
                    attention.append(f"input_blocks.{block}.1.norm.weight" in shapes)
                res_blocks[-1] += 1
            else:
                break
        to_k = next(shape for name, shape in shapes.items() if name.endswith("attn2.to_k.weight"))
        linear = next(
            len(shape) == 2 for name, shape in shapes.items() if name.endswith("proj_in.weight"))
    except (KeyError, StopIteration, ValueError) as problem:
        raise ValueError("expected the tensors of a Stable Diffusion encoder, got others: "
                         f"{problem}") from None
    if len(set(res_blocks)) != 1 or res_blocks[0] == 0:
        raise ValueError(f"expected as many residual blocks on every level, got {res_blocks}")
    if not num_heads and not head_dim:
        num_heads, head_dim = (None, 64) if linear else (8, None)
    return UNetConfig(
        model_channels=width, channel_mult=tuple(mult), attention=tuple(attention),
        num_res_blocks=res_blocks[0], context_dim=to_k[1], num_heads=num_heads, head_dim=head_dim,
        linear_projections=linear, groups=groups,
        middle_attention="middle_block.1.norm.weight" in shapes, latent_channels=latent_channels)


SD15 = UNetConfig()
SD21 = UNetConfig(context_dim=1024, num_heads=None, head_dim=64, linear_projections=True)  # + Turbo
TINY = UNetConfig(model_channels=32, context_dim=64, num_heads=2, groups=8)  # weights/tiny
