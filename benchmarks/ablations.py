"""The ControlNet paper's ablations on the tiny model at equal steps: python -m benchmarks.ablations

Seven trainings of 400 steps of 32 circles; the networks and the base are then measured on held-out
circles with the right prompt, and with the empty prompt (`own_colors` in data/fidelity.py). More
than an hour on one core. A finished training is not run again and an interrupted one is continued.
Writes --out/ablations.json and prints the table.
"""

import json
import sys
from argparse import Namespace
from pathlib import Path

from common.cli import Parser, answer, positive, run
from controlnet import ABLATIONS

# Row of the table -> options of train.py. The last fine-tunes the decoder too, from the first step.
ROWS = {"controlnet": "", **{name: f"--ablation {name}" for name in ABLATIONS},
        "finetune_whole": "--ablation finetune --mode large"}


def parse(argv: list[str] | None) -> Namespace:
    p = Parser(__doc__)
    p.add_argument("--images", type=positive, default=64,
                   help="held-out circles a network is measured on (default: 64)")
    p.add_argument("--only", nargs="+", choices=["base", *ROWS], default=["base", *ROWS],
                   metavar="ROW", help="rows to train and measure (default: all)")
    p.add_argument("--out", type=Path, default=Path("runs/ablations"),
                   help="folder of the runs and the table (default: runs/ablations)")
    return p.parse_args(argv)


if __name__ == "__main__":  # before PyTorch is imported
    answer(parse)

import train
from common.devices import tune
from common.files import atomic_write
from controlnet import ControlNetwork
from data.circles import HELD_OUT, Circles
from evaluation.fidelity import control_fidelity
from weights import StableDiffusion, load_controlnet, load_stable_diffusion, tiny
from weights.files import read_tensors

STEPS = "400"
TRAINING = ["--steps", STEPS, "--batch-size", "32", "--lr", "1.5e-3", "--decay", "100"]
INTERVALS = ["--save-every", "100", "--sample-every", STEPS, "--report-samples", "0"]
PROMPTS = ("right prompt", "empty prompt")


def trained(options: list[str], folder: Path) -> tuple[StableDiffusion, ControlNetwork]:
    """The base model and the network of a finished run with these options of train.py, --steps
    among them. The run is started, or continued, if it is not finished. Raises KeyboardInterrupt if
    a signal stops it."""
    file, base = folder / "controlnet.safetensors", folder / "sd.safetensors"
    steps = options[options.index("--steps") + 1]

    def is_finished() -> bool:
        return file.exists() and read_tensors(file)[1]["step"] == steps

    # All runs have the same base and the same circles.
    options = [*options, "--cache", str(folder.parent / "cache"), "--out", str(folder)]
    if (folder / "state" / "state.pt").exists():
        options.append("--resume")
    if not is_finished():
        train.main(options)
        if not is_finished():
            raise KeyboardInterrupt
    sd = load_stable_diffusion(base if base.exists() else tiny.SD)  # one that learned, or the tiny
    return sd, load_controlnet(file, sd.unet)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    sd = load_stable_diffusion(tiny.SD)
    tune(sd.resolution)
    circles = Circles(sd.resolution, args.images, first=HELD_OUT)
    file = args.out / "ablations.json"
    protocol = f"{args.images} circles, {' '.join(TRAINING)}"
    stored = json.loads(file.read_text()) if file.exists() else {}
    results = stored.setdefault(protocol, {})  # results of another protocol are kept apart
    for name in args.only:
        if name in results:
            continue
        base, net, learned = sd, None, []
        if name != "base":
            base, net = trained([*TRAINING, *INTERVALS, *ROWS[name].split()], args.out / name)
            has_decoder = "--mode large" in ROWS[name]
            learned = [net, *[base.unet.output_blocks, base.unet.out] * has_decoder]
        results[name] = {prompt: control_fidelity(base, net, circles, name=name,
                                                  prompts=prompt == "right prompt")
                         for prompt in PROMPTS}
        results[name]["parameters"] = sum(p.numel() for part in learned for p in part.parameters())
        with atomic_write(file) as temporary:
            temporary.write_text(json.dumps(stored, indent=1) + "\n")

    print(f"\n{args.images} held-out circles; {' '.join(TRAINING)}")
    print(f"{'':32}" + "".join(f"{prompt:>26}" for prompt in PROMPTS))
    print(f"{'':20}{'parameters':>12}" + 2 * f"{'overlap':>12}{'colour error':>14}")
    for name, result in results.items():
        cells = "".join(f"{result[prompt]['overlap']:>12.3f}{result[prompt]['color_error']:>14.1f}"
                        for prompt in PROMPTS)
        print(f"{name:20}{result['parameters']:>12,}{cells}")


if __name__ == "__main__":
    sys.exit(run(main))
