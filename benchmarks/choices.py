"""Architecture choices that the sources make otherwise, measured: python -m benchmarks.choices

Each choice is trained both ways on the tiny model, on the same circles and noise, and measured on
held-out circles. Two to five minutes a training on one core; a finished one is not run again and an
interrupted one is continued. Writes --out/choices.json and prints the table.
"""

import json
import sys
from argparse import Namespace
from pathlib import Path
from statistics import mean

from common.cli import Parser, answer, non_negative, positive, run

# Choice -> its two sides as options of train.py, ours first.
CHOICES = {
    "L_layer": ("--student reduced_layer", "--student reduced_layer --layer-statistics channel"),
    "L_layer-lite": ("--student lite", "--student lite --layer-statistics channel"),
    "modulation": ("--student modulated", "--student modulated_layers"),
    "LoHa": ("--student loha", "--student loha_convolutions"),
    "E(c)": ("--condition-encoder released", "--condition-encoder paper"),
}


def parse(argv: list[str] | None) -> Namespace:
    p = Parser(__doc__)
    p.add_argument("--only", nargs="+", choices=CHOICES, default=list(CHOICES), metavar="CHOICE",
                   help=f"choices to measure, of {', '.join(CHOICES)} (default: all)")
    p.add_argument("--seeds", type=non_negative, nargs="+", default=[0, 1],
                   help="a training each (default: 0 1)")
    p.add_argument("--init", choices=["random", "teacher"], default="random",
                   help="where students start (default: random)")
    p.add_argument("--images", type=positive, default=128,
                   help="held-out circles a network is measured on (default: 128)")
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


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    tune(load_stable_diffusion(tiny.SD).resolution)
    file = args.out / "choices.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    print(f"{args.images} held-out circles, seeds {args.seeds}, students from {args.init}\n"
          f"{'':58}{'parameters':>12}{'overlap':>9}  by seed")
    for options in [side for choice in args.only for side in CHOICES[choice]]:
        overlaps = []
        for seed in args.seeds:
            command = training(options, args.init, seed)
            key = f"{' '.join(command)}, {args.images} circles"
            if key not in results:
                name = "_".join(word.removeprefix("--") for word in options.split())
                sd, net = trained(command, args.out / f"{name}-{args.init}-{seed}")
                circles = Circles(sd.resolution, args.images, first=HELD_OUT)
                results[key] = control_fidelity(sd, net, circles, name=name) | {
                    "parameters": sum(p.numel() for p in net.parameters())}
                with atomic_write(file) as temporary:
                    temporary.write_text(json.dumps(results, indent=1) + "\n")
            overlaps.append(results[key]["overlap"])
        print(f"{options:58}{results[key]['parameters']:>12,}{mean(overlaps):>9.3f}  "
              + " ".join(f"{overlap:.3f}" for overlap in overlaps), flush=True)


if __name__ == "__main__":
    sys.exit(run(main))
