"""What every control network costs: python -m benchmarks.costs --base sd15

Sizes and work are counted on the meta device, where nothing is allocated or computed; times are
measured on this machine, with random weights. G is 10^9 multiply-accumulates (MACs).
"""

import json
import sys
from argparse import Namespace
from pathlib import Path

from common.cli import Parser, add_device_option, answer, picture_side, positive, run


def parse(argv: list[str] | None) -> Namespace:
    p = Parser(__doc__)
    p.add_argument("--base", choices=["sd15", "sd21", "tiny"], default="tiny",
                   help="the base model's shape (default: tiny)")
    p.add_argument("--resolution", type=picture_side,
                   help="side of the pictures, divisible by 8 (default: 512; tiny: 64)")
    p.add_argument("--no-times", action="store_true",
                   help="count only; at 512 pixels a CPU needs hours to measure")
    p.add_argument("--repeats", type=positive, default=9,
                   help="runs a time is the median of; a third for whole pictures (default: 9)")
    p.add_argument("--out", type=Path, help="JSON file to write (default: print only)")
    add_device_option(p)
    args = p.parse_args(argv)
    from common.devices import device
    args.device = device(args.device)
    return args


if __name__ == "__main__":  # before PyTorch is imported
    answer(parse)

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from common.devices import tune
from common.files import atomic_write
from controlnet import ControlNet, ControlNetwork
from controlnet.sampling import Control, controlled, generate, initial_latents
from diffusion import Sampling
from evaluation.costs import count_macs, dummy_inputs, median_seconds, sizes_and_work
from kd import STUDENTS, build_student
from text import TOKENS
from unet import SD15, SD21, TINY, UNet
from unet.blocks import initialize
from vae import SD_VAE, TINY_VAE, VAE

BASES = {  # name -> UNet, autoencoder, side of its pictures
    "sd15": (SD15, SD_VAE, 512),
    "sd21": (SD21, SD_VAE, 512),
    "tiny": (TINY, TINY_VAE, 64),
}
TEXT_LAYERS = {"sd15": 12, "sd21": 23, "tiny": 2}  # that are run, as wide as the text states
NETWORKS = ("controlnet", *STUDENTS)
STEPS = 20

COLUMNS = {  # of the printed table -> key in a network's costs, unit
    "stored M": ("parameters stored", 1e6),
    "merged M": ("parameters merged", 1e6),
    "fp16 MB": ("bytes in fp16", 1e6),
    "control G": ("MACs of the control", 1e9),
    "step G": ("MACs of a guided step", 1e9),
    "picture G": (f"MACs of a picture, {STEPS} guided steps", 1e9),
    "Turbo G": ("MACs of a picture, 1 step of Turbo", 1e9),
    "train G": ("MACs of training", 1e9),
    "train MB": ("activation bytes of training", 1e6),
    "control ms": ("seconds of the control", 1e-3),
    "step ms": ("seconds of a guided step", 1e-3),
    "picture ms": (f"seconds of a picture, {STEPS} guided steps", 1e-3),
    "train ms": ("seconds of a training step of 2", 1e-3),
}


def text_macs(width: int, layers: int) -> int:
    """Of a prompt in CLIP's text encoder. A layer takes 4 width^2 for its projections and 8 width^2
    for its MLP a token, and the attention's two products."""
    return layers * (TOKENS * 12 * width**2 + 2 * TOKENS**2 * width)


def build(base: str, name: str) -> tuple[UNet, VAE, ControlNetwork]:
    """The base's UNet and autoencoder, frozen, and one control network."""
    config, vae_config, _ = BASES[base]
    unet = UNet(config).requires_grad_(False)
    vae = VAE(vae_config).requires_grad_(False)
    net = ControlNet(config) if name == "controlnet" else build_student(name, unet)
    return unet, vae, net


def count(base: str, name: str, size: int) -> dict[str, int]:
    """Sizes and work of one control network."""
    with torch.device("meta"):
        unet, vae, net = build(base, name)
        costs = sizes_and_work(unet, net, size)
        latents, *_ = dummy_inputs(unet, size, batch=1)
        prompt = text_macs(unet.config.context_dim, TEXT_LAYERS[base])
        decode = count_macs(lambda: vae.decode(latents))
    step = costs["MACs of a guided step"]
    once = costs["MACs of E(c), once a picture"] + decode
    costs[f"MACs of a picture, {STEPS} guided steps"] = 2 * prompt + STEPS * step + once
    if base == "sd21":  # SD-Turbo is one: a single step without guidance
        costs["MACs of a picture, 1 step of Turbo"] = prompt + step // 2 + once
    # Tensors without memory, like the meta device's, but with the CPU's fused attention.
    with FakeTensorMode(allow_non_fake_inputs=True):
        unet.to_empty(device="cpu")
        net.to_empty(device="cpu")
        return costs | training_costs(unet, net, size)


def training_step(unet: UNet, net: ControlNetwork, inputs: tuple[Tensor, ...]) -> None:
    """Forward and backward with L_d alone."""
    latents, _, timesteps, context = inputs
    with torch.no_grad():
        features = unet.encode(latents, timesteps, context)
    unet.decode(features, net.control(*inputs, unet, features)).square().mean().backward()


def training_costs(unet: UNet, net: ControlNetwork, size: int) -> dict[str, int]:
    """Of one picture in a training step: the work, forward and backward, and the bytes of
    activations kept for the backward pass, with fused attention, which keeps no matrix of all
    pixels by all pixels."""
    weights = {p.untyped_storage()._cdata for network in (unet, net) for p in network.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # a reference, so that its address is not used again
        return tensor

    inputs = dummy_inputs(unet, size, batch=1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        macs = count_macs(lambda: training_step(unet, net, inputs))
    activations = sum(storage.nbytes() for storage in kept.values())
    return {"MACs of training": macs, "activation bytes of training": activations}


def measure(base: str, name: str, size: int, repeats: int,
            device: torch.device) -> dict[str, float]:
    """Times of the control network alone, of a guided step with it, of a whole picture from text
    states to pixels, and of a training step."""
    generator = torch.Generator().manual_seed(0)
    unet, vae, net = (initialize(network, generator).to(device) for network in build(base, name))
    inputs = dummy_inputs(unet, size, batch=2)
    latents, condition, timesteps, context = inputs
    training = median_seconds(lambda: training_step(unet, net, inputs), repeats, device)
    net = net.for_inference().requires_grad_(False)
    with torch.no_grad():
        step = controlled(unet, [Control(net, condition[:1]).encoded(latents)])

    def picture() -> Tensor:
        noise = initial_latents(1, size, size, generator).to(device)
        return generate(unet, vae, [Control(net, condition[:1])], noise, context[:1], context[:1],
                        Sampling(steps=STEPS))

    with torch.no_grad():
        features = unet.encode(latents, timesteps, context)
        return {
            "seconds of the control": median_seconds(
                lambda: net.control(*inputs, unet, features), repeats, device),
            "seconds of a guided step": median_seconds(
                lambda: step(latents, timesteps, context), repeats, device),
            f"seconds of a picture, {STEPS} guided steps": median_seconds(
                picture, max(1, repeats // 3), device),
            "seconds of a training step of 2": training,
        }


def print_line(name: str, cells: list[str]) -> None:
    print(f"{name:16}" + "".join(f"{cell:>12}" for cell in cells), flush=True)


def table_cells(costs: dict[str, float], columns: list[str]) -> list[str]:
    values = [costs[key] / unit for key, unit in (COLUMNS[column] for column in columns)]
    return [f"{value:,.1f}" if value >= 10 else f"{value:.3f}" for value in values]


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    size = args.resolution or BASES[args.base][-1]
    tune(size)
    columns = [column for column in COLUMNS
               if (column != "Turbo G" or args.base == "sd21")
               and not (args.no_times and column.endswith(" ms"))]
    print_line("", columns)
    networks = {}
    for name in NETWORKS:
        networks[name] = count(args.base, name, size)
        if not args.no_times:
            networks[name] |= measure(args.base, name, size, args.repeats, args.device)
        print_line(name, table_cells(networks[name], columns))
    if args.out:
        machine = f"CPU, {torch.get_num_threads()} threads"
        if args.device.type == "cuda":
            machine = torch.cuda.get_device_name()
        results = {"base": args.base, "resolution": size,
                   "measured on": None if args.no_times else machine,
                   "torch": torch.__version__, "networks": networks}
        with atomic_write(args.out) as temporary:
            temporary.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run(main))
