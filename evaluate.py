"""Measure control networks side by side: how well they obey, how good their pictures are, what they cost.

    python evaluate.py                                                            base, teacher and the shipped students of the tiny model
    python evaluate.py --controlnet runs/reduced_layer/controlnet.safetensors     and your student instead
    python evaluate.py --checkpoint sd.safetensors --teacher canny.safetensors --controlnet student.safetensors --data DIR --canny

Writes results.json, results.md and figure.png into --out. All networks get the same prompts, conditions and initial noise; nothing is trained.
"""

import json
import platform
import sys
from argparse import Namespace
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path

import torch

from common.cli import Parser, non_negative, positive, run
from common.devices import device, tune_cpu
from common.files import atomic_write, sha256
from controlnet import ControlNet
from controlnet.sampling import Control, controlled
from data.circles import HELD_OUT, Circles
from data.folder import Folder
from data.pictures import write_png
from evaluation.costs import inputs, seconds, sizes_and_work
from evaluation.metrics import Networks, Reference
from evaluation.protocol import EvaluationSet, measured
from evaluation.report import figure, markdown
from unet import UNet
from weights import StableDiffusion, load_controlnet, load_stable_diffusion

TINY = Path(__file__).parent / "weights" / "tiny"
BASE, TEACHER = "base", "teacher"


def parse(argv: list[str] | None) -> Namespace:
    p = Parser(__doc__)
    p.add_argument("--controlnet", type=Path, nargs="+", help="ControlNet or student files to measure (default: the students in weights/tiny/students)")
    p.add_argument("--checkpoint", type=Path, default=TINY / "sd.safetensors", help="Stable Diffusion in one file (default: the tiny model)")
    p.add_argument("--prediction", choices=["noise", "v"], help="what the checkpoint predicts; v: SD 2.1 at 768 (default: what the file says, else noise)")
    p.add_argument("--teacher", default=str(TINY / "controlnet.safetensors"), help="teacher ControlNet; none = leave it out (default: the tiny teacher)")
    p.add_argument("--data", default="generated", help="folder with prompt.json or metadata.jsonl, as for train.py (default: generated, held-out circles)")
    p.add_argument("--canny", action="store_true", help="make the conditions of --data on the fly, the pictures' Canny edges")
    p.add_argument("--annotator", help="what made the conditions of --data: canny, or a name of controlnet_aux; the pictures are asked for theirs again")
    p.add_argument("--images", type=positive, default=128, help="pictures a setting and seed (default: 128)")
    p.add_argument("--seeds", type=non_negative, nargs="+", default=[0, 1], help="of the initial noise; the spread is over them (default: 0 1)")
    p.add_argument("--resolution", type=positive, help="side of the pictures, divisible by 8 (default: the checkpoint's)")
    p.add_argument("--steps", type=positive, default=20, help="DDIM steps (default: 20)")
    p.add_argument("--inception", type=Path, help="weights of FID's Inception network, torch-fidelity's file (default: fetched)")
    p.add_argument("--lpips", type=Path, help="weights of LPIPS's AlexNet, torchvision's file (default: fetched)")
    p.add_argument("--out", type=Path, default=Path("runs/evaluation"), help="folder for the results (default: runs/evaluation)")
    p.add_argument("--device", type=device, default="auto", help="auto, cpu or cuda (default: auto, CUDA where there is one)")
    args = p.parse_args(argv)
    if args.images < 2:
        p.error("expected at least 2 --images, one has no distribution")
    if args.data == "generated" and (args.canny or args.annotator):
        p.error("--canny and --annotator need --data, a folder of pictures")
    if args.canny and args.annotator not in (None, "canny"):
        p.error("--canny says that the annotator is canny")
    args.annotator = "canny" if args.canny else args.annotator
    if args.controlnet is None:
        args.controlnet = sorted((TINY / "students").glob("*.safetensors"))
    return args


def named(files: list[Path]) -> dict[str, Path]:
    """Short names: the file's own, or its folder's where train.py named the file; the whole path where two would be the same."""
    short = [file.parent.name if file.stem.startswith("controlnet") and file.parent.name else file.stem for file in files]
    return {name if short.count(name) == 1 and name not in (BASE, TEACHER) else str(file): file for name, file in zip(short, files, strict=True)}


def costs(sd: StableDiffusion, net: ControlNet, size: int, where: torch.device) -> dict[str, float]:
    """Sizes and work, counted, and the time of a guided step, measured."""
    with torch.device("meta"):
        row: dict[str, float] = dict(sizes_and_work(UNet(sd.unet.config), deepcopy(net).to("meta"), size))
    x, condition, t, context = inputs(sd.unet, size, batch=2)
    step = controlled(sd.unet, [Control(net.for_inference(), condition)])
    with torch.no_grad():
        return row | {"seconds of a guided step": seconds(lambda: step(x, t, context), 5, where)}


def exam_of(args: Namespace, size: int) -> EvaluationSet:
    if args.data == "generated":
        circles = Circles(size, args.images, first=HELD_OUT)
        return EvaluationSet([circles[i] for i in range(args.images)], [circles.circle(i) for i in range(args.images)])
    folder = Folder(args.data, size, args.canny)
    if len(folder) < 2:
        raise ValueError(f"expected at least 2 pictures in {args.data}, found {len(folder)}")
    return EvaluationSet([folder[i] for i in range(min(args.images, len(folder)))], annotator=args.annotator)


def in_order(found: dict, networks: dict) -> dict:
    return {name: found[name] for name in networks if name in found}


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    sd = load_stable_diffusion(args.checkpoint, prediction=args.prediction).to(args.device)
    size = args.resolution or sd.resolution
    if size % 8:
        raise ValueError(f"expected a --resolution divisible by 8, got {size}")
    tune_cpu(size)
    files = {TEACHER: Path(args.teacher)} if args.teacher != "none" else {}
    files |= named(args.controlnet)
    networks = {BASE: None} | {name: load_controlnet(file, sd.unet) for name, file in files.items()}
    exam, judges = exam_of(args, size), Networks(args.inception, args.lpips, args.device)
    for name, reason in judges.missing.items():
        print(f"without {name}: {reason}", file=sys.stderr)

    truth, teacher = Reference(exam.truth, sd.vae, judges), {}
    protocol = {
        "data": "generated circles, held out" if args.data == "generated" else Path(args.data).name, "images": len(exam.truth), "size": size,
        "format": "8-bit RGB", "seeds": args.seeds, "steps": args.steps, "guidance": sd.guidance, "prediction": sd.prediction, "annotator": args.annotator,
        "references": "the same samples' true pictures, and the teacher's pictures with the right prompt",
        "base": {"file": args.checkpoint.name, "sha256": sha256(args.checkpoint)}, "missing": judges.missing, "device": args.device.type,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "torchmetrics", "torch-fidelity")},
    }  # fmt: skip
    rows, pictures = {}, {}
    for name in sorted(networks, key=lambda name: name != TEACHER):  # the teacher first, the others are compared with it
        net, told = networks[name], {"costs": {}}
        if net:
            net.to(args.device)
            told = {"file": files[name].name, "sha256": sha256(files[name]), "architecture": net.architecture, "costs": costs(sd, net, size, args.device)}
        row, pictures[name], right = measured(sd, net, exam, truth, teacher, seeds=args.seeds, steps=args.steps, name=name)
        rows[name] = told | row
        if name == TEACHER:
            teacher = {seed: Reference(those, sd.vae, judges) for seed, those in right.items()}
        results = json.loads(json.dumps({"protocol": protocol, "networks": in_order(rows, networks)}))  # what is shown is what is stored
        with atomic_write(args.out / "results.json") as temporary:
            temporary.write_text(json.dumps(results, indent=1) + "\n")
        if net:
            net.cpu()
    with atomic_write(args.out / "results.md") as temporary:
        temporary.write_text(markdown(results))
    write_png(args.out / "figure.png", figure(exam, in_order(pictures, networks)))
    print(markdown(results) + f"\n{args.out / 'results.md'}, results.json, figure.png")


if __name__ == "__main__":
    sys.exit(run(main))
