"""Control fidelity of a control network: sample held-out circles, and measure whether they obey their condition and their prompt."""

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from controlnet import ControlNet
from controlnet.sampling import Control, generate, initial_latents
from data.circles import HELD_OUT, Circles
from data.fidelity import fidelity


@torch.no_grad()
def sampled(
    sd, net: ControlNet | None, conditions: Sequence[Tensor], prompts: Sequence[str], *, steps: int = 20, seed: int = 0, name: str = ""
) -> Tensor:
    """Pictures (N, 3, H, W) in [0, 1] on the CPU, one for each condition (3, H, W) and prompt, at the base's own guidance (none for empty prompts).

    `sd`: a base model (an object with .unet, .vae, .text, .guidance, .prediction). `net` None: the base without control. The noise
    that picture i starts from depends on `seed` and i alone.
    """
    height, width = conditions[0].shape[1:]
    batch = max(1, 32 * 64**2 // (height * width))  # as many pixels at once as 32 pictures of 64 x 64
    device, generator, pictures = next(sd.unet.parameters()).device, torch.Generator().manual_seed(seed), []
    for i in tqdm(range(0, len(prompts), batch), desc=f"sampling {name}", leave=False):
        words, condition = prompts[i : i + batch], torch.stack(list(conditions[i : i + batch])).to(device)
        context = sd.text.encode(words)
        pictures.append(
            generate(
                sd.unet, sd.vae, [Control(net, condition)] if net else [],
                initial_latents(len(words), height, width, generator).to(device),
                context, sd.text.encode([""]).expand_as(context),
                steps=steps, guidance=sd.guidance if any(words) else 1.0, prediction=sd.prediction,
            ).cpu()
        )  # fmt: skip
    return torch.cat(pictures)


def control_fidelity(
    sd, net: ControlNet | None, *, count: int = 256, size: int = 64, steps: int = 20, seed: int = 0, name: str = "", prompts: bool = True
) -> dict[str, float]:
    """Mean overlap and colour error of `count` held-out circles of `size` pixels, `sampled`: the same ones for every network.

    `prompts` False: every prompt is the empty one, which names no colours, so that the pictures are measured by their own.
    """
    circles = Circles(size, count, first=HELD_OUT)
    conditions, words = zip(*((sample["condition"], sample["prompt"] if prompts else "") for sample in map(circles.__getitem__, range(count))), strict=True)
    pictures = sampled(sd, net, conditions, words, steps=steps, seed=seed, name=name)
    return fidelity(pictures, [circles.circle(i) for i in range(count)], own_colors=not prompts)


def print_fidelity(sd, networks: dict[str, ControlNet | None], *, count: int, size: int, steps: int = 20) -> dict[str, dict[str, float]]:
    """Print a row a network (None: the base without control) as soon as it is measured; returns the rows by name."""
    print(f"\ncontrol fidelity on {count} held-out circles, {steps} DDIM steps, guidance {sd.guidance:g}")
    rows, width = {}, max(28, *(len(name) + 2 for name in networks))
    print(f"{'':{width}}{'parameters':>12}{'overlap':>10}{'colour error':>14}")
    for name, net in networks.items():
        rows[name] = control_fidelity(sd, net, count=count, size=size, steps=steps, name=name)
        parameters = f"{sum(p.numel() for p in net.parameters()):,}" if net else "-"
        print(f"{name:{width}}{parameters:>12}{rows[name]['overlap']:>10.3f}{rows[name]['color_error']:>14.1f}", flush=True)
    return rows
