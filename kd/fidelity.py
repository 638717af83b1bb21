"""Control fidelity of a control network: sample held-out circles, and measure whether they obey their condition and their prompt."""

import torch
from tqdm import tqdm

from controlnet import ControlNet
from controlnet.sampling import Control, generate, initial_latents
from data.circles import HELD_OUT, Circles
from data.fidelity import fidelity


@torch.no_grad()
def control_fidelity(
    sd, net: ControlNet | None, *, count: int = 256, size: int = 64, steps: int = 20, seed: int = 0, name: str = "", prompts: bool = True
) -> dict[str, float]:
    """Mean overlap and colour error of `count` held-out circles of `size` pixels, sampled with `steps` DDIM steps at the base's own guidance.

    `sd`: a base model (an object with .unet, .vae, .text, .guidance, .prediction). `net` None: the base without control, whose
    overlap shows what chance gives. The prompts, conditions and initial noise are the same for every network.
    `prompts` False: every prompt is the empty one, which names no colours, so that the pictures are measured by their own.
    """
    batch = max(1, 32 * 64**2 // size**2)  # as many pixels at once as 32 pictures of 64 x 64
    circles, generator = Circles(size, count, first=HELD_OUT), torch.Generator().manual_seed(seed)
    device, pictures = next(sd.unet.parameters()).device, []
    for i in tqdm(range(0, count, batch), desc=f"sampling {name}", leave=False):
        samples = [circles[j] for j in range(i, min(i + batch, count))]
        context = sd.text.encode([s["prompt"] if prompts else "" for s in samples])
        condition = torch.stack([s["condition"] for s in samples]).to(device)
        pictures.append(
            generate(
                sd.unet, sd.vae, [Control(net, condition)] if net else [],
                initial_latents(len(samples), size, size, generator).to(device),
                context, sd.text.encode([""]).expand_as(context),
                steps=steps, guidance=sd.guidance if prompts else 1.0, prediction=sd.prediction,
            )
        )  # fmt: skip
    return fidelity(torch.cat(pictures), [circles.circle(i) for i in range(count)], own_colors=not prompts)


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
