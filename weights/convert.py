"""Rewrite a control network's file as safetensors, in another naming or at half the size.

    python -m weights.convert control_v11p_sd15_canny.pth canny.safetensors
    python -m weights.convert canny.safetensors canny_diffusers --naming diffusers
    python -m weights.convert runs/controlnet/controlnet.safetensors small.safetensors --half
"""

import json
import sys
from argparse import Namespace
from pathlib import Path

from common.cli import Parser, answer, run


def parse(argv: list[str] | None) -> Namespace:
    p = Parser(__doc__)
    p.add_argument("source", type=Path, metavar="IN",
                   help="control network: a file (.safetensors, .pth, .ckpt) or diffusers' folder")
    p.add_argument("target", type=Path, metavar="OUT",
                   help="NAME.safetensors, or for diffusers' naming also a folder: from_pretrained")
    p.add_argument("--naming", choices=["ldm", "diffusers"], default="ldm",
                   help="ldm: the original project's (default)")
    p.add_argument("--half", action="store_true", help="write float16, half the size")
    return p.parse_args(argv)


if __name__ == "__main__":  # before PyTorch is imported
    answer(parse)

import torch

from common.files import atomic_write
from unet import UNetConfig
from weights.controlnet import DIFFUSERS_FILES, check_controlnet, read_controlnet
from weights.files import cast, write_tensors
from weights.naming import to_diffusers

ATTENTION = "CrossAttnDownBlock2D"  # a level that looks at the prompt


def encoder_settings(config: UNetConfig) -> dict:
    """The config as diffusers writes it for a UNet or ControlNet."""
    widths = [mult * config.model_channels for mult in config.channel_mult]
    return {
        "block_out_channels": widths, "layers_per_block": config.num_res_blocks,
        "down_block_types": [ATTENTION if attention else "DownBlock2D"
                             for attention in config.attention],
        "attention_head_dim": [config.heads(width) for width in widths],
        "cross_attention_dim": config.context_dim,
        "use_linear_projection": config.linear_projections, "norm_num_groups": config.groups,
    }


def convert(source: Path, target: Path, naming: str = "ldm", half: bool = False) -> None:
    """Write any control network in the naming "ldm" (the original) or "diffusers": there a target
    without the ending .safetensors is a folder with config.json. Raises ValueError if the source is
    not whole, or if diffusers has no names for it."""
    tensors, metadata = read_controlnet(source)
    config = check_controlnet(source, tensors, metadata)
    if half:
        tensors = cast(tensors, torch.float16, target)
    file = target
    if naming == "diffusers":
        tensors = to_diffusers(tensors, config)
        if target.suffix != ".safetensors":
            file = target / DIFFUSERS_FILES[0]
    write_tensors(file, tensors, metadata)
    if file != target:
        settings = {"_class_name": "ControlNetModel", **encoder_settings(config),
                    "conditioning_embedding_out_channels": [16, 32, 96, 256]}
        with atomic_write(target / "config.json") as temporary:
            temporary.write_text(json.dumps(settings, indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    convert(args.source, args.target, args.naming, args.half)
    print(args.target)


if __name__ == "__main__":
    sys.exit(run(main))
