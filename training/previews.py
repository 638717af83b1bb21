"""What a training run shows while it goes on: which weights learn, sample pictures, and the measures of control."""

from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from controlnet import ControlNet
from controlnet.sampling import Control, generate, initial_latents
from data.circles import HELD_OUT, Circles
from data.folder import Folder
from data.pictures import grid, to_image, write_png
from evaluation.fidelity import control_fidelity


def print_networks(title: str, networks: dict[str, nn.Module | None]) -> None:
    """A table of what learns and what is frozen."""
    tqdm.write(f"{title:24}{'trainable':>15}{'frozen':>15}   parameters")
    for name, network in networks.items():
        if network is not None:
            learns = sum(p.numel() for p in network.parameters() if p.requires_grad)
            tqdm.write(f"  {name:22}{learns:>15,}{sum(p.numel() for p in network.parameters()) - learns:>15,}")


def shown(data: Circles | Folder, count: int = 4) -> list[dict]:
    """The samples that pictures and measures are made of: held-out circles, or the first of a folder."""
    if not isinstance(data, Folder):
        data = Circles(data.size, count, first=HELD_OUT)
    return [data[i] for i in range(min(count, len(data)))]


@torch.no_grad()
def save_sample_grid(sd, net: ControlNet, data: Circles | Folder, folder: Path, step: int, seed: int, steps: int) -> None:
    """Write STEP.png, Prompt | Control | Reconstruction | Samples: the same four samples and noises every time."""
    samples, device = shown(data), next(net.parameters()).device
    condition = torch.stack([s["condition"] for s in samples]).to(device)
    context = sd.text.encode([s["prompt"] for s in samples])
    latents = initial_latents(len(samples), data.size, data.size, torch.Generator().manual_seed(seed)).to(device)
    pictures = generate(sd.unet, sd.vae, [Control(net, condition)], latents, context, sd.text.encode([""]).expand_as(context),
                        steps=steps, guidance=sd.guidance, prediction=sd.prediction)
    means, _ = sd.vae.encode(torch.stack([s["target"] for s in samples]).to(device))
    reconstructions = (sd.vae.decode(means).float() / 2 + 0.5).clamp(0, 1)
    rows = [[s["prompt"], s["condition"], r, p] for s, r, p in zip(samples, reconstructions.cpu(), pictures.cpu(), strict=True)]
    write_png(folder / "condition.png", to_image(samples[0]["condition"]))
    write_png(folder / f"{step:06}.png", grid(["Prompt", "Control", "Reconstruction", "Samples"], rows, cell=max(128, min(data.size, 256))))


@torch.no_grad()
def measures(sd, net: ControlNet, probe, data: Circles | Folder, count: int, steps: int) -> dict[str, float]:
    """The convergence probe, and for circles control fidelity on `count` held-out ones."""
    found = {"probe": probe(net)}
    return found if isinstance(data, Folder) else found | control_fidelity(sd, net, count=count, size=data.size, steps=steps)
