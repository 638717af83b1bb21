"""What a run shows while it goes on: which weights learn, and grids of sample pictures."""

import json
import warnings
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from controlnet import ControlNetwork
from controlnet.sampling import restored, sample_pictures
from data.dataset import Dataset, Sample
from data.grids import grid
from data.pictures import to_image, write_png
from weights import StableDiffusion

GRID_SAMPLES = 4
# The target through the autoencoder is the best that can be; what the base makes without control is
# what an untrained control network gives.
TITLES = ["Prompt", "Control", "Target restored", "Base (text alone)", "Samples"]


def preview_samples(data: Dataset, count: int) -> list[Sample]:
    """The samples of a data set that pictures and measures are made of."""
    preview = data.preview(count)
    return [preview[i] for i in range(len(preview))]


def print_buckets(data: Dataset, batch_size: int) -> None:
    """How many pictures there are of each size, and which size is measured. `batch_size`: of all
    processes together."""
    counts = Counter(data.shape(i) for i in range(len(data))).most_common()
    sizes = {f"{width} x {height}": number for (height, width), number in counts}
    height, width = data.preview(1).shape(0)
    print("buckets (width x height): "
          + ", ".join(f"{number:,} pictures of {size}" for size, number in sizes.items())
          + f"; sampled and measured are those of {width} x {height} alone")
    rare = [size for size, number in sizes.items() if number < batch_size]
    if rare:
        warnings.warn(f"there are fewer pictures of {', '.join(rare)} than a batch has, "
                      f"{batch_size}: they come once in several epochs, then each several times",
                      stacklevel=2)


def print_networks(title: str, networks: dict[str, nn.Module | None]) -> None:
    """A table of trainable and frozen parameters."""
    tqdm.write(f"{title:24}{'trainable':>15}{'frozen':>15}   parameters")
    for name, network in networks.items():
        if network is not None:
            parameters = list(network.parameters())
            trainable = sum(p.numel() for p in parameters if p.requires_grad)
            frozen = sum(p.numel() for p in parameters) - trainable
            tqdm.write(f"  {name:22}{trainable:>15,}{frozen:>15,}")


def sampled(sd: StableDiffusion, net: ControlNetwork | None, samples: list[Sample], seed: int,
            name: str = "") -> Tensor:
    """Pictures (N, 3, H, W) in [0, 1] of the samples' prompts, `net` None: of these alone."""
    conditions = torch.stack([s["condition"] for s in samples])
    return sample_pictures(sd, net, conditions, [s["prompt"] for s in samples], seed=seed,
                           name=name)


def base_pictures(sd: StableDiffusion, data: Dataset, seed: int) -> Tensor:
    """What the base makes of the grid's prompts alone, from the noise of its samples. For the
    large mode, where it learns: to be called before it does."""
    return sampled(sd, None, preview_samples(data, GRID_SAMPLES), seed, "the base alone")


@torch.no_grad()
def save_sample_grid(sd: StableDiffusion, net: ControlNetwork, data: Dataset, base: Tensor,
                     folder: Path, step: int, *, seed: int) -> None:
    """Write STEP.png, with the columns of TITLES: the same samples and the same noise every time.
    `base`: its `base_pictures`."""
    samples = preview_samples(data, GRID_SAMPLES)
    targets = restored(sd.vae, torch.stack([s["target"] for s in samples]))
    pictures = sampled(sd, net, samples, seed)
    rows = [[s["prompt"], s["condition"], *shown]
            for s, *shown in zip(samples, targets, base, pictures, strict=True)]
    write_png(folder / "condition.png", to_image(samples[0]["condition"]))
    cell = max(128, min(data.size, 256))
    write_png(folder / f"{step:06}.png", grid(TITLES, rows, cell=cell),
              {"columns": json.dumps(TITLES)})
