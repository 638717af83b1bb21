"""Rewrite a control network or a base model as safetensors, in another naming or at half the size.

    python -m weights.convert control_v11p_sd15_canny.pth canny.safetensors
    python -m weights.convert canny.safetensors canny_diffusers --naming diffusers
    python -m weights.convert runs/controlnet/controlnet.safetensors small.safetensors --half
    python -m weights.convert sd_diffusers sd.safetensors
    python -m weights.convert my_turbo.safetensors turbo.safetensors --set steps=4 guidance=0 \\
        spacing=trailing
"""

import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

from common.cli import Parser, answer, prediction, run


def parse(argv: list[str] | None) -> Namespace:
    p = Parser(__doc__)
    p.add_argument("source", type=Path, metavar="IN",
                   help="control network or Stable Diffusion: a file (.safetensors, .pth, .ckpt) "
                        "or diffusers' folder")
    p.add_argument("target", type=Path, metavar="OUT",
                   help="NAME.safetensors, or for diffusers' naming also a folder: from_pretrained")
    p.add_argument("--naming", choices=["ldm", "diffusers"], default="ldm",
                   help="ldm: the original project's (default)")
    p.add_argument("--base", type=Path, metavar="FILE",
                   help="the checkpoint that a difference ControlNet's offsets are added to")
    p.add_argument("--vae", type=Path, metavar="FILE",
                   help="the autoencoder to put into a base model, a file or diffusers' folder")
    p.add_argument("--prediction", type=prediction, metavar="{epsilon,v}",
                   help="what a base model predicts, if it does not say so; v: SD 2.1 at 768")
    p.add_argument("--set", nargs="+", metavar="NAME=VALUE", default=[],
                   help="write into a base model how it is sampled, for all programs here: of "
                        "steps, guidance, spacing (leading or trailing), prediction, lr and "
                        "resolution; SD-Turbo: steps=1 guidance=0 spacing=trailing")
    p.add_argument("--half", action="store_true", help="write float16, half the size")
    return p.parse_args(argv)


if __name__ == "__main__":  # before PyTorch is imported
    answer(parse)

import torch

from weights.base_settings import read_setting, with_settings
from weights.controlnet import DIFFUSERS_FILES, check_controlnet, read_controlnet
from weights.files import cast, read_tensors, require_replaceable, strip_prefix, write_tensors
from weights.folder import encoder_settings, write_folder, write_json
from weights.kinds import STABLE_DIFFUSION, kind_of
from weights.naming import UNET, to_diffusers
from weights.stable_diffusion import assemble, in_original_naming, read_stable_diffusion


def convert(source: Path, target: Path, naming: str = "ldm", half: bool = False,
            base: Path | None = None, vae: Path | None = None,
            settings: Mapping[str, object] | None = None) -> None:
    """Write any control network or base model in the naming "ldm" (the original) or "diffusers":
    there a target without the ending .safetensors is a folder as diffusers has it. `base`: what a
    difference ControlNet's offsets are added to. `vae`: the autoencoder to put into a base model;
    `settings`: what to write into that of how it is sampled (`base_settings`). Raises ValueError if
    the source is not whole, if diffusers has no names for it, and if something else is at the
    target."""
    require_replaceable(target, [source, *filter(None, (base, vae))])
    if is_base(source):
        _convert_base(source, target, naming, half, vae, settings or {})
        return
    if vae or settings:
        raise ValueError(f"expected a base model for --vae, --prediction and --set, {source} is a "
                         "control network")
    encoder = strip_prefix(read_stable_diffusion(base)[0], UNET) if base else None
    tensors, metadata = read_controlnet(source, encoder)
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
        write_json(target / "config.json", {
            "_class_name": "ControlNetModel", **encoder_settings(config),
            "conditioning_embedding_out_channels": [16, 32, 96, 256]})


def is_base(source: Path) -> bool:
    """Whether a file or folder is to be read as a base model, not as a control network."""
    if source.is_dir():
        return (source / "unet").is_dir() and not (source / "controlnet").is_dir()
    return kind_of(read_tensors(source)[0]) == STABLE_DIFFUSION


def _convert_base(source: Path, target: Path, naming: str, half: bool, vae: Path | None,
                  settings: Mapping[str, object]) -> None:
    tensors, metadata = read_stable_diffusion(source, vae)
    metadata = with_settings(metadata, settings) if settings else metadata
    if half:
        tensors = cast(tensors, torch.float16, target)
    sd = assemble(source, tensors, metadata)
    if naming == "ldm":
        write_tensors(target, in_original_naming(tensors, sd.text.config), metadata)
    elif target.suffix == ".safetensors":
        raise ValueError(f"expected a folder for a base model in diffusers' naming, got {target}")
    else:
        write_folder(target, tensors, metadata, sd.unet.config, sd.vae.config, sd.text.config,
                     sd.sampling, sd.resolution)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    settings = dict(map(read_setting, args.set))
    if args.prediction:
        settings["prediction"] = args.prediction
    convert(args.source, args.target, args.naming, args.half, args.base, args.vae, settings)
    print(args.target)


if __name__ == "__main__":
    sys.exit(run(main))
