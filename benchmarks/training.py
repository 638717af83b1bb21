"""What a training step costs by setting: python -m benchmarks.training --base tiny

Seconds of an optimizer step, medians of runs that take turns, so that a slower minute of the
machine hits all of them alike, and how many times faster each setting is than the plain one of its
network. Distillation of --student is with all three losses, unless the row says otherwise. Random
weights: no file is needed. """

import sys
from argparse import Namespace
from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch

from common.cli import Parser, positive, run
from common.devices import device, tune_cpu
from controlnet import ControlNet
from evaluation.costs import BASES, TOKENS
from kd import STUDENTS
from kd.students import build_student
from training.step import Step
from unet import UNet
from unet.blocks import initialize
from vae import VAE


def rows(args: Namespace) -> dict[str, Callable[[], None]]:
    """Name -> one optimizer step of that setting."""
    config, vae_config, size = BASES[args.base]
    size = args.resolution or size
    generator = torch.Generator().manual_seed(0)
    unet, vae = (
        initialize(network, generator).requires_grad_(False).to(args.device)
        for network in (UNet(config), VAE(vae_config)))
    shapes = [(4, size // 8, size // 8), (4, size // 8, size // 8), (TOKENS, config.context_dim),
              (3, size, size)]
    x_t, target, context, condition = (
        torch.randn((args.batch_size, *shape), generator=generator).to(args.device)
        for shape in shapes)
    given = [
        x_t, target,
        torch.full((args.batch_size, ), 500, device=args.device), context, condition
    ]

    # The teacher of the tiny model has the paper's E(c), published ones have the released one.
    teacher = ControlNet.from_unet(
        unet, paper_encoder=args.base == "tiny").requires_grad_(False).to(args.device)

    def step(taught,
             student=args.student,
             mode="default",
             layer_only=False,
             checkpointing=False,
             encode=False):
        net = build_student(
            student, unet,
            torch.Generator().manual_seed(0)) if student else ControlNet.from_unet(unet)
        learns = Step(unet, net.to(args.device), teacher if taught else None, mode)
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], fused=True)

        def once() -> None:
            unet.checkpointing = learns.net.checkpointing = checkpointing
            if encode:
                with torch.no_grad():
                    for picture in given[-1]:  # as the cache does: one at a time
                        vae.encode(picture[None])
            losses, _ = learns(*given, layer_only)
            sum(losses.values()).backward()
            optimizer.step()
            optimizer.zero_grad()

        return once

    name = args.student
    return {
        "ControlNet, no teacher": lambda: step(False, None),
        "ControlNet, --mode small": lambda: step(False, None, "small"),
        name: lambda: step(True),
        f"{name}, --mode small": lambda: step(True, mode="small"),
        f"{name}, --checkpointing": lambda: step(True, checkpointing=True),
        f"{name}, latents not cached": lambda: step(True, encode=True),
        f"{name}, L_layer alone": lambda: step(True, layer_only=True),
        f"{name}, no teacher": lambda: step(False),
    }


def seconds(once: Callable[[], None], where: torch.device) -> float:
    begun = perf_counter()
    once()
    if where.type == "cuda":
        torch.cuda.synchronize()
    return perf_counter() - begun


def parse(argv: list[str] | None) -> Namespace:
    p = Parser(__doc__)
    p.add_argument(
        "--base", choices=list(BASES), default="tiny", help="whose shape (default: tiny)")
    p.add_argument(
        "--student",
        choices=STUDENTS,
        default="reduced_layer",
        help="which student (default: reduced_layer)")
    p.add_argument(
        "--resolution",
        type=positive,
        help="side of the pictures, divisible by 8 (default: the base's)")
    p.add_argument("--batch-size", type=positive, default=16, help="pictures a step (default: 16)")
    p.add_argument(
        "--repeats", type=positive, default=9, help="steps a median is over (default: 9)")
    p.add_argument(
        "--only", type=int, nargs="+", help="numbers of the rows to measure, from 0 (default: all)")
    p.add_argument(
        "--device",
        type=device,
        default="auto",
        help="auto, cpu or cuda (default: auto, CUDA where there is one)")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    tune_cpu(args.resolution or BASES[args.base][-1])
    steps = {
        name: make()
        for number, (name, make) in enumerate(rows(args).items())
        if args.only is None or number in args.only
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for once in steps.values():
        once()  # to warm up
    for _ in range(args.repeats):
        for name, once in steps.items():
            times[name].append(seconds(once, args.device))
    where = torch.cuda.get_device_name(
    ) if args.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.base}, batch {args.batch_size}, {where}, median of {args.repeats}")
    print(f"{'':36}{'seconds a step':>15}{'images/s':>10}{'times faster':>14}")
    for name, measured in times.items():
        # the first row of the same network
        reference = next(
            times[other] for other in times if other.split(",")[0] == name.split(",")[0])
        print(
            f"{name:36}{median(measured):>15.3f}{args.batch_size / median(measured):>10.2f}{median(reference) / median(measured):>14.2f}"
        )


if __name__ == "__main__":
    sys.exit(run(main))
