"""The student architectures: lighter networks in a ControlNet's place, most of them a ControlNet
with a few words changed. Each starts exactly at the base model (y_c = y).

A student is a function of the base model's config. Sizes are at Stable Diffusion 1.5's shape, where
the ControlNet has 361.3 M parameters.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from controlnet import ControlNet, ControlNetwork
from controlnet.lite import Lite
from kd import ALTERNATIVES, STUDENTS
from kd.loha import LoHaControlNet
from kd.mlp import MLP
from kd.modulation import ModulatedControlNet
from unet import UNet, UNetConfig
from unet.blocks import initialize


def original(config: UNetConfig) -> ControlNet:
    """The ControlNet itself, with the released E(c): distillation without compression.

    361.3 M, 1 x.
    """
    return ControlNet(config, architecture="original")


def reduced_channel(config: UNetConfig) -> ControlNet:
    """All layers, half the channels; the zero convolutions project back to the UNet's widths.
    95.4 M, 3.8 x smaller.

    Half the width is a quarter of the weights and of the work. The numbers of groups and heads
    stay, so that a group covers the same share of the channels as in the teacher.
    """
    head_dim = config.head_dim and config.head_dim // 2
    narrow = replace(config, model_channels=config.model_channels // 2, head_dim=head_dim)
    return ControlNet(narrow, config, paper_encoder=True, architecture="reduced_channel")


def fewer_blocks(config: UNetConfig) -> UNetConfig:
    """One residual block per level instead of two, and one in the middle without attention."""
    return replace(config, num_res_blocks=1, middle_attention=False, rank=None)


def reduced_layer(config: UNetConfig) -> ControlNet:
    """One residual block per level and in the middle: 13 outputs from 9 layers. 175.3 M, 2.06 x
    smaller.

    Neighbouring layers of a ControlNet have nearly the same outputs, so one layer can feed several
    of the UNet's skip connections, each through its own zero convolution: on SD 1.5 outputs 1 and 2
    share a layer, 4 and 5, 7 and 8, 10 and 11. The paper's E(c) is a seventh of the released one's
    work.
    """
    return ControlNet(fewer_blocks(config), config, paper_encoder=True,
                      architecture="reduced_layer")


def modulated(config: UNetConfig) -> ModulatedControlNet:
    """`reduced_layer` with a modulation before each zero convolution, to give shared features a
    scale of their own (`kd/modulation.py`). 177.5 M, 2.04 x."""
    return ModulatedControlNet(fewer_blocks(config), config)


def modulated_layers(config: UNetConfig) -> ModulatedControlNet:
    """`modulated` with the modulation after each of the nine layers, as the poster on distilling
    ControlNets draws it, not before each of the 13 outputs. 176.7 M, 2.04 x."""
    return ModulatedControlNet(fewer_blocks(config), config, "modulated_layers", after_layers=True)


def loha(config: UNetConfig) -> LoHaControlNet:
    """`modulated` whose backbone has LoHa layers (`kd/loha.py`) of rank `config.rank`, by default a
    fifth of the width. 40.1 M, 9.0 x smaller.

    Smaller to store and to send; to compute it is `modulated`, which `for_inference` turns it into.
    E(c) and the zero convolutions stay plain.
    """
    return LoHaControlNet(*_configs_of_rank(config))


def loha_convolutions(config: UNetConfig) -> LoHaControlNet:
    """`loha` in place of the convolutions alone, as the poster says it; time embedding, attention
    and feed-forward layers stay plain. 79.9 M, 4.5 x smaller."""
    return LoHaControlNet(*_configs_of_rank(config), "loha_convolutions", only_convolutions=True)


def _configs_of_rank(config: UNetConfig) -> tuple[UNetConfig, UNetConfig]:
    """Of a LoHa student and its target."""
    rank = config.rank or config.model_channels // 5
    return replace(fewer_blocks(config), rank=rank), replace(config, rank=None)


def mlp(config: UNetConfig) -> MLP:
    """Pixel-wise layers and average pooling behind E(c), connected to the SD encoder at five points
    (`kd/mlp.py`). 11.0 M, 33 x smaller.

    From the ControlNet authors' discussion of lighter encoders. The smallest; in sampling also the
    lightest to run, in training it makes the SD encoder run a second time.
    """
    return MLP(config)


def lite(config: UNetConfig) -> Lite:
    """One plain convolution per block, from scratch (`controlnet/lite.py`), connected to the
    decoder. 29.2 M, 12 x smaller.

    From the ControlNet paper's ablations (section 4.2): no copy, no attention, no prompt. The
    lightest to train.
    """
    return Lite(config)


# The functions above by their names.
BUILDERS: dict[str, Callable[[UNetConfig], ControlNetwork]] = {
    name: globals()[name] for name in (*STUDENTS, *ALTERNATIVES)
}


def build_student(name: str, unet: UNet,
                  generator: torch.Generator | None = None) -> ControlNetwork:
    """A student with fresh weights for this UNet, by its name in STUDENTS or ALTERNATIVES.
    With a `generator` the weights come from it. Raises ValueError for an unknown name."""
    if name not in BUILDERS:
        raise ValueError(f"expected a student among {', '.join(BUILDERS)}, got {name!r}")
    student = BUILDERS[name](unet.config)
    return student if generator is None else initialize(student, generator)
