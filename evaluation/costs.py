"""What every control network costs: python -m evaluation.costs --base sd15

Sizes and work are counted on the meta device, where nothing is allocated or computed; times are measured on this machine, with random
weights. G is 10^9 multiply-accumulates, those of the attention's two products included (so 512 x 512 pixels are 401.6 G for SD 1.5's
UNet); activations, norms and additions are not counted. One ratio could not say it all: a network with a tenth of the weights may take
half of the control's time, a tenth off a step, and less off a picture.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from common.cli import Parser, positive, run
from common.devices import device, tune_cpu
from common.files import atomic_write
from controlnet import ControlNet
from controlnet.sampling import Control, controlled, generate, initial_latents
from kd.students import STUDENTS, build_student
from unet import SD15, SD21, TINY, UNet
from unet.blocks import initialize
from vae import SD_VAE, TINY_VAE, VAE

BASES = {"sd15": (SD15, SD_VAE, 512), "sd21": (SD21, SD_VAE, 512), "tiny": (TINY, TINY_VAE, 64)}
TEXT_LAYERS = {"sd15": 12, "sd21": 23, "tiny": 2}  # that run, as wide as the text states
TOKENS = 77
NETWORKS = ("controlnet", *STUDENTS)
STEPS = 20


def macs(work: Callable[[], object]) -> int:
    """Multiply-accumulates of a piece of work: half of its floating-point operations."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() // 2


def text_macs(width: int, layers: int) -> int:
    """Of a prompt in CLIP's text encoder: in a layer 4 width^2 for the projections and 8 width^2 for the MLP a token, and the attention's products."""
    return layers * (TOKENS * 12 * width**2 + 2 * TOKENS**2 * width)


def build(base: str, name: str) -> tuple[UNet, VAE, nn.Module]:
    """The base's UNet and autoencoder, frozen, and one control network."""
    config, vae_config, _ = BASES[base]
    unet, vae = UNet(config), VAE(vae_config)
    for network in (unet, vae):
        network.requires_grad_(False)
    return unet, vae, ControlNet(config) if name == "controlnet" else build_student(name, unet)


def inputs(unet: UNet, size: int, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, condition, timesteps and context for `batch` pictures, of zeros."""
    like = next(unet.parameters())
    shapes = ((batch, unet.config.latent_channels, size // 8, size // 8), (batch, 3, size, size), (batch,), (batch, TOKENS, unet.config.context_dim))
    return tuple(like.new_zeros(shape) for shape in shapes)


def sizes_and_work(unet: UNet, net: nn.Module, size: int) -> dict[str, int]:
    """Of any control network: its parameters, and its work as it runs, LoHa layers merged. Both networks are on the meta device."""
    parameters, merged = sum(p.numel() for p in net.parameters()), net.for_inference()
    x, condition, t, context = inputs(unet, size, batch=1)
    with torch.no_grad():
        features = unet.encode(x, t, context)
        control, step = macs(lambda: merged.control(x, condition, t, context, unet, features)), macs(lambda: unet(x, t, context))
        forming = macs(lambda: net.control(x, condition, t, context, unet, features)) - control
    return {
        "parameters stored": parameters,
        "parameters merged": sum(p.numel() for p in merged.parameters()),
        "bytes in fp16": 2 * parameters,
        "MACs of the control": control,
        "MACs of a guided step": 2 * (control + step),
        "MACs to form the weights, if not merged": forming,
    }


def count(base: str, name: str, size: int) -> dict[str, int]:
    """Sizes and work of one control network on the meta device."""
    with torch.device("meta"):
        unet, vae, net = build(base, name)
        row = sizes_and_work(unet, net, size)
        x = inputs(unet, size, batch=1)[0]
        words, decode = text_macs(unet.config.context_dim, TEXT_LAYERS[base]), macs(lambda: vae.decode(x))
    row[f"MACs of a picture, {STEPS} guided steps"] = 2 * words + STEPS * row["MACs of a guided step"] + decode
    if base == "sd21":
        row["MACs of a picture, 1 step of Turbo"] = words + row["MACs of a guided step"] // 2 + decode
    with FakeTensorMode(allow_non_fake_inputs=True):  # tensors without memory, like the meta device's, but with the CPU's fused attention
        return row | training_costs(unet.to_empty(device="cpu"), net.to_empty(device="cpu"), size)


def training_costs(unet: UNet, net: nn.Module, size: int) -> dict[str, int]:
    """Of one picture in a training step with L_d alone: the work, forward and backward, and the bytes of activations kept for the backward pass.

    With fused attention, which keeps no matrix of all pixels by all pixels.
    """
    x, condition, t, context = inputs(unet, size, batch=1)
    weights = {p.untyped_storage()._cdata for network in (unet, net) for p in network.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # holding it keeps its number from being given to another
        return tensor

    def train() -> None:
        with torch.no_grad():
            features = unet.encode(x, t, context)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = unet.decode(features, net.control(x, condition, t, context, unet, features)).square().mean()
        loss.backward()

    return {"MACs of training": macs(train), "activation bytes of training": sum(storage.nbytes() for storage in kept.values())}


def seconds(work: Callable[[], object], repeats: int, where: torch.device) -> float:
    """Median time of a piece of work, after one run to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = perf_counter()
        work()
        if where.type == "cuda":
            torch.cuda.synchronize()
        times.append(perf_counter() - start)
    return median(times[1:])


def measure(base: str, name: str, size: int, args: Namespace) -> dict[str, float]:
    """Times of the control network alone, of a guided step with it, of a whole picture from text states to pixels, and of a training step."""
    generator = torch.Generator().manual_seed(0)
    unet, vae, net = (initialize(network, generator).to(args.device) for network in build(base, name))
    x, condition, t, context = inputs(unet, size, batch=2)

    def train() -> None:
        with torch.no_grad():
            features = unet.encode(x, t, context)
        unet.decode(features, net.control(x, condition, t, context, unet, features)).square().mean().backward()

    seconds_of_training = seconds(train, args.repeats, args.device)
    net = net.for_inference().requires_grad_(False)

    def picture() -> Tensor:
        noise = initial_latents(1, size, size, generator).to(args.device)
        return generate(unet, vae, [Control(net, condition[:1])], noise, context[:1], context[:1], steps=STEPS)

    with torch.no_grad():
        features = unet.encode(x, t, context)
        step = controlled(unet, [Control(net, condition)])
        return {
            "seconds of the control": seconds(lambda: net.control(x, condition, t, context, unet, features), args.repeats, args.device),
            "seconds of a guided step": seconds(lambda: step(x, t, context), args.repeats, args.device),
            f"seconds of a picture, {STEPS} guided steps": seconds(picture, max(1, args.repeats // 3), args.device),
            "seconds of a training step of 2": seconds_of_training,
        }


# Column of the printed table: what it shows of a row, in which unit.
COLUMNS = {
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


def print_row(name: str, row: dict[str, float] | None, columns: list[str]) -> None:
    """One line of the table; None: its head."""
    cells = columns
    if row:
        values = [row[key] / unit for key, unit in (COLUMNS[column] for column in columns)]
        cells = [f"{value:,.1f}" if value >= 10 else f"{value:.3f}" for value in values]
    print(f"{name:16}" + "".join(f"{cell:>12}" for cell in cells), flush=True)


def parse(argv: list[str] | None) -> Namespace:
    p = Parser(__doc__)
    p.add_argument("--base", choices=list(BASES), default="tiny", help="whose shape (default: tiny)")
    p.add_argument("--resolution", type=positive, help="side of the pictures, divisible by 8 (default: 512; tiny: 64)")
    p.add_argument("--no-times", action="store_true", help="count only; at 512 pixels a CPU needs hours to measure")
    p.add_argument("--repeats", type=positive, default=9, help="runs a time is the median of; of whole pictures a third (default: 9)")
    p.add_argument("--out", type=Path, help="JSON file to write (default: print only)")
    p.add_argument("--device", type=device, default="auto", help="to measure on: auto, cpu or cuda (default: auto, CUDA where there is one)")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    size = args.resolution or BASES[args.base][-1]
    if size % 8:
        raise ValueError(f"expected a --resolution divisible by 8, got {size}")
    tune_cpu(size)
    rows, columns = {}, [c for c in COLUMNS if (args.base == "sd21" or c != "Turbo G") and not (args.no_times and c.endswith(" ms"))]
    print_row("", None, columns)
    for name in NETWORKS:
        rows[name] = count(args.base, name, size) | ({} if args.no_times else measure(args.base, name, size, args))
        print_row(name, rows[name], columns)
    if args.out:
        where = torch.cuda.get_device_name() if args.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        with atomic_write(args.out) as temporary:
            sheet = {"base": args.base, "resolution": size, "measured on": None if args.no_times else where, "torch": torch.__version__, "networks": rows}
            temporary.write_text(json.dumps(sheet, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run(main))
