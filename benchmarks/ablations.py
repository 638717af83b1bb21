"""The ControlNet paper's ablations on the tiny model at equal steps: python -m benchmarks.ablations

Six trainings of 400 steps of 32 circles; the networks and the base are then measured on held-out
circles with the right prompt, and with the empty prompt (`own_colors` in data/fidelity.py). About
an hour on one core. A finished training is not run again and an interrupted one is continued.
Writes --out/ablations.json and prints the table.
"""

import json
import sys
from argparse import Namespace
from pathlib import Path

import train
from common.cli import Parser, positive, run
from common.devices import tune
from common.files import atomic_write
from controlnet import ControlNetwork
from controlnet.ablations import ABLATIONS
from data.circles import HELD_OUT, Circles
from evaluation.fidelity import control_fidelity
from unet import UNet
from weights import load_controlnet, load_stable_diffusion, tiny
from weights.files import read_tensors

STEPS = "400"
TRAINING = ["--steps", STEPS, "--batch-size", "32", "--lr", "1.5e-3", "--decay", "100"]
INTERVALS = ["--save-every", "100", "--sample-every", STEPS, "--report-samples", "0"]
PROMPTS = ("right prompt", "empty prompt")


def trained(name: str, folder: Path, unet: UNet) -> ControlNetwork:
    """The network of a finished run. The run is started, or continued, if it is not finished.
    Raises KeyboardInterrupt if a signal stops it."""
    cache = folder.parent / "cache"  # all runs have the same base and the same circles
    arguments = [*TRAINING, *INTERVALS, "--cache", str(cache), "--out", str(folder)]
    if name in ABLATIONS:
        arguments += ["--ablation", name]
    if (folder / "state" / "state.pt").exists():
        arguments.append("--resume")
    file = folder / "controlnet.safetensors"
    if not is_finished(file):
        train.main(arguments)
        if not is_finished(file):
            raise KeyboardInterrupt
    return load_controlnet(file, unet)


def is_finished(file: Path) -> bool:
    return file.exists() and read_tensors(file)[1]["step"] == STEPS


def parse(argv: list[str] | None) -> Namespace:
    p = Parser(__doc__)
    p.add_argument("--images", type=positive, default=64,
                   help="held-out circles a network is measured on (default: 64)")
    p.add_argument("--out", type=Path, default=Path("runs/ablations"),
                   help="folder of the runs and the table (default: runs/ablations)")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    sd = load_stable_diffusion(tiny.SD)
    tune(sd.resolution)
    circles = Circles(sd.resolution, args.images, first=HELD_OUT)
    file = args.out / "ablations.json"
    protocol = f"{args.images} circles, {' '.join(TRAINING)}"
    stored = json.loads(file.read_text()) if file.exists() else {}
    results = stored.setdefault(protocol, {})  # results of another protocol are kept apart
    for name in ("base", "controlnet", *ABLATIONS):
        if name in results:
            continue
        net = None if name == "base" else trained(name, args.out / name, sd.unet)
        results[name] = {prompt: control_fidelity(sd, net, circles, name=name,
                                                  prompts=prompt == "right prompt")
                         for prompt in PROMPTS}
        results[name]["parameters"] = sum(p.numel() for p in net.parameters()) if net else 0
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
