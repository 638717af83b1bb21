"""Measure how well control networks obey: overlap with the true disc and colour error on generated circles no network was trained on.

    python evaluate.py                                                            base and teacher of the tiny model
    python evaluate.py --controlnet runs/reduced_layer/controlnet.safetensors     and your student
"""

import json
import sys
from argparse import Namespace
from pathlib import Path

import torch

from data.cli import Parser, device, positive, run, tune_cpu
from data.files import replacing
from kd.fidelity import print_fidelity
from weights import load_controlnet, load_stable_diffusion

TINY = Path(__file__).parent / "weights" / "tiny"


def parse(argv: list[str] | None) -> Namespace:
    p = Parser(__doc__)
    p.add_argument("--controlnet", type=Path, nargs="+", default=[], help="ControlNet or student files to measure")
    p.add_argument("--checkpoint", type=Path, default=TINY / "sd.safetensors", help="Stable Diffusion in one file (default: the tiny model)")
    p.add_argument("--prediction", choices=["noise", "v"], help="what the checkpoint predicts; v: SD 2.1 at 768 (default: what the file says, else noise)")
    p.add_argument("--teacher", default=str(TINY / "controlnet.safetensors"), help="teacher ControlNet; none = leave it out (default: the tiny teacher)")
    p.add_argument("--images", type=positive, default=256, help="held-out circles a network (default: 256)")
    p.add_argument("--steps", type=positive, default=20, help="DDIM steps (default: 20)")
    p.add_argument("--out", type=Path, help="folder for results.json (default: print only)")
    p.add_argument("--device", type=device, default="auto", help="auto, cpu or cuda (default: auto, CUDA where there is one)")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    sd = load_stable_diffusion(args.checkpoint, prediction=args.prediction).to(args.device)
    tune_cpu(sd.resolution)
    files = ({"teacher": Path(args.teacher)} if args.teacher != "none" else {}) | {str(path): path for path in args.controlnet}
    networks = {name: load_controlnet(path, sd.unet).to(args.device) for name, path in files.items()}
    rows = print_fidelity(sd, {"base without control": None} | networks, count=args.images, size=sd.resolution, steps=args.steps)
    if args.out:
        protocol = {"checkpoint": str(args.checkpoint), "images": args.images, "steps": args.steps, "guidance": sd.guidance, "torch": torch.__version__}
        with replacing(args.out / "results.json") as temporary:
            temporary.write_text(json.dumps({"protocol": protocol, "control fidelity": rows}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run(main))
