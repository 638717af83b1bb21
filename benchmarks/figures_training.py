"""Figures of how networks learn, counted and computed: gradient staging, the two phases of
distillation, and size against control fidelity."""

from collections.abc import Callable
from statistics import mean

import torch
from matplotlib.figure import Figure

from benchmarks.docs import BASE, parameters_at_sd15, stored
from benchmarks.figures_theme import Theme, arrow, blank, box, chart, legend
from controlnet import ControlledUNet, ControlNet
from evaluation.costs import count_macs, dummy_inputs
from kd import build_student
from kd.losses import diffusion_loss, distillation_losses
from unet import SD15, UNet, UNetConfig
from weights import load_stable_diffusion, tiny

BELOW = ("original", "reduced_layer")  # in size and overlap next to others, whose names are above
PARTS = ("13 zero convolutions", "copy of the encoder", "end of E(c)", "rest of E(c)")


def part_of(name: str, net: ControlNet) -> str:
    """The part of a ControlNet that a parameter belongs to; the last convolution of E(c), which
    starts at zero, is one of its own."""
    if name.startswith(("zero_convs", "middle_block_out")):
        return PARTS[0]
    if not name.startswith("input_hint_block"):
        return PARTS[1]
    last = f"input_hint_block.{len(net.input_hint_block) - 1}."
    return PARTS[2] if name.startswith(last) else PARTS[3]


def first_gradients(steps: int = 3) -> list[dict[str, float]]:
    """The norm of the gradient of each part in the first steps of a ControlNet on the tiny base."""
    unet = load_stable_diffusion(tiny.SD).unet
    g = torch.Generator().manual_seed(0)
    net = ControlNet.from_unet(unet, generator=g)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    latents, noise = torch.randn(2, 4, 4, 8, 8, generator=g)
    condition, t = torch.rand(4, 3, 64, 64, generator=g), torch.tensor([100, 350, 600, 850])
    context = torch.zeros(4, 77, unet.config.context_dim)
    norms = []
    for _ in range(steps):
        optimizer.zero_grad()
        noise_pred = unet(latents, t, context, net(latents, condition, t, context))
        diffusion_loss(noise_pred, noise).backward()
        squares = dict.fromkeys(PARTS, 0.0)
        for name, parameter in net.named_parameters():
            squares[part_of(name, net)] += parameter.grad.square().sum().item()
        norms.append({part: square**0.5 for part, square in squares.items()})
        optimizer.step()
    return norms


def gradients(theme: Theme) -> Figure:
    """How far the gradient comes in the first three steps."""
    figure, axes = blank(theme, 8.3, 3.4, (0, 100), (6.9, -0.8))
    for step, norms in enumerate(first_gradients()):
        x, wide = 5 + 32 * step, 26
        axes.text(x + wide / 2, -0.35, f"step {step + 1}", ha="center", fontsize=9, weight="bold",
                  color=theme.text)
        rows = [("loss", theme.background), ("decoder of the UNet", theme.frozen)]
        for part, norm in norms.items():
            size = f"{norm:.2g}" if norm else "0"
            rows.append((f"{part}: {size}", theme.trained if norm else theme.background))
        for row, (text, color) in enumerate(rows):
            box(theme, axes, x, row + 0.3, wide, 0.62, text, color)
            if row and color != theme.background:
                arrow(theme, axes, (x + wide / 2, row - 0.39), (x + wide / 2, row - 0.01),
                      width=1.5)
    legend(theme, axes, 6.3, {"gets a gradient": theme.trained, "none yet": theme.background,
                              "frozen, lets it pass": theme.frozen}, left=16)
    return figure


def phase_work(config: UNetConfig = SD15, size: int = 512) -> dict[str, dict[str, float]]:
    """10^9 multiply-accumulates of a distillation step of `reduced_layer` on one picture of `size`
    pixels: phase -> part -> work."""
    with torch.device("meta"):
        unet = UNet(config).requires_grad_(False)
        teacher = ControlNet(config).requires_grad_(False)
        student = build_student("reduced_layer", unet)
        inputs = dummy_inputs(unet, size, batch=1)
    latents, _, timesteps, context = inputs

    def step(with_unet: bool) -> None:
        with torch.no_grad():
            features = unet.encode(latents, timesteps, context) if with_unet else None
            target = ControlledUNet(unet, teacher)(*inputs, features, with_unet)
        predicted = ControlledUNet(unet, student)(*inputs, features, with_unet)
        sum(distillation_losses(predicted, target, latents).values()).backward()

    def forward(work: Callable[[], object]) -> float:
        with torch.no_grad():
            return count_macs(work) / 1e9

    features = unet.encode(latents, timesteps, context)
    control = {"teacher": forward(lambda: teacher(*inputs)),
               "student": forward(lambda: student(*inputs))}
    decode = forward(lambda: unet.decode(features))
    both = control | {"encoder": forward(lambda: unet.encode(latents, timesteps, context)),
                      "decoder, teacher's": decode, "decoder, student's": decode}
    return {name: parts | {"backward": count_macs(lambda w=w: step(w)) / 1e9 - sum(parts.values())}
            for name, parts, w in (("L_layer alone", control, False), ("all losses", both, True))}


def phases(theme: Theme) -> Figure:
    """What runs in each phase of distillation; as wide as the work is large."""
    work = phase_work()
    total = max(sum(parts.values()) for parts in work.values())
    colors = {"student": theme.trained, "backward": theme.zero}
    figure, axes = blank(theme, 8.3, 3.0, (0, 100), (3.5, -0.6))
    texts = {"L_layer alone": "first phase: L_layer compares the 13 outputs of both; no UNet",
             "all losses": "second phase: L_layer, L_d and L_td; the UNet's encoder serves both "
                           "decoders"}
    for row, (name, parts) in enumerate(work.items()):
        y, x = 1.55 * row + 0.65, 3.0
        gigas = sum(parts.values())
        axes.text(3, y - 0.62, f"{texts[name]}: {gigas:,.0f} G a step", fontsize=8,
                  color=theme.text)
        for part, value in parts.items():
            wide = 94 * value / total
            label = part.replace(", ", ",\n")
            box(theme, axes, x, y, wide, 0.85, f"{label}\n{value:.0f} G",
                colors.get(part, theme.frozen), fontsize=7.2)
            x += wide
    legend(theme, axes, 3.15, {"frozen": theme.frozen, "learns": theme.trained,
                               "backward pass": theme.zero}, left=20, step=22,
           height=0.28)
    return figure


def sizes(theme: Theme) -> Figure:
    """Parameters at Stable Diffusion 1.5's size against the overlap of docs/evaluation.json."""
    networks = stored("evaluation")["networks"]
    overlap = {name: mean(row["control fidelity"]["right prompt"]["overlap"])
               for name, row in networks.items()}
    figure, axes = chart(theme, 8.3, 4)
    chance = overlap.pop(BASE)
    axes.axhline(chance, color=theme.text, linewidth=0.8, linestyle=":")
    axes.text(11, chance + 0.01, "base without control", fontsize=8, color=theme.text)
    for name, value in overlap.items():
        size = parameters_at_sd15(name) / 1e6
        axes.plot(size, value, "o", color=theme.trained, markeredgecolor=theme.text, markersize=7)
        axes.annotate(name, (size, value), (0, -15 if name in BELOW else 8),
                      textcoords="offset points", ha="center", fontsize=8, color=theme.text)
    axes.set(xscale="log", ylim=(0.3, 1), xlim=(8, 600), ylabel="overlap with the true circle",
             xlabel="million parameters at Stable Diffusion 1.5's size")
    axes.set_xticks([10, 30, 100, 300], ["10", "30", "100", "300"])
    axes.minorticks_off()
    return figure
