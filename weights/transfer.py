"""Move a ControlNet to another base model of the same shape, without training ("difference transfer", as the ControlNet project offers).

    python -m weights.transfer canny.safetensors --base v1-5-pruned-emaonly.safetensors --target community.safetensors --out canny_community.safetensors

A ControlNet's encoder began as a copy of its base's. What it has learned is the difference, and that is added to the new base's encoder:
new = control + (target - base). E(c) and the zero convolutions have no counterpart in the base and stay as they are.
"""

import sys
from argparse import Namespace
from pathlib import Path

from torch import Tensor

from common.cli import Parser, run
from weights.controlnet import FORMAT_VERSION, read_controlnet, require_whole
from weights.files import read_tensors, shapes_of, strip_prefix, write_tensors
from weights.kinds import STABLE_DIFFUSION, UNET, WHOLE, kind_of


def unet_tensors(path: str | Path) -> dict[str, Tensor]:
    """The denoiser's tensors of a Stable Diffusion checkpoint, without prefix."""
    tensors, _ = read_tensors(path)
    if (kind := kind_of(shapes_of(tensors))) not in (STABLE_DIFFUSION, WHOLE):
        raise ValueError(f"expected a Stable Diffusion checkpoint, {path} is {kind}")
    return strip_prefix(tensors, UNET)


def transfer(control: dict[str, Tensor], base: dict[str, Tensor], target: dict[str, Tensor]) -> dict[str, Tensor]:
    """new = control + (target - base) for every tensor of the copied encoder, in float32, then in the control's dtype; the rest unchanged.

    Raises ValueError if the three do not have the same encoder (a student, a base of another version).
    """
    new = dict(control)
    for name in (name for name in control if name.startswith(("time_embed.", "input_blocks.", "middle_block."))):
        shapes = [tuple(tensors[name].shape) if name in tensors else None for tensors in (control, base, target)]
        if len(set(shapes)) > 1:
            raise ValueError(f"expected the same encoder in control network, base and target, {name} has the shapes {', '.join(map(str, shapes))}")
        new[name] = (control[name].float() + (target[name].float() - base[name].float())).to(control[name].dtype)
    return new


def parse(argv: list[str] | None) -> Namespace:
    p = Parser(__doc__)
    p.add_argument("control", type=Path, help="control network of any naming")
    p.add_argument("--base", type=Path, required=True, help="the checkpoint it was trained with")
    p.add_argument("--target", type=Path, required=True, help="the checkpoint to use it with")
    p.add_argument("--out", type=Path, required=True, help="NAME.safetensors to write, original naming")
    args = p.parse_args(argv)
    if args.out.suffix != ".safetensors":
        p.error(f"expected a name that ends in .safetensors, got {args.out}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    tensors, metadata = read_controlnet(args.control)
    require_whole(tensors, metadata, args.control)
    metadata = {"format": "pt", "format_version": str(FORMAT_VERSION), "architecture": "controlnet", **metadata, "base": args.target.name}
    write_tensors(args.out, transfer(tensors, unet_tensors(args.base), unet_tensors(args.target)), metadata)
    print(args.out)


if __name__ == "__main__":
    sys.exit(run(main))
