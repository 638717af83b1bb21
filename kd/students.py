"""The student architectures: each is a ControlNet with a few words changed, and starts exactly at the base model (y_c = y).

A student is a function of the base model's config. Sizes are at Stable Diffusion 1.5's shape, where the ControlNet has 361.3 M parameters.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from controlnet import ControlNet
from controlnet.lite import Lite
from kd.loha import factorize
from kd.mlp import MLP
from kd.modulation import Modulation
from unet import UNet, UNetConfig
from unet.blocks import initialize


def original(config: UNetConfig) -> ControlNet:
    """The ControlNet itself, with the released E(c): what distillation does when the architecture costs nothing. 361.3 M, 1 x."""
    return ControlNet(config)


def reduced_channel(config: UNetConfig) -> ControlNet:
    """All layers, half the channels; the zero convolutions project back to the UNet's widths. 95.4 M, 3.8 x smaller.

    Half the width is a quarter of the weights and of the work. The number of groups and of heads stays, so a group and a head have half
    the channels: the statistics of a GroupNorm are then over the same share of the channels as the teacher's.
    """
    narrow = replace(config, model_channels=config.model_channels // 2, head_dim=config.head_dim and config.head_dim // 2)
    return ControlNet(narrow, target=config, paper_encoder=True)


def reduced_layer(config: UNetConfig) -> ControlNet:
    """One residual block a level instead of two, and one in the middle without attention: 13 outputs from 9 backbone layers. 175.3 M, 2.06 x.

    Neighbouring layers of a ControlNet say nearly the same, so one layer can feed several of the UNet's skip connections, each through
    its own zero convolution: on SD 1.5 outputs 1 and 2 share a layer, 4 and 5, 7 and 8, 10 and 11. E(c) is the paper's, a seventh of
    the released block's work.
    """
    return ControlNet(replace(config, num_res_blocks=1, middle_attention=False), target=config, paper_encoder=True)


def modulated(config: UNetConfig) -> ControlNet:
    """`reduced_layer` with a modulation before each zero convolution, to give shared features a scale of their own. 177.5 M, 2.04 x."""
    net = reduced_layer(config)
    for zero in [*net.zero_convs, net.middle_block_out]:
        zero.insert(0, Modulation(zero[0].in_channels))
    return net


def loha(config: UNetConfig) -> ControlNet:
    """`modulated` whose backbone has LoHa layers (`kd/loha.py`) of rank `config.rank`, a fifth of the width if it says none. 40.1 M, 9.0 x smaller.

    Smaller to store and to send; to run it is `modulated`, and `kd.loha.merge` makes it that. E(c) and the zero convolutions stay plain.
    """
    net = modulated(replace(config, rank=None))
    net.config = replace(net.config, rank=config.rank or config.model_channels // 5)
    for part in (net.time_embed, net.input_blocks, net.middle_block):
        factorize(part, net.config.rank)
    return net


def mlp(config: UNetConfig) -> MLP:
    """Pixel-wise layers and average pooling behind E(c), connected to the SD encoder at five places (`kd/mlp.py`). 11.0 M, 33 x smaller.

    From the ControlNet authors' discussion of lighter encoders. Small, but not fast: the SD encoder runs a second time for it.
    """
    return MLP(config)


def lite(config: UNetConfig) -> Lite:
    """One plain convolution a block, from scratch (`kd/lite.py`), connected to the decoder by zero convolutions. 29.2 M, 12 x smaller.

    From the ControlNet paper's ablations (section 4.2): no copy, no attention, no prompt. The lightest to run.
    """
    return Lite(config)


STUDENTS: dict[str, Callable[[UNetConfig], nn.Module]] = {
    student.__name__: student for student in (original, reduced_channel, reduced_layer, modulated, loha, mlp, lite)
}


def build_student(name: str, unet: UNet, generator: torch.Generator | None = None) -> nn.Module:
    """A student with fresh weights for this UNet, by its name in STUDENTS; the weights are drawn from `generator` if one is given.

    Raises ValueError for an unknown name.
    """
    if name not in STUDENTS:
        raise ValueError(f"expected a student among {', '.join(STUDENTS)}, got {name!r}")
    student = STUDENTS[name](unet.config)
    student.architecture = name
    return student if generator is None else initialize(student, generator)
