"""How much memory does a training run need? python -m benchmarks.memory

Peak memory at Stable Diffusion 1.5's size, 512 x 512 pixels, by what is trained: of an optimizer
step, and in the last column of what happens between two of them (probe, grids, control fidelity,
decoding), which needs the same at any batch size. In brackets the smallest card for it.

On a GPU it is measured, elsewhere counted (`training/memory.py`).
"""

import shlex
import sys
from argparse import Namespace
from dataclasses import replace

from common.cli import Parser, answer, positive, run


def parse(argv: list[str] | None) -> Namespace:
    p = Parser(__doc__)
    p.add_argument("--base", choices=["sd15", "sd21", "tiny"], default="sd15",
                   help="the base model's shape (default: sd15)")
    p.add_argument("--batch-sizes", type=positive, nargs="+", default=[1, 4],
                   help="pictures per forward pass (default: 1 4)")
    return p.parse_args(argv)


if __name__ == "__main__":  # before PyTorch is imported
    answer(parse)

import torch
from torch import nn

import train
from benchmarks.costs import BASES
from controlnet import ControlNet
from kd import STUDENTS, build_student
from training import settings
from training.memory import RESERVE, AllocatedBytes, peak_bytes, rehearse
from unet import UNet
from vae import VAE

TEXT_PARAMETERS = {"sd15": 123_060_480, "sd21": 352_984_064, "tiny": 3_267_136}
CARDS = (8, 12, 16, 24, 32, 40, 48, 80)  # GiB
LAYER_ONLY = "L_layer alone"
ROWS = (  # options of train.py
    "", "--mode small", "--mode large", "--mode large --unlock all",
    *(f"--student {name}" for name in STUDENTS),
    "--student reduced_layer --mode small", "--student reduced_layer --mode large",
    "--student reduced_layer --mode large --unlock all",
    "--student reduced_layer --teacher none", f"--student reduced_layer, {LAYER_ONLY}")
LABEL = 1 + max(map(len, ROWS))  # characters
VARIANTS = {
    "float32": "", "checkpointing": "--checkpointing", "bf16": "--precision bf16",
    "both": "--precision bf16 --checkpointing"}


def peaks(base: str, options: str, batch_size: int) -> tuple[int, int]:
    """Bytes of a step and between two steps, under these options of train.py."""
    argv = shlex.split(options.replace(f", {LAYER_ONLY}", ""))
    s = settings.parse(["--teacher", "tiny", *argv] if "--student" in argv else argv)
    config, vae_config, size = BASES[base]
    with torch.device("meta"):
        unet, vae = UNet(config), VAE(vae_config)
        text = nn.Linear(TEXT_PARAMETERS[base], 1, bias=False)
        teacher = ControlNet(config) if s.teacher else None
        net = build_student(s.student, unet) if s.student else ControlNet(config)
    s = replace(s, precision=s.precision or "float32", loss_layer=1.0)
    networks = unet, vae, text, net, teacher, size, batch_size, LAYER_ONLY in options
    if torch.cuda.is_available():
        return rehearse(AllocatedBytes(), train.forward_backward, s, *networks)
    return peak_bytes(train.forward_backward, s, *networks)


def card(peak: int) -> str:
    """The smallest card that has room for it, in GB."""
    return next((str(size) for size in CARDS if peak + RESERVE <= size * 2**30), "more")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    how = "counted from tensor sizes, not measured"
    if torch.cuda.is_available():
        how = f"measured on {torch.cuda.get_device_name()}"
    print(f"{args.base}, GiB at the peak (and the smallest card for it), {how}")
    width = 12 * len(args.batch_sizes) + 10
    print(f"{'':{LABEL}}" + "".join(f"{name:>{width}}" for name in VARIANTS))
    print(f"{'':{LABEL}}" + 4 * ("".join(f"{f'batch {batch}':>12}" for batch in args.batch_sizes)
                             + f"{'between':>10}"))
    for row in ROWS:
        line = f"{row or 'a ControlNet':{LABEL}}"
        for variant in VARIANTS.values():
            for batch in args.batch_sizes:
                step, between = peaks(args.base, f"{variant} {row}", batch)
                line += f"{f'{step / 2**30:.1f} ({card(max(step, between))})':>12}"
            line += f"{between / 2**30:>10.1f}"
        print(line, flush=True)


if __name__ == "__main__":
    sys.exit(run(main))
