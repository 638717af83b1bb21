"""Architecture choices that the sources make otherwise, measured: python -m benchmarks.choices

Each choice is trained both ways on the tiny model, on the same circles and noise, and measured on
held-out circles. Two to five minutes a training on one core; a finished one is not run again and an
interrupted one is continued. Writes --out/choices.json and prints the table, with what was measured
before. With a copy of docs/choices.json there, only those trainings run that it does not hold.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from common.cli import Parser, answer, non_negative, positive, run

IMAGES = 128


class Choice(NamedTuple):
    """In words, then its two sides as options of train.py."""

    what: str
    default: str
    other: str
    sides: tuple[str, str]


CHOICES = {
    "E(c)": Choice(
        "a ControlNet's E(c)", "the released code's, eight 3x3 convolutions with SiLU",
        "the ControlNet paper's, four 4x4 ones with ReLU",
        ("--condition-encoder released", "--condition-encoder paper")),
    "L_layer": Choice(
        "L_layer's variance, `reduced_layer`", "of a layer's whole output",
        "of each channel (the papers leave it open)",
        ("--student reduced_layer", "--student reduced_layer --layer-statistics channel")),
    "L_layer-lite": Choice(
        "L_layer's variance, `lite`", "of a layer's whole output", "of each channel",
        ("--student lite", "--student lite --layer-statistics channel")),
    "modulation": Choice(
        "modulation", "before each output (`modulated`)",
        "after each layer, as the distillation poster draws it (`modulated_layers`)",
        ("--student modulated", "--student modulated_layers")),
    "LoHa": Choice(
        "LoHa", "in place of convolutions and linear layers (`loha`)",
        "of convolutions alone, as the poster says (`loha_convolutions`)",
        ("--student loha", "--student loha_convolutions")),
}


def parse(argv: list[str] | None) -> Namespace:
    p = Parser(__doc__)
    p.add_argument("--only", nargs="+", choices=CHOICES, default=list(CHOICES), metavar="CHOICE",
                   help=f"choices to measure, of {', '.join(CHOICES)} (default: all)")
    p.add_argument("--seeds", type=non_negative, nargs="+", default=[0, 1],
                   help="a training each (default: 0 1)")
    p.add_argument("--init", choices=["random", "teacher"], default="random",
                   help="where students start (default: random)")
    p.add_argument("--images", type=positive, default=IMAGES,
                   help=f"held-out circles a network is measured on (default: {IMAGES})")
    p.add_argument("--out", type=Path, default=Path("runs/choices"),
                   help="folder of the runs and the table (default: runs/choices)")
    return p.parse_args(argv)


if __name__ == "__main__":  # before PyTorch is imported
    answer(parse)

from benchmarks.ablations import trained
from common.devices import tune
from common.files import atomic_write
from data.circles import HELD_OUT, Circles
from evaluation.fidelity import control_fidelity
from evaluation.report import spread, table
from weights import load_stable_diffusion, tiny

# A student's recipe is that of benchmarks.distillation's `distilled`, at a sixth of its length; a
# ControlNet's that of benchmarks.ablations.
STUDENT = ("--steps 500 --decay 100 --batch-size 16 --lr 2e-3 --layer-only-steps 375 "
           "--loss-layer 1 --loss-d 10 --loss-td 10 --init")
CONTROLNET = "--steps 400 --decay 100 --batch-size 32 --lr 1.5e-3"


def training(options: str, init: str, seed: int) -> list[str]:
    """The options of a training, without its folder."""
    recipe = f"{STUDENT} {init}" if "--student" in options else CONTROLNET
    steps = recipe.split()[1]
    return [*f"{options} {recipe} --seed {seed} --save-every 100 --sample-every {steps} "
            "--report-samples 0".split()]


def key(options: str, init: str, seed: int, images: int = IMAGES) -> str:
    """What a result is stored under: all that it depends on."""
    return f"{' '.join(training(options, init, seed))}, {images} circles"


def markdown(results: Mapping[str, Mapping], images: int = IMAGES) -> str:
    """The table of all results, the seeds of a side together."""
    rows = []
    for choice in CHOICES.values():
        starts = ("random", "teacher") if "--student" in choice.sides[0] else ("random",)
        for init in starts:
            sides = [[results[name] for seed in range(10)
                      if (name := key(options, init, seed, images)) in results]
                     for options in choice.sides]
            if not any(sides):
                continue
            what = choice.what + (", started from the teacher" if init == "teacher" else "")
            rows.append([f"{what}: {choice.default}; or {choice.other}", *map(_cell, sides)])
    head = ["choice: the default; or the other", "the default's overlap", "the other's"]
    return "\n".join(table(head, rows)) + "\n"


def _cell(results: list[Mapping]) -> str:
    """Overlap, and the number of seeds if there is one only."""
    if not results:
        return "-"
    text = spread([result["overlap"] for result in results])
    return text if len(results) > 1 else f"{text}, one seed"


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    sd = load_stable_diffusion(tiny.SD)
    tune(sd.resolution)
    circles = Circles(sd.resolution, args.images, first=HELD_OUT)
    file = args.out / "choices.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    todo = [(options, seed) for seed in args.seeds for choice in args.only
            for options in CHOICES[choice].sides]
    for options, seed in todo:
        name = key(options, args.init, seed, args.images)
        if name not in results:
            folder = "_".join(word.removeprefix("--") for word in options.split())
            base, net = trained(training(options, args.init, seed),
                                args.out / f"{folder}-{args.init}-{seed}")
            results[name] = control_fidelity(base, net, circles, name=options) | {
                "parameters": sum(p.numel() for p in net.parameters())}
            with atomic_write(file) as temporary:
                temporary.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{options}, seed {seed}: overlap {results[name]['overlap']:.3f}", flush=True)
    print("\n" + markdown(results, args.images), end="")


if __name__ == "__main__":
    sys.exit(run(main))
