"""Figures of what the networks are made of, read off the modules at Stable Diffusion 1.5's size:
the architecture, and what each student keeps, shares or replaces."""

import torch
from matplotlib.figure import Figure

from benchmarks.figures_theme import Theme, arrow, blank, box, legend
from controlnet import ControlNet, ControlNetwork
from controlnet.condition import is_paper_encoder
from controlnet.injection import injection_points
from kd import STUDENTS, build_student
from kd.loha import LoHaLinear
from kd.modulation import ModulatedControlNet
from unet import SD15, UNet
from unet.attention import SpatialTransformer
from unet.blocks import Downsample, ResBlock, Upsample
from unet.model import Block

LAYERS = {ResBlock: "residual", SpatialTransformer: "attention", Downsample: "halve",
          Upsample: "double"}
LATENTS = 64            # side of SD 1.5's latents
MIDDLE = 12             # row of the middle, below the twelve skip connections


def contents(block: Block) -> str:
    """The layers of a block, in a few words."""
    kinds = [LAYERS.get(type(layer), "convolution") for layer in block]
    return " + ".join(dict.fromkeys(kinds))


def architecture(theme: Theme) -> Figure:
    """The frozen UNet, the trainable copy of its encoder, and the zero convolutions between."""
    with torch.device("meta"):
        unet, net = UNet(SD15), ControlNet(SD15)
    figure, axes = blank(theme, 8.3, 7.4, (0, 100), (MIDDLE + 1.6, -2.2))
    encoder, decoder, copy, wide = 1, 34, 66, 20
    blocks = SD15.encoder_blocks() + [(len(SD15.channel_mult) - 1, SD15.encoder_blocks()[-1][1])]
    for row, (level, channels) in enumerate(blocks):
        middle = row == MIDDLE
        for x, module, color in ((encoder, unet, theme.frozen), (copy, net, theme.trained)):
            block = module.middle_block if middle else module.input_blocks[row]
            text = contents(block) + (", + E(c)" if module is net and row == 0 else "")
            box(theme, axes, x, row, wide, 0.66, text, color)
        side = LATENTS // 2**level
        text = f"{channels} x {side} x {side}"
        arrow(theme, axes, (encoder + wide, row), (decoder - 0.4, row))
        axes.text(encoder + wide + 6.5, row - 0.12, text, ha="center", va="bottom", fontsize=7.2,
                  color=theme.text)
        arrow(theme, axes, (copy, row), (decoder + wide + 0.4, row))
        box(theme, axes, copy - 7, row, 3.2, 0.5, "Z", theme.zero)
        if middle:
            box(theme, axes, decoder, row, wide, 0.66, "+", theme.background)
        else:
            block = unet.output_blocks[MIDDLE - 1 - row]
            box(theme, axes, decoder, row, wide, 0.66, contents(block), theme.frozen)
    for row in range(MIDDLE):
        for x, ends in ((encoder, (row + 0.33, row + 0.67)), (copy, (row + 0.33, row + 0.67)),
                        (decoder, (row + 0.67, row + 0.33))):
            arrow(theme, axes, (x + wide / 2, ends[0]), (x + wide / 2, ends[1]))
    columns = {encoder: ("encoder of the UNet", "noisy latents x", (-0.72, -0.33)),
               decoder: ("its decoder", "predicted noise", (-0.33, -0.72)),
               copy: ("copy of the encoder", "noisy latents x", (-0.72, -0.33))}
    for x, (title, end, (start, stop)) in columns.items():
        x += wide / 2
        axes.text(x, -1.75, title, ha="center", fontsize=9, weight="bold", color=theme.text)
        axes.text(x, -0.9, end, ha="center", fontsize=8, color=theme.text)
        arrow(theme, axes, (x, start), (x, stop))
    # E(c) is added after the first convolution, through a zero convolution of its own.
    axes.text(95, -1.75, "condition c", ha="center", fontsize=8, color=theme.text)
    arrow(theme, axes, (95, -1.65), (95, -1.28))
    box(theme, axes, 90.5, -1, 9, 0.55, "E(c)", theme.trained)
    arrow(theme, axes, (95, -0.72), (95, -0.25))
    box(theme, axes, 93.4, 0, 3.2, 0.5, "Z", theme.zero)
    arrow(theme, axes, (93.4, 0), (copy + wide + 0.4, 0))
    legend(theme, axes, MIDDLE + 1.1, {
        "frozen": theme.frozen, "trained": theme.trained,
        f"Z, zero convolution: {len(net.zero_convs) + 1}, and one that ends E(c)": theme.zero})
    return figure


def groups_of(net: ControlNetwork) -> list[tuple[int, int, int]]:
    """(first row, last row, own channels) of every layer of a control network that feeds one or
    several of the 13 outputs; of one that enters the encoder, where it does."""
    own = [channels for _, channels in net.config.encoder_blocks()]
    if net.connects_to == "encoder":
        return [(i, i, channels) for i, channels in injection_points(net.target).items()]
    taps = getattr(net, "taps", range(len(own)))
    rows = [[i for i, other in enumerate(taps) if other == tap] for tap in dict.fromkeys(taps)]
    groups = [(row[0], row[-1], own[tap])
              for row, tap in zip(rows, dict.fromkeys(taps), strict=True)]
    return [*groups, (MIDDLE, MIDDLE, own[-1])]


def kind_of(net: ControlNetwork) -> str:
    """What a network's layers are, against the ControlNet's."""
    if net.connects_to == "encoder":
        return "new, in the UNet's encoder"
    if not isinstance(net, ControlNet):
        return "new: one convolution"
    if any(isinstance(layer, LoHaLinear) for layer in net.modules()):
        return "low-rank weights (LoHa)"
    return "kept" if net.config.model_channels == net.target.model_channels else "kept, narrower"


def students(theme: Theme) -> Figure:
    """What feeds each of the 13 outputs, of the ControlNet and of every student."""
    with torch.device("meta"):
        unet = UNet(SD15)
        nets = {"ControlNet": ControlNet(SD15)} | {n: build_student(n, unet) for n in STUDENTS}
    names = sorted(nets, key=lambda n: -sum(p.numel() for p in nets[n].parameters()))
    figure, axes = blank(theme, 8.3, 5.6, (-9, 96), (MIDDLE + 2.3, -2.9))
    channels = [c for _, c in SD15.encoder_blocks()]
    colors = dict(zip(("kept", "kept, narrower", "low-rank weights (LoHa)",
                       "new: one convolution", "new, in the UNet's encoder"),
                      (theme.trained, *theme.others), strict=True))
    for row in range(MIDDLE + 1):
        label = "middle" if row == MIDDLE else f"skip {row}"
        axes.text(-1, row, label, ha="right", va="center", fontsize=7.5, color=theme.text)
    for column, name in enumerate(names):
        net, x = nets[name], 12 * column
        size = sum(p.numel() for p in net.parameters()) / 1e6
        axes.text(x + 5, -2.45, name, ha="center", fontsize=7.2, weight="bold", color=theme.text)
        axes.text(x + 5, -1.85, f"{size:.1f} M", ha="center", fontsize=7.5, color=theme.text)
        paper = is_paper_encoder(net.state_dict())
        box(theme, axes, x, -1, 10, 0.7, "paper's E(c)" if paper else "released E(c)",
            theme.background, fontsize=7.2)
        if isinstance(net, ModulatedControlNet):
            axes.text(x + 5, MIDDLE + 0.75, "+ modulation", ha="center", fontsize=7,
                      color=theme.text)
        for first, last, own in groups_of(net):
            wide = 10 if net.connects_to == "encoder" else (
                10 * own / ([*channels, channels[-1]][first]))
            text = f"{own}" + (" shared" if last > first else "")
            if first == MIDDLE and not net.config.middle_attention:
                text += " lighter"
            box(theme, axes, x + 5 - wide / 2, (first + last) / 2, wide, last - first + 0.74, text,
                colors[kind_of(net)], fontsize=7.2)
    legend(theme, axes, MIDDLE + 1.7, colors, left=-6, step=19.7)
    return figure
