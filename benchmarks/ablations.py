"""The ControlNet paper's ablations on the tiny model at equal steps: python -m benchmarks.ablations

Budget, on one core of a 2.5 GHz Xeon: six trainings of 400 steps of 32 circles (12,800 pictures, 8
minutes each, those connected to the encoder longer) and 64 held-out circles sampled twice for each
and for the base (about 1 minute each). A training that has finished is not run again, one that was
interrupted is continued, so the command can be repeated at any time. Writes --out/ablations.json
and prints the table: overlap and colour error with the right prompt, and with the empty prompt
(there the colours are the picture's own, see data/fidelity.py). """

import json
import sys
from pathlib import Path

import train
from common.cli import Parser, positive, run
from common.devices import tune_cpu
from common.files import atomic_write
from controlnet.ablations import ABLATIONS
from evaluation.fidelity import control_fidelity
from weights import load_controlnet, load_stable_diffusion
from weights.files import read_tensors

SETTINGS = "--steps 400 --batch-size 32 --lr 1.5e-3 --decay 100 --save-every 100 --sample-every 400".split(
)


def main(argv: list[str] | None = None) -> None:
    p = Parser(__doc__)
    p.add_argument(
        "--images", type=positive, default=64, help="held-out circles a row (default: 64)")
    p.add_argument(
        "--out",
        type=Path,
        default=Path("runs/ablations"),
        help="folder of the runs and the table (default: runs/ablations)")
    args = p.parse_args(argv)
    sd = load_stable_diffusion(train.TINY / "sd.safetensors")
    tune_cpu(sd.resolution)
    train.report = lambda *_: None  # measured below

    file = args.out / "ablations.json"
    # rows that were measured otherwise are kept apart
    protocol = f"{args.images} circles, {' '.join(SETTINGS[:8])}"
    stored = json.loads(file.read_text()) if file.exists() else {}
    rows = stored.setdefault(protocol, {})
    for name in ("base", "controlnet", *ABLATIONS):
        if name not in rows:
            network = None if name == "base" else trained(name, args.out / name, sd.unet)
            rows[name] = {
                prompt:
                control_fidelity(
                    sd,
                    network,
                    count=args.images,
                    size=sd.resolution,
                    name=name,
                    prompts=prompt == "right prompt")
                for prompt in ("right prompt", "empty prompt")
            } | {"parameters": sum(p.numel() for p in network.parameters()) if network else 0}
            with atomic_write(file) as temporary:
                temporary.write_text(json.dumps(stored, indent=1) + "\n")

    print(f"\n{args.images} held-out circles; {' '.join(SETTINGS[:8])}")
    print(f"{'':20}{'':12}{'right prompt':>26}{'empty prompt':>26}")
    print(f"{'':20}{'parameters':>12}" + 2 * f"{'overlap':>12}{'colour error':>14}")
    for name, row in rows.items():
        measured = "".join(f"{row[prompt]['overlap']:>12.3f}{row[prompt]['color_error']:>14.1f}"
                           for prompt in ("right prompt", "empty prompt"))
        print(f"{name:20}{row['parameters']:>12,}{measured}")


def trained(name: str, folder: Path, unet):
    """The network of a finished run; the run is started or continued if it has not finished."""
    # all runs have the same base and the same circles
    cache = ["--cache", str(folder.parent / "cache")]
    settings = [
        *SETTINGS, *cache, "--out",
        str(folder), *(["--ablation", name] if name in ABLATIONS else [])
    ]
    file = folder / "controlnet.safetensors"
    if not file.exists() or read_tensors(file)[1]["step"] != SETTINGS[1]:
        train.main([*settings, "--resume"] if (folder / "state" /
                                               "state.pt").exists() else settings)
        if read_tensors(file)[1]["step"] != SETTINGS[1]:  # it was asked to stop, and saved
            raise KeyboardInterrupt
    return load_controlnet(file, unet)


if __name__ == "__main__":
    sys.exit(run(main))
