"""The command line of sample.py, also as a picture remembers it.

Like all that reads a command line, this file imports no PyTorch until the line is right.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from common import cli
from common.cli import option
from weights import tiny

if TYPE_CHECKING:
    import torch

# Not recorded in a picture: where it was made and written, the photo behind its condition, and how
# its prompt came about, which is recorded as a whole.
NOT_REMEMBERED = {"like", "out", "overwrite", "num", "canny", "annotator", "device",
                  "prompt_setting", "prompt_suffix"}
TEXTS = ["--prompt", "--negative-prompt", "--prompt-suffix"]  # may begin with a dash


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The command line."""

    prompt: str | None = option("what to draw (default: empty; without --condition, the generated "
                                "circle's prompt)")
    prompt_setting: str | None = option(
        "the ControlNet paper's: none (empty), default (a professional, detailed, high-quality "
        "image), automatic (BLIP's caption of the photo of --canny or --annotator; without one, as "
        "in the paper, of the picture that the default prompt makes of the condition), user "
        "(--prompt)", choices=cli.PROMPT_SETTINGS)
    prompt_suffix: str | None = option('appended to the prompt after ", ", such as "best quality, '
                                       'extremely detailed"')
    negative_prompt: str = option("what guidance moves away from (default: empty)", "")
    long_prompt: bool = option("read prompts beyond CLIP's 75 tokens too, in windows of 75", False)
    condition: list[str] | None = option("the condition, a picture for each control network "
                                         "(default: the outline of a generated circle)", nargs="+")
    canny: str | None = option("use the Canny edges of a photo as the condition, and save them "
                               "beside the output", metavar="PHOTO")
    annotator: list[str] | None = option("the same with an annotator of controlnet_aux "
                                         '(pip install -e ".[annotators]")', nargs=2,
                                         metavar=("NAME", "PHOTO"))
    invert: bool = option("turn the --condition round: for black lines on white", False)
    out: Path = option("PNG to write; with --num, NAME-0.png ...", Path("runs/sample.png"), Path)
    overwrite: bool = option("replace a file of that name even if this program did not make it "
                             "(else the next free one of NAME-1.png, NAME-2.png ...)", False)
    like: Path | None = option("use the settings of a picture that this program made, or of one "
                               "with A1111's text; further options change single ones", type=Path,
                               metavar="PNG")
    checkpoint: Path
    prediction: str | None  # this and the three below, None: as the checkpoint says
    sample_steps: int | None
    guidance: float | None
    spacing: str | None
    vae: list[str] | None = option("take the autoencoder (VAE) from here, a file or diffusers' "
                                   "folder (default: the checkpoint's)", nargs=1, metavar="FILE")
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
    eta: float = option("0 = deterministic DDIM, 1 = with DDPM's noise", 0.0, cli.fraction)
    seed: int = option("of the initial noise; with --num, of the first picture's; -1: a random "
                       "one, which is printed", 0, cli.seed)
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


def parser(description: str = "") -> cli.Parser:
    p = cli.Parser(description)
    cli.add_base_options(p, tiny.SD)
    cli.add_options(p, Settings)
    p.add_argument("--dtype", dest="precision", type=cli.precision, help="old name of --precision")
    return p


def parse(argv: list[str] | None = None,
          description: str = "") -> tuple[Settings, dict[str, list[str]]]:
    """The command line, and with --like the fingerprints of the files that should be unchanged; the
    options that the picture remembers come before those of the command line."""
    p = parser(description)
    argv = cli.join_texts(p, sys.argv[1:] if argv is None else argv, TEXTS)
    args, before, fingerprints = p.parse_args(argv), None, {}
    if args.prompt is not None and args.prompt_setting not in (None, "user"):
        p.error(f"--prompt-setting {args.prompt_setting} goes without --prompt")
    if args.like:
        from sampling.output import remembered_by
        given = args
        remembered, fingerprints = remembered_by(args.like)
        args, old = p.parse_args([*remembered, *argv]), p.parse_args(remembered)
        before = located(Settings(**vars(old)), fingerprints, args.like)
        for name in files_of(before):
            if getattr(args, name) == getattr(old, name):
                setattr(args, name, getattr(before, name))
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
    where = device(settings.device)
    precision = settings.precision or default_precision(where)[0]
    return replace(settings, device=where, precision=precision), fingerprints


def located(before: Settings, fingerprints: dict[str, list[str]], picture: Path) -> Settings:
    """A picture's settings, with its files where they are now."""
    from sampling.output import found_again
    found = {}
    for name, paths in files_of(before).items():
        marks = [*fingerprints.get(name, []), *[None] * len(paths)]
        places = [found_again(str(path), picture, mark)
                  for path, mark in zip(paths, marks, strict=False)]
        if name == "checkpoint":
            found[name] = Path(places[0])
        elif getattr(before, name) not in (None, ["none"]):
            found[name] = places
    return replace(before, **found)


def files_of(settings: Settings) -> dict[str, list[str | Path]]:
    """What a picture is made from, by option."""
    files = {"checkpoint": [settings.checkpoint], "controlnet": settings.controlnets,
             "condition": settings.condition or []}
    return files | ({"vae": settings.vae} if settings.vae else {})


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
    if s.prompt_setting == "user" and s.prompt is None:
        return "--prompt-setting user needs a --prompt"
    if problem := cli.prompt_conflict(s.prompt_setting, s.prompt_suffix):
        return problem
    if s.invert and not s.condition:
        return "--invert needs a --condition"
    if s.out.suffix.lower() != ".png" or s.out.is_dir():
        return f"expected a name that ends in .png in --out, got {s.out}"
    return None


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


def pictures_read(settings: Settings) -> list[str]:
    """The pictures that are read, conditions and photos."""
    photos = [settings.canny, *(settings.annotator or ["", None])[1:]]
    return [path for path in [*(settings.condition or []), *photos] if path]
