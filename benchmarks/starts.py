"""How many steps does a start from the teacher save? python -m benchmarks.starts

Distils every student with L_layer alone at equal steps, from fresh weights and from the teacher's,
on the same batches and noise, and measures L_layer on held-out circles as it falls. Seventeen
trainings of one to two minutes each on one core; a finished one is kept in --out and not run again.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import default_collate

from benchmarks.distillation_recipes import FRESH_ONLY
from common.cli import Parser, positive, run
from common.devices import tune
from common.files import atomic_write
from controlnet import ControlNetwork
from data.circles import HELD_OUT, Circles
from diffusion import TIMESTEPS, q_sample
from kd import STUDENTS, build_student, layerwise_loss
from kd.from_teacher import from_teacher
from training.batches import batches
from training.cache import Cache, latent_cache, text_cache
from vae import sample_latents
from weights import StableDiffusion, load_controlnet, load_stable_diffusion, tiny

TRAINED_ON, HELD_OUT_CIRCLES, BATCH_SIZE = 2000, 64, 16
DROP_PROMPT = 0.5


class Inputs:
    """Batches of circles as the inputs of a control network, with their noise from a generator."""

    def __init__(self, sd: StableDiffusion):
        self.latents: Cache = latent_cache(sd.vae)
        self.text: Cache = text_cache(sd.text)

    @torch.no_grad()
    def __call__(self, batch: dict, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Noisy latents, condition, timesteps and text states."""
        mean, logvar = self.latents(batch["target"]).unbind(dim=1)
        latents = sample_latents(mean, logvar, torch.randn(mean.shape, generator=generator))
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(TIMESTEPS, (len(latents),), generator=generator)
        dropped = torch.rand(len(latents), generator=generator) < DROP_PROMPT
        prompts = ["" if drop else prompt
                   for drop, prompt in zip(dropped, batch["prompt"], strict=True)]
        noisy_latents = q_sample(latents, timesteps, noise)
        return noisy_latents, batch["condition"], timesteps, self.text(prompts)


def loss_curve(sd: StableDiffusion, teacher: ControlNetwork, net: ControlNetwork, inputs: Inputs,
               steps: int, every: int) -> dict[int, float]:
    """Step -> L_layer on held-out circles, while `net` learns from `teacher`."""

    def loss(batch: dict, generator: torch.Generator) -> Tensor:
        batch_inputs = inputs(batch, generator)
        with torch.no_grad():
            teacher_out = teacher.control(*batch_inputs, sd.unet)
        return layerwise_loss(net.control(*batch_inputs, sd.unet), teacher_out)

    held_out = Circles(sd.resolution, HELD_OUT_CIRCLES, first=HELD_OUT)
    held_out_batch = default_collate([held_out[i] for i in range(len(held_out))])
    data = batches(Circles(sd.resolution, TRAINED_ON), BATCH_SIZE, seed=0)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
    losses = {}
    for step in range(steps + 1):
        if step % every == 0:
            with torch.no_grad():
                held_out_loss = loss(held_out_batch, torch.Generator().manual_seed(2))
            losses[step] = round(held_out_loss.item(), 4)
        if step < steps:
            optimizer.zero_grad()
            loss(next(data), generator).backward()
            optimizer.step()
    return losses


def starts(sd: StableDiffusion, teacher: ControlNetwork) -> dict[str, Callable]:
    """Name -> function that builds a student: every student with every start that it has."""

    def fresh(name: str) -> ControlNetwork:
        return build_student(name, sd.unet, torch.Generator().manual_seed(0))

    def taught(name: str, copy_zero_convs: bool = False) -> ControlNetwork:
        generator = torch.Generator().manual_seed(0)
        return from_teacher(fresh(name), teacher, generator, copy_zero_convs)

    by_name = {}
    for name in STUDENTS:
        by_name[f"{name} random"] = partial(fresh, name)
        if name not in FRESH_ONLY:
            by_name[f"{name} teacher"] = partial(taught, name)
            by_name[f"{name} teacher, zero convolutions too"] = partial(taught, name, True)
    return by_name


def parse(argv: list[str] | None) -> Namespace:
    p = Parser(__doc__)
    p.add_argument("--steps", type=positive, default=150, help="of each training (default: 150)")
    p.add_argument("--every", type=positive, default=25,
                   help="steps between measurements (default: 25)")
    p.add_argument("--out", type=Path, default=Path("runs/starts.json"),
                   help="the results (default: runs/starts.json)")
    p.add_argument("--only", nargs="+", default=[""],
                   help="trainings whose name begins with one of these words (default: all)")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    sd = load_stable_diffusion(tiny.SD)
    teacher = load_controlnet(tiny.CONTROLNET, sd.unet)
    tune(sd.resolution)
    inputs = Inputs(sd)
    stored = json.loads(args.out.read_text()) if args.out.exists() else {}
    # Results of another length are kept apart.
    results = stored.setdefault(f"{args.steps} steps, measured every {args.every}", {})
    for name, build in starts(sd, teacher).items():
        if name.startswith(tuple(args.only)) and name not in results:
            net = build().train()
            results[name] = loss_curve(sd, teacher, net, inputs, args.steps, args.every)
            with atomic_write(args.out) as temporary:
                temporary.write_text(json.dumps(stored, indent=1) + "\n")
        if name in results:
            cells = (f"{step:>6}: {loss:.3f}" for step, loss in results[name].items())
            print(f"{name:46}" + "".join(cells), flush=True)


if __name__ == "__main__":
    sys.exit(run(main))
