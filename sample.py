"""Make pictures from a prompt and a condition.

    python sample.py                                        the tiny model, an unseen circle
    python sample.py --controlnet runs/reduced_layer/controlnet.safetensors    your student
    python sample.py --prompt "red circle with blue background" --condition circle.png
    python sample.py --checkpoint sd.safetensors --controlnet canny.safetensors \\
        --canny photo.jpg --prompt "a house"
    python sample.py --like picture.png --seed 7            the same picture, with another seed
"""

import sys

from common import cli
from sampling import settings as command_line
from sampling.settings import Settings


def parse(argv: list[str] | None = None) -> tuple[Settings, dict[str, list[str]]]:
    return command_line.parse(argv, __doc__)


if __name__ == "__main__":  # before PyTorch is imported
    cli.answer(parse)

import warnings
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from common.devices import DTYPES, compile_blocks, tune
from common.files import fingerprint
from controlnet import ControlNetwork
from controlnet.sampling import Control, is_on, sample_picture
from data import captions
from data.annotators import annotate, fit_photo
from data.circles import HELD_OUT, Circles
from data.pictures import BLACK, WHITE, read_picture, resized, to_image, write_png
from diffusion import TIMESTEPS, Sampling
from sampling.output import output_names, record, write_beside
from sampling.settings import arguments_of, files_of, pictures_read
from text import windows_for
from text.prompts import DEFAULT_PROMPT, taken_literally, with_suffix
from unet.attention import SpatialTransformer
from unet.blocks import ResBlock
from vae import DOWNSCALE
from vae.model import ResnetBlock
from weights import StableDiffusion, load_controlnet, load_stable_diffusion
from weights.controlnet import controlnet_file

MOSTLY_WHITE = 2 / 3  # of a condition's pixels; of lines and poses it is a tenth or less
LATE = 800            # a first timestep at which the noise still holds little of a picture


def annotated(settings: Settings, resolution: int) -> Settings:
    """With --canny or --annotator: the condition is made from the photo, saved beside the output
    under a free name, and used from there."""
    if not (settings.canny or settings.annotator):
        return settings
    name, path = settings.annotator or ("canny", settings.canny)
    photo = fit_photo(read_picture(path), settings.height, settings.width, resolution)
    picture = to_image(annotate(name, photo))
    saved = write_beside(settings.out.with_stem(f"{settings.out.stem}-condition"), picture)
    print(saved)
    return replace(settings, condition=[str(saved)] * max(1, len(settings.controlnets)))


def read_condition(path: str, invert: bool) -> Tensor:
    """A condition (3, H, W). Warns of one that is nearly all white: it should be on black."""
    condition = 1 - read_picture(path, WHITE) if invert else read_picture(path, BLACK)
    if (white := (condition.amin(0) > 0.9).float().mean().item()) > MOSTLY_WHITE:
        warnings.warn(f"{white:.0%} of the condition {path} is white: published ControlNets of "
                      "edges, lines and poses were trained with white on black; " + (
                          "leave out --invert" if invert else "--invert turns it round"),
                      stacklevel=2)
    return condition


def conditions_and_prompt(settings: Settings, resolution: int) -> tuple[list[Tensor], str]:
    """The conditions (3, H, W), all of one size, and the prompt without its suffix (automatic: the
    default one)."""
    if settings.condition:
        conditions = [read_condition(path, settings.invert) for path in settings.condition]
        prompt = settings.prompt or ""
    else:
        circle = Circles(resolution, 1, first=HELD_OUT)[0]
        conditions = [circle["condition"]] * max(1, len(settings.controlnets))
        prompt = circle["prompt"] if settings.prompt is None else settings.prompt
    if settings.prompt_setting in ("none", "default", "automatic"):
        prompt = "" if settings.prompt_setting == "none" else DEFAULT_PROMPT
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
    vae = settings.vae[0] if settings.vae else None
    sd = load_stable_diffusion(settings.checkpoint, dtype, cli.sampling_given(settings), vae)
    sd.to(settings.device)
    tune(sd.resolution, settings.precision)
    networks = [load_controlnet(path, sd.unet, dtype).to(settings.device).for_inference()
                for path in settings.controlnets]
    if settings.compile:
        for network in (sd.unet, sd.vae.decoder, *networks):
            compile_blocks(network, (ResBlock, SpatialTransformer, ResnetBlock))
    return sd, networks


def fingerprints_of(settings: Settings) -> dict[str, list[str]]:
    """What tells whether the files that a picture was made from are still the same."""
    return {name: [fingerprint(controlnet_file(path) if name == "controlnet" else path)
                   for path in paths] for name, paths in files_of(settings).items()}


def warnings_of(settings: Settings, sampling: Sampling) -> Iterator[str]:
    """What is allowed and hardly ever meant."""
    first, steps = sampling.timesteps[0], sampling.steps
    if first < LATE:
        yield (f"with --steps {steps} sampling begins at timestep {first} of "
               f"{TIMESTEPS - 1}, as if a picture were in the noise already: pictures turn grey; "
               "--spacing trailing begins at the last one")
    texts = settings.prompt or "", settings.prompt_suffix or "", settings.negative_prompt
    literal = [part for text in texts for part in taken_literally(text)]
    if literal:
        yield ("weights, BREAK and files in prompts are other programs': read as words here are "
               + ", ".join(map(repr, literal)))
    for path, start, end in zip(settings.controlnets, settings.for_each(settings.start),
                                settings.for_each(settings.end), strict=True):
        if not any(is_on(i, steps, start, end) for i in range(steps)):
            yield (f"{path} never controls: no whole step of --steps {steps} lies between "
                   f"--start {start:g} and --end {end:g}")


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    settings, unchanged = parse(argv)
    paths = output_names(settings.out, settings.num, pictures_read(settings), settings.like,
                         settings.overwrite)
    if settings.seed == -1:
        settings = replace(settings, seed=torch.Generator().seed() % 2**32)
        print(f"seed {settings.seed}")
    if settings.prompt_setting == "automatic":
        captions.require_blip()
    sd, networks = load(settings)
    for warning in warnings_of(settings, sd.sampling):
        warnings.warn(warning, stacklevel=2)
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

    def contexts(prompt: str) -> list[Tensor]:
        both = [prompt, settings.negative_prompt]
        windows = windows_for(both) if settings.long_prompt else 1
        return [sd.text.encode([text], windows) for text in both]

    def drawn(texts: list[Tensor], seed: int, progress: tqdm) -> Tensor:
        return sample_picture(
            sd, controls, height, width, *texts, seed=seed, guess=settings.guess,
            eta=settings.eta, step_done=progress.update,
            cuda_graph=settings.compile and settings.device.type == "cuda")

    automatic = settings.prompt_setting == "automatic"
    photo = settings.canny or (settings.annotator and settings.annotator[1])
    passes = settings.num + (automatic and not photo)
    with tqdm(total=passes * sd.sampling.steps, desc="sampling") as progress:
        if automatic:
            picture = read_picture(photo) if photo else drawn(contexts(prompt), settings.seed,
                                                              progress)
            prompt = captions.caption(picture)
            progress.write(f"prompt: {prompt}")
        prompt = with_suffix(prompt, settings.prompt_suffix)
        texts = contexts(prompt)
        # One after the other: a picture's bits depend on its own seed, not on how many are made.
        for i, path in enumerate(paths):
            made = replace(settings, seed=settings.seed + i, prompt=prompt)
            picture = drawn(texts, made.seed, progress)
            text = {
                "prompt": prompt, "negative_prompt": settings.negative_prompt, "seed": made.seed,
                "steps": sd.sampling.steps, "guidance": sd.sampling.guidance, "scale": scale,
                "height": height, "width": width, "checkpoint": settings.checkpoint.name,
                "torch": torch.__version__}
            if settings.prompt_setting:
                text["prompt_setting"] = settings.prompt_setting
            write_png(path, to_image(picture), record(text, arguments_of(made), files))
            progress.write(str(path))


if __name__ == "__main__":
    sys.exit(cli.run(main))
