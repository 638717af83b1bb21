"""Rewrite a ControlNet file in another naming or at half the size. Nothing but names and number format changes.

    python -m weights.convert control_v11p_sd15_canny.pth canny.safetensors                    a pickle of any naming -> safetensors, original naming
    python -m weights.convert canny.safetensors canny_diffusers --naming diffusers             -> a folder for diffusers' from_pretrained
    python -m weights.convert runs/controlnet/controlnet.safetensors small.safetensors --half  -> float16
"""

import json
import sys
from argparse import Namespace
from pathlib import Path

from common.cli import Parser, run
from common.files import atomic_write
from controlnet.condition import is_paper_encoder
from unet import UNetConfig
from weights.controlnet import DIFFUSERS_FILES, FORMAT_VERSION, read_controlnet, require_whole
from weights.files import write_tensors
from weights.naming import to_diffusers


def diffusers_config(config: UNetConfig) -> dict:
    """What diffusers' ControlNetModel.from_pretrained reads beside the tensors. Its `attention_head_dim` is the number of heads."""
    widths = [mult * config.model_channels for mult in config.channel_mult]
    return {
        "_class_name": "ControlNetModel",
        "block_out_channels": widths,
        "layers_per_block": config.num_res_blocks,
        "down_block_types": ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in config.attention],
        "attention_head_dim": [config.heads(width) for width in widths],
        "cross_attention_dim": config.context_dim,
        "use_linear_projection": config.linear_projections,
        "norm_num_groups": config.groups,
        "conditioning_embedding_out_channels": [16, 32, 96, 256],
    }


def convert(source: str | Path, target: str | Path, naming: str = "ldm", half: bool = False) -> None:
    """Read a control network of any naming, write it in `naming` ("ldm", the original, or "diffusers"), with `half` in float16.

    A target without the ending .safetensors is in diffusers' naming a folder with config.json. Raises ValueError if the source is no
    whole control network, or is one that diffusers has no names for.
    """
    tensors, metadata = read_controlnet(source)
    target = Path(target)
    config = require_whole(tensors, metadata, source)
    if naming == "diffusers" and (config is None or is_paper_encoder(tensors)):
        raise ValueError(f"diffusers has no names for {source}, a student or a ControlNet with the paper's condition encoder: use weights.for_diffusers")
    if half:
        tensors = {name: tensor.half() for name, tensor in tensors.items()}
    metadata = {"format": "pt", "format_version": str(FORMAT_VERSION), "architecture": "controlnet", **metadata}
    if naming == "ldm":
        write_tensors(target, tensors, metadata)
        return
    tensors = to_diffusers(tensors, len(config.channel_mult), config.num_res_blocks)
    if target.suffix == ".safetensors":
        write_tensors(target, tensors, metadata)
        return
    write_tensors(target / DIFFUSERS_FILES[0], tensors, metadata)
    with atomic_write(target / "config.json") as temporary:
        temporary.write_text(json.dumps(diffusers_config(config), indent=2) + "\n")


def parse(argv: list[str] | None) -> Namespace:
    p = Parser(__doc__)
    p.add_argument("source", type=Path, metavar="IN", help="control network: a file (.safetensors, .pth, .ckpt) or a diffusers folder")
    p.add_argument("target", type=Path, metavar="OUT", help="NAME.safetensors, or for diffusers' naming also a folder")
    p.add_argument("--naming", choices=["ldm", "diffusers"], default="ldm", help="ldm: the original project's (default); diffusers: diffusers'")
    p.add_argument("--half", action="store_true", help="write float16, half the size")
    args = p.parse_args(argv)
    if args.naming == "ldm" and args.target.suffix != ".safetensors":
        p.error(f"expected a name that ends in .safetensors, got {args.target}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    convert(args.source, args.target, args.naming, args.half)
    print(args.target)


if __name__ == "__main__":
    sys.exit(run(main))
