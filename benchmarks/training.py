"""What a training step costs by setting: python -m benchmarks.training --base tiny

Seconds of an optimizer step, medians of runs that take turns, so that a slower minute of the
machine hits all of them alike, and how many times faster each setting is than the first one of the
same network. Distillation of --student has all three losses unless its name says otherwise. Random
weights: no file is needed.
"""

import sys
from argparse import Namespace
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.costs import BASES
from benchmarks.step import forward_backward
from common.cli import Parser, device, picture_side, positive, run
from common.devices import tune
from controlnet import ControlledUNet, ControlNet
from kd import STUDENTS, build_student
from text import TOKENS
from unet import UNet
from unet.blocks import initialize
from vae import DOWNSCALE, VAE


class Setting(NamedTuple):
    """A row of the table."""

    name: str
    student: str | None    # None: a ControlNet
    has_teacher: bool = True
    mode: str = "default"
    layer_only: bool = False
    checkpointing: bool = False
    encodes: bool = False  # the pictures, instead of taking cached latents


def settings(student: str) -> list[Setting]:
    return [
        Setting("ControlNet, no teacher", None, has_teacher=False),
        Setting("ControlNet, --mode small", None, has_teacher=False, mode="small"),
        Setting(student, student),
        Setting(f"{student}, --mode small", student, mode="small"),
        Setting(f"{student}, --checkpointing", student, checkpointing=True),
        Setting(f"{student}, latents not cached", student, encodes=True),
        Setting(f"{student}, L_layer alone", student, layer_only=True),
        Setting(f"{student}, no teacher", student, has_teacher=False),
    ]


class Steps:
    """Optimizer steps of a base model's shape on random weights and inputs."""

    def __init__(self, base: str, size: int, batch_size: int, device: torch.device):
        config, vae_config, _ = BASES[base]
        generator = torch.Generator().manual_seed(0)
        self.unet, self.vae = (
            initialize(network, generator).requires_grad_(False).to(device)
            for network in (UNet(config), VAE(vae_config)))
        side = size // DOWNSCALE
        shapes = [(config.latent_channels, side, side), (config.latent_channels, side, side),
                  (TOKENS, config.context_dim), (3, size, size)]
        noisy_latents, self.target, context, self.condition = (
            torch.randn((batch_size, *shape), generator=generator).to(device) for shape in shapes)
        timesteps = torch.full((batch_size,), 500, device=device)
        self.inputs: tuple[Tensor, ...] = noisy_latents, self.condition, timesteps, context
        # The tiny model's teacher has the paper's E(c), published ones have the released one.
        teacher = ControlNet.from_unet(self.unet, paper_encoder=base == "tiny")
        self.taught = ControlledUNet(self.unet, teacher.requires_grad_(False).to(device))

    def of(self, setting: Setting) -> Callable[[], None]:
        """A function that takes one step."""
        net = ControlNet.from_unet(self.unet)
        if setting.student:
            net = build_student(setting.student, self.unet, torch.Generator().manual_seed(0))
        net.to(self.condition.device)
        if setting.mode == "small":
            net.connect_only_middle()
        student = ControlledUNet(self.unet, net)
        taught = self.taught if setting.has_teacher else None
        trained = [p for p in net.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, fused=True)

        def step() -> None:
            for network in (self.unet, net):
                network.set_checkpointing(setting.checkpointing)
            if setting.encodes:
                with torch.no_grad():
                    for picture in self.condition:  # one at a time, as the cache does
                        self.vae.encode(picture[None])
            forward_backward(self.unet, student, taught, self.inputs, self.target,
                             layer_only=setting.layer_only)
            optimizer.step()
            optimizer.zero_grad()

        return step


def seconds(step: Callable[[], None], device: torch.device) -> float:
    start = perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return perf_counter() - start


def parse(argv: list[str] | None) -> Namespace:
    p = Parser(__doc__)
    p.add_argument("--base", choices=list(BASES), default="tiny",
                   help="the base model's shape (default: tiny)")
    p.add_argument("--student", choices=list(STUDENTS), default="reduced_layer",
                   help="which student (default: reduced_layer)")
    p.add_argument("--resolution", type=picture_side,
                   help="side of the pictures, divisible by 8 (default: the base's)")
    p.add_argument("--batch-size", type=positive, default=16, help="pictures a step (default: 16)")
    p.add_argument("--repeats", type=positive, default=9,
                   help="steps a median is over (default: 9)")
    p.add_argument("--only", type=int, nargs="+",
                   help="indices of the settings to measure, from 0 (default: all)")
    p.add_argument("--device", type=device, default="auto",
                   help="auto, cpu or cuda (default: auto, CUDA if there is a GPU)")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    size = args.resolution or BASES[args.base][-1]
    tune(size)
    steps_of = Steps(args.base, size, args.batch_size, args.device)
    steps = {setting.name: steps_of.of(setting)
             for i, setting in enumerate(settings(args.student))
             if args.only is None or i in args.only}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()  # to warm up
    for _ in range(args.repeats):
        for name, step in steps.items():
            times[name].append(seconds(step, args.device))

    machine = f"CPU, {torch.get_num_threads()} threads"
    if args.device.type == "cuda":
        machine = torch.cuda.get_device_name()
    print(f"{args.base}, batch {args.batch_size}, {machine}, median of {args.repeats}")
    print(f"{'':36}{'seconds a step':>15}{'images/s':>10}{'times faster':>14}")
    for name, durations in times.items():
        network = name.split(",")[0]
        reference = next(times[other] for other in times if other.split(",")[0] == network)
        duration = median(durations)
        print(f"{name:36}{duration:>15.3f}{args.batch_size / duration:>10.2f}"
              f"{median(reference) / duration:>14.2f}")


if __name__ == "__main__":
    sys.exit(run(main))
