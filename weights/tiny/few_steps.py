"""The tiny Turbo: a version of the tiny base that makes a picture in 1 to 4 steps.

What the base makes of a noise is fixed: DDIM follows a path from each noise to one picture. So the
base first makes some thousand pairs of noise and picture, under guidance; then a copy of it learns
to see the picture in its noise at once, from every point of the straight line between the two
(InstaFlow, Liu et al. 2023, whose rectified flow this is in Stable Diffusion's own terms). Guidance
is part of what is learnt, so sampling runs the UNet once a step and without it.
"""

from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from common.files import atomic_write
from controlnet.sampling import initial_latents
from data.circles import Circles
from diffusion import (
    Sampling,
    classifier_free_guidance,
    ddim_sample,
    ddim_timesteps,
    q_sample,
    x0_weights,
)
from unet import UNet
from weights import tiny
from weights.stable_diffusion import (
    StableDiffusion,
    load_stable_diffusion,
    save_stable_diffusion,
)
from weights.stages import stage, train, train_network

PAIRS = 4_000        # of noise and picture: ten minutes on one core
TEACHER_STEPS = 20   # of the path that leads from one to the other
CHUNK = 250          # pairs that are made and saved at once
BATCH = 32
STEPS = 4            # at whose timesteps the copy learns, those of one and two steps among them
EMPTY = 0.1          # of the pairs are without prompt, and then without guidance
TRAINING = "--timesteps trailing:4 --weighting x0 --lr 1e-3"
TEACHER = f"{TRAINING} --steps 1600 --decay 800"
STUDENTS = {
    "reduced_layer": f"{TRAINING} --steps 1600 --decay 400 --layer-only-steps 800",
    "lite": f"{TRAINING} --steps 2400 --decay 800 --layer-only-steps 0 --loss-layer 0",
}


@torch.no_grad()
def make_pairs(sd: StableDiffusion, prompts: list[str], folder: Path) -> tuple[Tensor, Tensor]:
    """Noises and the clean latents that the base makes of them, each (N, 4, h, w). Chunks that are
    in `folder` are not made again."""
    folder.mkdir(parents=True, exist_ok=True)
    chunks = []
    for first in range(0, len(prompts), CHUNK):
        file = folder / f"{first:06}.pt"
        if not file.exists():
            texts = prompts[first : first + CHUNK]
            generator = torch.Generator().manual_seed(first)
            noise = initial_latents(len(texts), sd.resolution, sd.resolution, generator)
            context, empty = sd.text.encode(texts), sd.text.encode([""])
            guided = classifier_free_guidance(sd.unet, context, empty.expand_as(context),
                                              sd.sampling.guidance)
            latents = ddim_sample(guided, noise, TEACHER_STEPS, spacing="trailing")
            with atomic_write(file) as temporary:
                torch.save((noise, latents), temporary)
            print(f"{first + len(texts)} of {len(prompts)} pairs", flush=True)
        chunks.append(torch.load(file, weights_only=True))
    noises, latents = map(torch.cat, zip(*chunks, strict=True))
    return noises, latents


def make_turbo(sd: StableDiffusion, work: Path, generator: torch.Generator, steps: int,
               state: Path) -> UNet:
    """A copy of the base's UNet after `steps` steps on pairs that the base makes."""
    data = Circles(sd.resolution, PAIRS)
    empty = torch.rand(PAIRS, generator=torch.Generator().manual_seed(0)) < EMPTY
    prompts = ["" if is_empty else data.prompt(i) for i, is_empty in enumerate(empty.tolist())]
    noises, pictures = make_pairs(sd, prompts, work / "pairs")
    with torch.no_grad():
        states = {prompt: sd.text.encode([prompt])[0] for prompt in set(prompts)}
    grid = torch.tensor(ddim_timesteps(STEPS, "trailing"))
    weights = x0_weights(grid, "epsilon")
    unet = deepcopy(sd.unet).requires_grad_(True).train()

    def loss_of_step() -> Tensor:
        i = torch.randint(PAIRS, (BATCH,), generator=generator)
        k = torch.randint(STEPS, (BATCH,), generator=generator)
        context = torch.stack([states[prompts[j]] for j in i.tolist()])
        noise = noises[i]
        noisy = q_sample(pictures[i], grid[k], noise)
        error = (unet(noisy, grid[k], context) - noise).square().mean((1, 2, 3))
        return (weights[k] * error).mean()

    return train(unet, loss_of_step, steps, lr=3e-4, ema=0.998, generator=generator, state=state)


def make_few_steps(out: Path, work: Path) -> None:
    """Write the tiny Turbo, its ControlNet and two students of that into the folder `out`."""
    sd = load_stable_diffusion(tiny.SD)
    unet = stage(UNet(sd.unet.config), work / "unet", 2000, partial(make_turbo, sd, work))
    base, teacher = out / tiny.TURBO.name, out / tiny.TURBO_CONTROLNET.name
    save_stable_diffusion(base, replace(sd, unet=unet, sampling=Sampling(STEPS, 0.0, "trailing")))
    train_network(base, unet, work / "controlnet", teacher, [
        "--init", str(tiny.CONTROLNET), *TEACHER.split()])
    for name, options in STUDENTS.items():
        path = out / tiny.TURBO_STUDENTS.name / f"{name}.safetensors"
        train_network(base, unet, work / name, path, [
            "--student", name, "--teacher", str(teacher), *options.split()])
