"""Move a ControlNet to another base model of the same shape, without training.

    python -m weights.transfer canny.safetensors --base a.ckpt --target b.ckpt --out new.safetensors

The ControlNet project's "difference transfer": what the copied encoder has learned is its
difference from the base's, so the new one is control + (target - base). The rest stays as it is.
"""

import sys
from argparse import Namespace
from pathlib import Path

from common.cli import Parser, answer, run


def parse(argv: list[str] | None) -> Namespace:
    p = Parser(__doc__)
    p.add_argument("control", type=Path, help="control network of any naming")
    p.add_argument("--base", type=Path, required=True, help="the checkpoint it was trained with")
    p.add_argument("--target", type=Path, required=True, help="the checkpoint to use it with")
    p.add_argument("--out", type=Path, required=True, help="NAME.safetensors, original naming")
    return p.parse_args(argv)


if __name__ == "__main__":  # before PyTorch is imported
    answer(parse)

from torch import Tensor

from weights.controlnet import ENCODER, check_controlnet, read_controlnet
from weights.files import (
    Tensors,
    check_finite,
    require_replaceable,
    strip_prefix,
    write_tensors,
)
from weights.naming import UNET
from weights.stable_diffusion import read_stable_diffusion


def transfer(control: Tensors, base: Tensors, target: Tensors) -> dict[str, Tensor]:
    """The moved ControlNet, computed in float32. Raises ValueError if the three do not have the
    same encoder (a student, a base of another version)."""
    moved = dict(control)
    for name, tensor in control.items():
        if not name.startswith(ENCODER):
            continue
        shapes = [tuple(tensors[name].shape) if name in tensors else None
                  for tensors in (control, base, target)]
        if len(set(shapes)) > 1:
            raise ValueError("expected the same encoder in control network, base and target, "
                             f"{name} has the shapes {', '.join(map(str, shapes))}")
        difference = target[name].float() - base[name].float()
        moved[name] = (tensor.float() + difference).to(tensor.dtype)
    return moved


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    require_replaceable(args.out, [args.control, args.base, args.target])
    base, target = (strip_prefix(read_stable_diffusion(path)[0], UNET)
                    for path in (args.base, args.target))
    control, metadata = read_controlnet(args.control, base)
    if check_controlnet(args.control, control, metadata) is None:
        raise ValueError("expected the same encoder in control network, base and target, "
                         f"{args.control} is a student, {metadata['architecture']}")
    moved = transfer(control, base, target)
    check_finite(moved, args.out)
    write_tensors(args.out, moved, metadata | {"base": args.target.name})
    print(args.out)


if __name__ == "__main__":
    sys.exit(run(main))
