"""Make pictures from a prompt and a condition.

    python sample.py                                                              the tiny model, a circle it has never seen
    python sample.py --controlnet runs/reduced_layer/controlnet.safetensors       the same with your student
    python sample.py --prompt "red circle with blue background" --condition circle.png --out picture.png
    python sample.py --checkpoint sd.safetensors --controlnet canny.safetensors --canny photo.jpg --prompt "a house"
    python sample.py --like picture.png --seed 7                                  as that picture, but for the seed
"""

import json
import sys
import warnings
from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from common.cli import Parser, fraction, non_negative, non_negative_float, positive, run
from common.devices import device, tune_cpu
from common.files import fingerprint
from controlnet import ControlNet
from controlnet.sampling import Control, generate, initial_latents
from data.annotators import annotate, canny, fit_photo
from data.circles import HELD_OUT, Circles
from data.pictures import read_picture, read_text, resized, to_image, write_png
from diffusion import ddim_timesteps
from weights import StableDiffusion, load_controlnet, load_stable_diffusion
from weights.controlnet import controlnet_file

TINY = Path(__file__).parent / "weights" / "tiny"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NOT_REMEMBERED = {"like", "out", "num", "canny", "annotator", "device"}  # of a picture: where it was made, where it went, the source of its condition


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument("--prompt", help="what to draw (default: empty; without --condition, the drawn circle's prompt)")
    p.add_argument("--negative-prompt", default="", help="what guidance moves away from (default: empty)")
    p.add_argument("--condition", nargs="+", help="the condition, a picture for each control network (default: a circle's outline drawn for the occasion)")
    p.add_argument("--canny", metavar="PHOTO", help="take the Canny edges of a photo as condition, and save them beside the output")
    p.add_argument("--annotator", nargs=2, metavar=("NAME", "PHOTO"), help='the same with an annotator of controlnet_aux (pip install -e ".[annotators]")')
    p.add_argument("--out", type=Path, default=Path("runs/sample.png"), help="PNG to write; with --num, NAME-0.png ... (default: runs/sample.png)")
    p.add_argument("--like", type=Path, metavar="PNG", help="take all settings from a picture this program made; further arguments change single ones")
    p.add_argument("--checkpoint", default=str(TINY / "sd.safetensors"), help="Stable Diffusion in one file, original naming (default: the tiny model)")
    p.add_argument("--prediction", choices=["noise", "v"], help="what the checkpoint predicts; v: SD 2.1 at 768 (default: what the file says, else noise)")
    p.add_argument("--controlnet", nargs="+", default=[str(TINY / "controlnet.safetensors")],
                   help="ControlNet or student files, whose outputs are summed; none = the base (default: the tiny teacher)")  # fmt: skip
    p.add_argument("--scale", type=non_negative_float, nargs="+", default=[1.0], help="strength of the control, one for all or one each (default: 1)")
    p.add_argument("--start", type=fraction, nargs="+", default=[0.0], help="share of the steps before the control sets in (default: 0)")
    p.add_argument("--end", type=fraction, nargs="+", default=[1.0], help="share of the steps after which it stops (default: 1)")
    p.add_argument("--guess", action="store_true", help="guess mode: control in the prompted half only, weaker in fine layers; goes with little prompt")
    p.add_argument("--steps", type=positive, default=20, help="DDIM steps (default: 20)")
    p.add_argument("--guidance", type=non_negative_float, help="guidance scale; 1 or less = none (default: as the checkpoint says, 9 for Stable Diffusion)")
    p.add_argument("--spacing", choices=["leading", "trailing"], default="leading", help="of the timesteps; trailing: SD-Turbo (default: leading)")
    p.add_argument("--eta", type=fraction, default=0.0, help="0 = deterministic DDIM, 1 = with DDPM's noise (default: 0)")
    p.add_argument("--seed", type=non_negative, default=0, help="of the initial noise; with --num, of the first picture's (default: 0)")
    p.add_argument("--num", type=positive, default=1, help="pictures to make, with seeds SEED, SEED + 1, ... (default: 1)")
    p.add_argument("--height", type=positive, help="divisible by 8 (default: the condition's)")
    p.add_argument("--width", type=positive, help="divisible by 8 (default: the condition's)")
    p.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of the networks; the noise is drawn in float32 (default: float32)")
    p.add_argument("--device", type=device, default="auto", help="auto, cpu or cuda (default: auto, CUDA where there is one)")
    p.add_argument("--compile", action="store_true", help="compile the networks: slower start, faster steps")
    return p


def for_each(values: list[float], networks: int) -> list[float]:
    """A value for each control network, of one for all or one each."""
    return values * networks if len(values) == 1 else values


def parse(argv: list[str] | None) -> Namespace:
    """The command line; with --like, the arguments that a picture remembers come before it. `args.unchanged`: files that should be as they were."""
    p, argv, fingerprints = parser(), sys.argv[1:] if argv is None else argv, {}
    args = asked = p.parse_args(argv)
    if args.like:
        text = read_text(args.like)
        if "arguments" not in text:
            raise ValueError(f"expected a picture that sample.py made in --like, {args.like} does not say how it was made")
        try:
            remembered, fingerprints = [str(word) for word in json.loads(text["arguments"])], dict(json.loads(text["files"]))
        except (ValueError, TypeError, KeyError) as problem:
            raise ValueError(f"what {args.like} says of how it was made is damaged: {problem}") from None
        before, args = p.parse_args(remembered), p.parse_args([*remembered, *argv])
        for name in NOT_REMEMBERED:  # a picture may come from anywhere: it does not say where to write
            setattr(args, name, getattr(asked, name))
        if args.canny or args.annotator:
            args.condition = asked.condition
        fingerprints = {name: value for name, value in fingerprints.items() if getattr(before, name, None) == getattr(args, name, None)}
    args.unchanged = fingerprints
    if sum(source is not None for source in (args.condition, args.canny, args.annotator)) > 1:
        p.error("expected one of --condition, --canny and --annotator")
    if "none" in args.controlnet and len(args.controlnet) > 1:
        p.error("expected --controlnet none alone")
    networks = 0 if args.controlnet == ["none"] else len(args.controlnet)
    for name in ("scale", "start", "end"):
        if len(getattr(args, name)) not in (1, networks):
            p.error(f"expected one --{name} for all or one for each of {networks} control networks, got {len(getattr(args, name))}")
    if args.condition and networks and len(args.condition) != networks:
        p.error(f"expected a --condition for each of {networks} control networks, got {len(args.condition)}")
    start, end = for_each(args.start, networks), for_each(args.end, networks)
    if any(a >= b for a, b in zip(start, end, strict=True)):
        p.error(f"expected every --start before its --end, got {start} and {end}")
    if (args.height or 8) % 8 or (args.width or 8) % 8:
        p.error(f"expected a --height and --width divisible by 8, got {args.height} x {args.width}")
    if args.out.suffix.lower() != ".png" or args.out.is_dir():
        p.error(f"expected a name that ends in .png in --out, got {args.out}")
    ddim_timesteps(args.steps, args.spacing)
    return args


def arguments_of(args: Namespace) -> list[str]:
    """The command line that makes the same picture again: every setting that is not the default."""
    arguments = []
    for action in parser()._actions:
        value = getattr(args, action.dest, None)
        if action.dest in NOT_REMEMBERED or value is None or value is False or value == action.default:
            continue
        option = action.option_strings[0]
        arguments += [option] if value is True else [option, *map(str, value)] if isinstance(value, list) else [f"{option}={value}"]
    return arguments


def fingerprints_of(args: Namespace) -> dict[str, list[str]]:
    """What tells whether the files a picture was made from are still the same."""
    networks = [controlnet_file(path) for path in args.controlnet if path != "none"]
    files = {"checkpoint": [args.checkpoint], "controlnet": networks, "condition": args.condition or []}
    return {name: [fingerprint(path) for path in paths] for name, paths in files.items()}


def conditions_of(args: Namespace, resolution: int) -> tuple[list[Tensor], str]:
    """The conditions (3, H, W), all of one size, and the prompt. A condition made from a photo is saved, and becomes args.condition."""
    prompt = args.prompt or ""
    if args.canny or args.annotator:
        photo = fit_photo(read_picture(args.canny or args.annotator[1]), args.height, args.width, resolution)
        path = args.out.with_name(f"{args.out.stem}-condition.png")
        write_png(path, to_image(canny(photo) if args.canny else annotate(args.annotator[0], photo)))
        print(path)
        args.condition = [str(path)] * len(args.controlnet)
    if args.condition:
        conditions = [read_picture(path) for path in args.condition]
    else:
        circle = Circles(resolution, 1, first=HELD_OUT)[0]
        conditions, prompt = [circle["condition"]] * len(args.controlnet), circle["prompt"] if args.prompt is None else prompt
    height, width = args.height or conditions[0].shape[1], args.width or conditions[0].shape[2]
    if height % 8 or width % 8:
        raise ValueError(f"expected a height and width divisible by 8, got {height} x {width}: choose others with --height and --width")
    return [resized(condition, height, width) for condition in conditions], prompt


def load(args: Namespace) -> tuple[StableDiffusion, list[ControlNet]]:
    """The base model and its control networks, where and as --device, --dtype and --compile say."""
    dtype = DTYPES[args.dtype]
    sd = load_stable_diffusion(args.checkpoint, dtype, args.prediction).to(args.device)
    tune_cpu(sd.resolution)
    networks = [load_controlnet(path, sd.unet, dtype).to(args.device) for path in args.controlnet if path != "none"]
    networks = [net.for_inference() for net in networks]
    if args.compile:
        sd.unet.encode, sd.unet.decode = torch.compile(sd.unet.encode), torch.compile(sd.unet.decode)
        for network in (sd.vae.decoder, *networks):
            network.compile()
    return sd, networks


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    sd, networks = load(args)
    conditions, prompt = conditions_of(args, sd.resolution)
    height, width = conditions[0].shape[1:]
    files = fingerprints_of(args)
    for name, before in args.unchanged.items():
        if files.get(name) != before:
            warnings.warn(f"a file of --{name} is not what it was when {args.like} was made: the picture will differ", stacklevel=2)

    scale, start, end = (for_each(values, len(networks)) for values in (args.scale, args.start, args.end))
    each = zip(networks, conditions[: len(networks)], scale, start, end, strict=True)  # with --controlnet none the condition only says the size
    controls = [Control(net, condition[None].to(args.device), *settings) for net, condition, *settings in each]
    guidance = sd.guidance if args.guidance is None else args.guidance
    context, negative = (sd.text.encode([text]) for text in (prompt, args.negative_prompt))
    first, num, out = args.seed, args.num, args.out
    with tqdm(total=num * args.steps, desc="sampling") as progress:
        for i in range(num):  # one after the other: a picture's bits depend on its own seed, never on how many are made
            generator = torch.Generator().manual_seed(first + i)
            noise = initial_latents(1, height, width, generator).to(args.device)
            picture = generate(
                sd.unet, sd.vae, controls, noise, context, negative, steps=args.steps, guidance=guidance, guess=args.guess, eta=args.eta,
                spacing=args.spacing, prediction=sd.prediction, generator=generator, step_done=progress.update,
            )[0]  # fmt: skip
            if not picture.isfinite().all():
                raise FloatingPointError(f"the picture has values that are not numbers: try a guidance below {guidance:g}, or --dtype float32 or bfloat16")
            args.seed, args.prompt = first + i, prompt
            text = {
                "prompt": prompt, "negative_prompt": args.negative_prompt, "seed": args.seed, "steps": args.steps, "guidance": guidance, "scale": scale,
                "height": height, "width": width, "checkpoint": Path(args.checkpoint).name, "torch": torch.__version__,
                "arguments": json.dumps(arguments_of(args)), "files": json.dumps(files),
            }  # fmt: skip
            path = out if num == 1 else out.with_stem(f"{out.stem}-{i}")
            write_png(path, to_image(picture), {key: str(value) for key, value in text.items()})
            progress.write(str(path))


if __name__ == "__main__":
    sys.exit(run(main))
