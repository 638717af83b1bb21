"""Make pictures from a prompt and a condition.

    python sample.py                                        the tiny model, an unseen circle
    python sample.py --controlnet runs/reduced_layer/controlnet.safetensors    your student
    python sample.py --prompt "red circle with blue background" --condition circle.png
    python sample.py --checkpoint sd.safetensors --controlnet canny.safetensors \\
        --canny photo.jpg --prompt "a house"
    python sample.py --like picture.png --seed 7            the same picture, with another seed
"""

import json
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

from common import cli
from common.cli import option
from weights import tiny

# Not recorded in a picture: where it was made and written, and the photo behind its condition.
NOT_REMEMBERED = {"like", "out", "num", "canny", "annotator", "device"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The command line."""

    prompt: str | None = option("what to draw (default: empty; without --condition, the generated "
                                "circle's prompt)")
    negative_prompt: str = option("what guidance moves away from (default: empty)", "")
    condition: list[str] | None = option("the condition, a picture for each control network "
                                         "(default: the outline of a generated circle)", nargs="+")
    canny: str | None = option("use the Canny edges of a photo as the condition, and save them "
                               "beside the output", metavar="PHOTO")
    annotator: list[str] | None = option("the same with an annotator of controlnet_aux "
                                         '(pip install -e ".[annotators]")', nargs=2,
                                         metavar=("NAME", "PHOTO"))
    out: Path = option("PNG to write; with --num, NAME-0.png ...", Path("runs/sample.png"), Path)
    like: Path | None = option("use the settings of a picture that this program made; further "
                               "options change single ones", type=Path, metavar="PNG")
    checkpoint: Path
    prediction: str | None
    controlnet: list[str] | None = option("ControlNet or student files, whose outputs are summed; "
                                          "none = the base alone (default: the tiny teacher; with "
                                          "another --checkpoint none)", nargs="+")
    scale: list[float] = option("strength of the control, one for all networks or one each "
                                "(default: 1)", [1.0], cli.non_negative_float, nargs="+")
    start: list[float] = option("fraction of the steps before the control sets in (default: 0)",
                                [0.0], cli.fraction, nargs="+")
    end: list[float] = option("fraction of the steps after which it stops (default: 1)", [1.0],
                              cli.fraction, nargs="+")
    guess: bool = option("guess mode: control in the prompted half only, weaker in fine layers; "
                         "goes with little prompt", False)
    steps: int = option("DDIM steps", 20, cli.positive)
    guidance: float | None = option("guidance scale; 1 or less = none (default: the checkpoint's, "
                                    "9 for Stable Diffusion)", type=cli.non_negative_float)
    spacing: str = option("of the timesteps; trailing: SD-Turbo", "leading",
                          choices=["leading", "trailing"])
    eta: float = option("0 = deterministic DDIM, 1 = with DDPM's noise", 0.0, cli.fraction)
    seed: int = option("of the initial noise; with --num, of the first picture's", 0,
                       cli.non_negative)
    num: int = option("pictures to make, with seeds SEED, SEED + 1, ...", 1, cli.positive)
    height: int | None = option("divisible by 8 (default: the condition's)", type=cli.picture_side)
    width: int | None = option("divisible by 8 (default: the condition's)", type=cli.picture_side)
    precision: str | None = option("float32 (exact), bf16 or fp16, of UNet, text encoder and "
                                   "control networks, and not of autoencoder and sampler (default: "
                                   "bf16 on a GPU that has it, fp16 on others, float32 on a CPU)",
                                   type=cli.precision)
    compile: bool = option("compile the networks' blocks, and on a GPU play a recorded step back: "
                           "slower start, faster steps", False)
    device: "torch.device"

    @property
    def controlnets(self) -> list[str]:
        if self.controlnet is None:
            return [str(tiny.CONTROLNET)] if tiny.is_base(self.checkpoint) else []
        return [] if self.controlnet == ["none"] else self.controlnet

    def for_each(self, values: list[float]) -> list[float]:
        """A value for each control network, from one for all or one each."""
        return values * len(self.controlnets) if len(values) == 1 else values


def parser() -> cli.Parser:
    p = cli.Parser(__doc__)
    cli.add_base_options(p, tiny.SD)
    cli.add_options(p, Settings)
    p.add_argument("--dtype", dest="precision", type=cli.precision, help="old name of --precision")
    return p


def parse(argv: list[str] | None = None) -> tuple[Settings, dict[str, list[str]]]:
    """The command line, and with --like the fingerprints of the files that should be unchanged; the
    options that the picture remembers come before those of the command line."""
    p = parser()
    argv = sys.argv[1:] if argv is None else argv
    args, before, fingerprints = p.parse_args(argv), None, {}
    if args.like:
        given = args
        remembered, fingerprints = remembered_by(args.like)
        before = Settings(**vars(p.parse_args(remembered)))
        args = p.parse_args([*remembered, *argv])
        for name in NOT_REMEMBERED:  # someone else's picture must not decide where to write
            setattr(args, name, getattr(given, name))
        if args.canny or args.annotator:
            args.condition = given.condition
    settings = Settings(**vars(args))
    if before:
        files, files_before = files_of(settings), files_of(before)
        fingerprints = {name: value for name, value in fingerprints.items()
                        if files_before.get(name) == files.get(name)}
    if problem := conflict(settings):
        p.error(problem)
    from common.devices import default_precision, device
    from diffusion import ddim_timesteps
    ddim_timesteps(settings.steps, settings.spacing)
    where = device(settings.device)
    precision = settings.precision or default_precision(where)[0]
    return replace(settings, device=where, precision=precision), fingerprints


def remembered_by(picture: Path) -> tuple[list[str], dict[str, list[str]]]:
    """The options that a picture was made with, and the fingerprints of its files."""
    from data.pictures import read_text
    text = read_text(picture)
    if "arguments" not in text:
        raise ValueError(f"expected a picture made by sample.py in --like, {picture} does not "
                         "record how it was made")
    try:
        arguments = list(map(str, json.loads(text["arguments"])))
        # Older pictures do not say that they are in float32, which was the default.
        return ["--precision=float32", *arguments], dict(json.loads(text["files"]))
    except (ValueError, TypeError, KeyError) as problem:
        raise ValueError(f"the record in {picture} of how it was made is damaged: "
                         f"{problem}") from None


def files_of(settings: Settings) -> dict[str, list[str | Path]]:
    """What a picture is made from, by option."""
    return {"checkpoint": [settings.checkpoint], "controlnet": settings.controlnets,
            "condition": settings.condition or []}


def conflict(s: Settings) -> str | None:
    """What is wrong with options that do not go together."""
    sources = [name for name in ("condition", "canny", "annotator") if getattr(s, name) is not None]
    if len(sources) > 1:
        return "expected one of --condition, --canny and --annotator"
    if s.controlnet and "none" in s.controlnet and len(s.controlnet) > 1:
        return "expected --controlnet none alone"
    if sources and s.controlnet is None and not s.controlnets:
        return (f"--{sources[0]} needs a --controlnet for this --checkpoint; or --controlnet none, "
                "to take no more than its size")
    num = len(s.controlnets)
    for name, values in (("scale", s.scale), ("start", s.start), ("end", s.end)):
        if len(values) not in (1, num):
            return (f"expected one --{name} for all or one for each of {num} control networks, "
                    f"got {len(values)}")
    if s.condition and num and len(s.condition) != num:
        return (f"expected a --condition for each of {num} control networks, "
                f"got {len(s.condition)}")
    start, end = s.for_each(s.start), s.for_each(s.end)
    if any(a >= b for a, b in zip(start, end, strict=True)):
        return f"expected every --start before its --end, got {start} and {end}"
    if s.out.suffix.lower() != ".png" or s.out.is_dir():
        return f"expected a name that ends in .png in --out, got {s.out}"
    return None


if __name__ == "__main__":  # before PyTorch is imported
    cli.answer(parse)

import torch
from torch import Tensor
from tqdm import tqdm

from common.devices import DTYPES, compile_blocks, tune
from common.files import fingerprint
from controlnet import ControlNetwork
from controlnet.sampling import Control, sample_picture
from data.annotators import annotate, fit_photo
from data.circles import HELD_OUT, Circles
from data.pictures import read_picture, resized, to_image, write_png
from unet.attention import SpatialTransformer
from unet.blocks import ResBlock
from vae import DOWNSCALE
from vae.model import ResnetBlock
from weights import StableDiffusion, load_controlnet, load_stable_diffusion
from weights.controlnet import controlnet_file


def arguments_of(settings: Settings) -> list[str]:
    """The command line that makes the same picture: every setting that is not the default."""
    p, arguments = parser(), []
    for name, value in vars(settings).items():
        default = p.get_default(name)
        if name in NOT_REMEMBERED or value is None or value is False or value == default:
            continue
        if value is True:
            arguments.append(cli.flag(name))
        elif isinstance(value, list):
            arguments += [cli.flag(name), *map(str, value)]
        else:
            arguments.append(f"{cli.flag(name)}={value}")
    return arguments


def fingerprints_of(settings: Settings) -> dict[str, list[str]]:
    """What tells whether the files that a picture was made from are still the same."""
    return {name: [fingerprint(controlnet_file(path)) for path in paths]
            for name, paths in files_of(settings).items()}


def annotated(settings: Settings, resolution: int) -> Settings:
    """With --canny or --annotator: the condition is made from the photo, saved beside the output,
    and used from there."""
    if not (settings.canny or settings.annotator):
        return settings
    name, path = settings.annotator or ("canny", settings.canny)
    photo = fit_photo(read_picture(path), settings.height, settings.width, resolution)
    picture = annotate(name, photo)
    saved = settings.out.with_name(f"{settings.out.stem}-condition.png")
    write_png(saved, to_image(picture))
    print(saved)
    return replace(settings, condition=[str(saved)] * max(1, len(settings.controlnets)))


def conditions_and_prompt(settings: Settings, resolution: int) -> tuple[list[Tensor], str]:
    """The conditions (3, H, W), all of one size, and the prompt."""
    if settings.condition:
        conditions = [read_picture(path) for path in settings.condition]
        prompt = settings.prompt or ""
    else:
        circle = Circles(resolution, 1, first=HELD_OUT)[0]
        conditions = [circle["condition"]] * max(1, len(settings.controlnets))
        prompt = circle["prompt"] if settings.prompt is None else settings.prompt
    height = settings.height or conditions[0].shape[1]
    width = settings.width or conditions[0].shape[2]
    if height % DOWNSCALE or width % DOWNSCALE:
        raise ValueError(f"expected a height and width divisible by {DOWNSCALE}, got {height} x "
                         f"{width}: choose others with --height and --width")
    return [resized(condition, height, width) for condition in conditions], prompt


def load(settings: Settings) -> tuple[StableDiffusion, list[ControlNetwork]]:
    """The base model and its control networks, on --device and in --precision, the autoencoder in
    float32."""
    dtype = DTYPES[settings.precision]
    sd = load_stable_diffusion(settings.checkpoint, dtype, settings.prediction).to(settings.device)
    tune(sd.resolution, settings.precision)
    networks = [load_controlnet(path, sd.unet, dtype).to(settings.device).for_inference()
                for path in settings.controlnets]
    if settings.compile:
        for network in (sd.unet, sd.vae.decoder, *networks):
            compile_blocks(network, (ResBlock, SpatialTransformer, ResnetBlock))
    return sd, networks


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    settings, unchanged = parse(argv)
    sd, networks = load(settings)
    settings = annotated(settings, sd.resolution)
    conditions, prompt = conditions_and_prompt(settings, sd.resolution)
    height, width = conditions[0].shape[1:]
    files = fingerprints_of(settings)
    for name, before in unchanged.items():
        if files.get(name) != before:
            warnings.warn(f"a file of --{name} has changed since {settings.like} was made: the "
                          "picture will differ", stacklevel=2)

    scale = settings.for_each(settings.scale)
    # With --controlnet none the condition only sets the size.
    controls = [Control(net, condition[None].to(settings.device), *strength)
                for net, condition, *strength in zip(
                    networks, conditions[: len(networks)], scale, settings.for_each(settings.start),
                    settings.for_each(settings.end), strict=True)]
    guidance = sd.guidance if settings.guidance is None else settings.guidance
    context = sd.text.encode([prompt])
    negative_context = sd.text.encode([settings.negative_prompt])
    with tqdm(total=settings.num * settings.steps, desc="sampling") as progress:
        # One after the other: a picture's bits depend on its own seed, not on how many are made.
        for i in range(settings.num):
            made = replace(settings, seed=settings.seed + i, prompt=prompt)
            picture = sample_picture(
                sd, controls, height, width, context, negative_context, seed=made.seed,
                steps=settings.steps, guidance=guidance, guess=settings.guess, eta=settings.eta,
                spacing=settings.spacing, step_done=progress.update,
                cuda_graph=settings.compile and settings.device.type == "cuda")
            text = {
                "prompt": prompt, "negative_prompt": settings.negative_prompt, "seed": made.seed,
                "steps": settings.steps, "guidance": guidance, "scale": scale, "height": height,
                "width": width, "checkpoint": settings.checkpoint.name, "torch": torch.__version__,
                "arguments": json.dumps(arguments_of(made)), "files": json.dumps(files)}
            path = settings.out
            if settings.num > 1:
                path = path.with_stem(f"{path.stem}-{i}")
            write_png(path, to_image(picture), {key: str(value) for key, value in text.items()})
            progress.write(str(path))


if __name__ == "__main__":
    sys.exit(cli.run(main))
