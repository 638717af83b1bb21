"""Make a picture from a prompt and a condition.

    python sample.py                                                              the tiny model, a circle it has never seen
    python sample.py --controlnet runs/reduced_layer/controlnet.safetensors       the same with your student
    python sample.py --prompt "red circle with blue background" --condition circle.png --out picture.png
"""

import sys
from argparse import Namespace
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from controlnet.sampling import generate, initial_latents
from data.circles import HELD_OUT, Circles
from data.cli import Parser, device, not_negative, not_negative_float, positive, run, share, tune_cpu
from data.pictures import read_picture, to_image, write_png
from weights import load_controlnet, load_stable_diffusion

TINY = Path(__file__).parent / "weights" / "tiny"


def parse(argv: list[str] | None) -> Namespace:
    p = Parser(__doc__)
    p.add_argument("--prompt", help="what to draw (default: empty; without --condition, the drawn circle's prompt)")
    p.add_argument("--condition", type=Path, help="the condition, a picture (default: a circle's outline drawn for the occasion)")
    p.add_argument("--out", type=Path, default=Path("runs/sample.png"), help="PNG to write; with --num, NAME-0.png ... (default: runs/sample.png)")
    p.add_argument("--checkpoint", type=Path, default=TINY / "sd.safetensors", help="Stable Diffusion in one file, original naming (default: the tiny model)")
    p.add_argument("--controlnet", default=str(TINY / "controlnet.safetensors"), help="ControlNet or student file; none = the base (default: the tiny teacher)")
    p.add_argument("--negative-prompt", default="", help="what guidance moves away from (default: empty)")
    p.add_argument("--steps", type=positive, default=20, help="DDIM steps (default: 20)")
    p.add_argument("--guidance", type=not_negative_float, help="guidance scale; 1 or less = none (default: as the checkpoint says, 9 for Stable Diffusion)")
    p.add_argument("--scale", type=not_negative_float, default=1.0, help="strength of the control (default: 1)")
    p.add_argument("--seed", type=not_negative, default=0, help="of the initial noise (default: 0)")
    p.add_argument("--num", type=positive, default=1, help="pictures to make (default: 1)")
    p.add_argument("--height", type=positive, help="divisible by 8 (default: the condition's)")
    p.add_argument("--width", type=positive, help="divisible by 8 (default: the condition's)")
    p.add_argument("--spacing", choices=["leading", "trailing"], default="leading", help="of the timesteps (default: leading)")
    p.add_argument("--eta", type=share, default=0.0, help="0 = deterministic DDIM, 1 = with DDPM's noise (default: 0)")
    p.add_argument("--device", type=device, default="auto", help="auto, cpu or cuda (default: auto, CUDA where there is one)")
    return p.parse_args(argv)


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.out.is_dir() or not args.out.name:
        raise ValueError(f"expected a file to write in --out, {args.out} is a folder")
    condition = read_picture(args.condition) if args.condition else None
    sd = load_stable_diffusion(args.checkpoint).to(args.device)
    tune_cpu(sd.resolution)
    net = None if args.controlnet == "none" else load_controlnet(args.controlnet, sd.unet).to(args.device)

    prompt = args.prompt or ""
    if condition is None:
        circle = Circles(sd.resolution, 1, first=HELD_OUT)
        condition = circle[0]["condition"]
        prompt = circle[0]["prompt"] if args.prompt is None else prompt
    height, width = args.height or condition.shape[1], args.width or condition.shape[2]
    if height % 8 or width % 8:
        raise ValueError(f"expected a height and width divisible by 8, got {height} x {width}: choose others with --height and --width")
    if condition.shape[1:] != (height, width):
        condition = F.interpolate(condition[None], size=(height, width), mode="bicubic", antialias=True)[0].clamp(0, 1)

    generator = torch.Generator().manual_seed(args.seed)
    guidance = sd.guidance if args.guidance is None else args.guidance
    context, negative = (sd.text.encode([text]).expand(args.num, -1, -1) for text in (prompt, args.negative_prompt))
    with tqdm(total=args.steps, desc="sampling") as progress:
        pictures = generate(
            sd.unet, sd.vae, net, initial_latents(args.num, height, width, generator).to(args.device), condition.expand(args.num, -1, -1, -1).to(args.device),
            context, negative, steps=args.steps, guidance=guidance, scale=args.scale, eta=args.eta, spacing=args.spacing,
            prediction=sd.prediction, generator=generator, step_done=progress.update,
        )  # fmt: skip
    if not pictures.isfinite().all():
        raise FloatingPointError(f"the picture has values that are not numbers: try a guidance below {guidance:g}")
    settings = {
        "prompt": prompt, "negative_prompt": args.negative_prompt, "seed": args.seed, "num": args.num, "steps": args.steps, "guidance": guidance,
        "scale": args.scale, "eta": args.eta, "spacing": args.spacing, "height": height, "width": width,
        "checkpoint": args.checkpoint.name, "controlnet": Path(args.controlnet).name,
    }  # fmt: skip
    for i, picture in enumerate(pictures):
        path = args.out if args.num == 1 else args.out.with_stem(f"{args.out.stem}-{i}")
        write_png(path, to_image(picture), {key: str(value) for key, value in settings.items()} | {"index": str(i)})
        print(path)


if __name__ == "__main__":
    sys.exit(run(main))
