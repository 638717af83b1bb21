"""Measure control networks side by side: control fidelity, picture quality and cost.

    python evaluate.py                                    base, teacher and the shipped students
    python evaluate.py --controlnet runs/reduced_layer/controlnet.safetensors      your student
    python evaluate.py --checkpoint sd.safetensors --teacher canny.safetensors \\
        --controlnet student.safetensors --data DIR --canny

Writes results.json, results.md and figure.png into --out.
"""

import json
import os
import platform
import signal
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from time import sleep

from common.cli import (
    PROMPT_SETTINGS,
    Parser,
    add_base_options,
    answer,
    non_negative,
    picture_side,
    positive,
    prompt_conflict,
    run,
    sampling_given,
)
from weights import tiny

BASE, TEACHER, GENERATED = "base", "teacher", "generated"


def parse(argv: list[str] | None) -> Namespace:
    p = Parser(__doc__)
    add_base_options(p, tiny.SD)
    p.add_argument("--vae", type=Path, metavar="FILE", help="take the autoencoder (VAE) from here, "
                   "a file or diffusers' folder (default: the checkpoint's)")
    p.add_argument("--controlnet", type=Path, nargs="+",
                   help="ControlNet or student files (default: the tiny model's students)")
    p.add_argument("--teacher",
                   help="teacher ControlNet; none = leave it out (default: the tiny teacher)")
    p.add_argument("--data", default=GENERATED,
                   help="folder as for train.py (default: generated, held-out circles)")
    p.add_argument("--canny", action="store_true", help="compute --data's conditions: Canny edges")
    p.add_argument("--annotator", help="or what made them: canny, lines (the dark ones "
                   "of drawings), or a name of controlnet_aux")
    p.add_argument("--caption-column", help="of --data with the prompts, as for train.py")
    p.add_argument("--condition-resize", choices=["nearest", "lanczos"], help="as for train.py")
    p.add_argument("--skip-broken", action="store_true", help="leave out broken rows of --data")
    p.add_argument("--buckets", action="store_true", help="keep the aspect ratios of --data's "
                   "pictures, as train.py, and take those of the most frequent size")
    p.add_argument("--images", type=positive, default=128, help="for each setting (default: 128)")
    p.add_argument("--seeds", type=non_negative, nargs="+", default=[0, 1],
                   help="of the initial noise; the spread is over them (default: 0 1)")
    p.add_argument("--resolution", type=picture_side, help="in pixels (default: the checkpoint's)")
    p.add_argument("--prompt-setting", choices=PROMPT_SETTINGS,
                   help="measure with one of the ControlNet paper's prompts alone: none (empty), "
                        "default (a professional, detailed, high-quality image), automatic (BLIP's "
                        "caption of the true picture), user (the data's own) (default: five "
                        "settings of prompt and condition)")
    p.add_argument("--prompt-suffix", help='appended to all prompts but the empty one after ", ", '
                                           'such as "best quality, extremely detailed"')
    p.add_argument("--processes", type=positive, help="networks to measure at once, on one core "
                   "each (default: all cores for pictures of at most 64 x 64 on a CPU, else 1)")
    p.add_argument("--inception", type=Path, help="weights of FID's network (default: fetched)")
    p.add_argument("--lpips", type=Path, help="weights of LPIPS's AlexNet (default: fetched)")
    p.add_argument("--out", type=Path, default=Path("runs/evaluation"),
                   help="folder for the results (default: runs/evaluation)")
    args = p.parse_args(argv)
    if tiny.is_base(args.checkpoint):
        args.controlnet = args.controlnet or sorted(tiny.STUDENTS.glob("*.safetensors"))
        args.teacher = args.teacher or str(tiny.CONTROLNET)
    missing = [f"--{name}" for name in ("controlnet", "teacher") if not vars(args)[name]]
    if missing:
        p.error(f"this --checkpoint needs its own {' and '.join(missing)}; --teacher none measures "
                "without one")
    if args.data == GENERATED and (args.canny or args.annotator):
        p.error("--canny and --annotator need --data, a folder of pictures")
    if args.data == GENERATED and (args.caption_column or args.condition_resize
                                   or args.skip_broken or args.buckets):
        p.error("--caption-column, --condition-resize, --skip-broken and --buckets need --data")
    if problem := prompt_conflict(args.prompt_setting, args.prompt_suffix):
        p.error(problem)
    if args.canny and args.annotator not in (None, "canny"):
        p.error("with --canny the --annotator is canny")
    args.annotator = "canny" if args.canny else args.annotator
    from common.devices import device
    args.device = device(args.device)
    return args


if __name__ == "__main__":  # before PyTorch is imported
    answer(parse)

import torch
from torch import Tensor

from common.devices import tune
from common.files import atomic_write, sha256
from common.processes import in_processes
from controlnet import ControlNetwork
from controlnet.sampling import Control, controlled
from data.circles import Circles
from data.folder import Reading
from data.own import evaluation_data
from data.pictures import write_png
from evaluation.costs import dummy_inputs, median_seconds, sizes_and_work
from evaluation.metrics import MetricNetworks, Reference
from evaluation.protocol import EvaluationSet, bounds, evaluate_network
from evaluation.report import figure, markdown
from unet import UNet
from weights import StableDiffusion, load_controlnet, load_stable_diffusion


def network_names(files: list[Path]) -> dict[str, Path]:
    """Short names: the file's, or its folder's for a run; the whole path where it is not unique."""
    names = [file.parent.name if file.stem.startswith("controlnet") and file.parent.name
             else file.stem for file in files]
    taken = {BASE, TEACHER} | {name for name in names if names.count(name) > 1}
    return {str(file) if name in taken else name: file
            for name, file in zip(names, files, strict=True)}


def evaluation_set(args: Namespace, size: int) -> EvaluationSet:
    """The first held-out circles, or samples of a folder. Raises ValueError for less than two."""
    if args.data == GENERATED:
        dataset = Circles(size, args.images)
    else:
        reading = Reading(args.caption_column, args.condition_resize, args.skip_broken,
                          buckets=args.buckets)
        dataset = evaluation_data(Path(args.data), size, args.canny, args.annotator, reading)
    dataset = dataset.preview(args.images)
    if len(dataset) < 2:
        raise ValueError(f"expected at least 2 pictures, got {len(dataset)} from {args.data}"
                         f"{' of any one size' * args.buckets}")
    return EvaluationSet(dataset, args.prompt_setting, args.prompt_suffix)


def network_costs(sd: StableDiffusion, net: ControlNetwork, size: int) -> dict[str, float]:
    """Sizes and work, counted, and the time of a guided step, measured."""
    with torch.device("meta"):
        costs: dict = sizes_and_work(UNet(sd.unet.config), deepcopy(net).to("meta"), size)
    latents, condition, timesteps, context = dummy_inputs(sd.unet, size, batch=2)
    with torch.no_grad():
        control = Control(net.for_inference(), condition[:1]).encoded(latents)
        step = controlled(sd.unet, [control])
        costs["seconds of a guided step"] = median_seconds(
            lambda: step(latents, timesteps, context), 5, latents.device)
    return costs


class Bench:
    """All that a network is measured with. Each process has its own."""

    def __init__(self, args: Namespace, missing: Mapping[str, str] | None = None):
        """`missing`: metrics to do without."""
        self.args = args
        self.sd = load_stable_diffusion(args.checkpoint, given=sampling_given(args), vae=args.vae)
        self.sd.to(args.device)
        self.size = args.resolution or self.sd.resolution
        tune(self.size)
        self.files = {TEACHER: Path(args.teacher)} if args.teacher != "none" else {}
        self.files |= network_names(args.controlnet)
        self.samples = evaluation_set(args, self.size)
        self.metrics = MetricNetworks(args.inception, args.lpips, args.device, missing)
        self.truth = Reference(self.samples.truth, self.sd.vae, self.metrics)
        self.teacher: dict[int, Reference] = {}

    def compare_with(self, teacher: Mapping[int, Tensor]) -> None:
        """The teacher's pictures in the first setting, by seed: what others are compared with."""
        self.teacher = {seed: Reference(pictures, self.sd.vae, self.metrics)
                        for seed, pictures in teacher.items()}

    def load(self, name: str) -> ControlNetwork | None:
        if name == BASE:
            return None
        return load_controlnet(self.files[name], self.sd.unet).to(self.args.device)

    def costs(self, name: str) -> dict:
        """What is to be said of a network before it makes pictures."""
        net = self.load(name)
        if not net:
            return {"costs": {}}
        return {"file": self.files[name].name, "sha256": sha256(self.files[name]),
                "architecture": net.architecture, "costs": network_costs(self.sd, net, self.size)}

    def measure(self, name: str) -> tuple[dict, dict[int, dict[str, Tensor]]]:
        """Its measures and pictures: see `evaluate_network`."""
        return evaluate_network(self.sd, self.load(name), self.samples, self.truth, self.teacher,
                                seeds=self.args.seeds, name=name)


def begin(args: Namespace, missing: Mapping[str, str], teacher: Mapping[int, Tensor]) -> None:
    """In each of several processes, before its first network."""
    global bench
    # Ctrl-C: a network takes minutes, do not finish it. Until then the others are cancelled.
    signal.signal(signal.SIGINT, lambda *_: (sleep(0.5), os._exit(1)))
    sys.stderr = open(os.devnull, "w")  # what there is to say the main process says
    bench = Bench(args, missing)
    bench.compare_with(teacher)


def measure(name: str) -> tuple[dict, dict[int, dict[str, Tensor]]]:
    return bench.measure(name)


def measured(bench: Bench, names: Sequence[str], processes: int) -> Iterator[tuple]:
    """The measures and pictures of each network, as they are done."""
    if processes == 1:
        return map(bench.measure, names)
    teacher = {seed: reference.pictures for seed, reference in bench.teacher.items()}
    return in_processes(measure, names, processes, ["evaluate"],
                        partial(begin, bench.args, bench.metrics.missing, teacher))


def processes_for(args: Namespace, size: int) -> int:
    """How many networks are measured at once if --processes does not say it: one a core where a
    single thread is used and there is enough to do for another process to be worth its start."""
    many = args.device.type == "cpu" and size <= 64 and args.images >= 32
    return os.cpu_count() if many else 1


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    bench = Bench(args)
    sd, samples, metrics = bench.sd, bench.samples, bench.metrics
    for metric, reason in metrics.missing.items():
        print(f"without {metric}: {reason}", file=sys.stderr)
    versions = {name: version(name) for name in ("torch", "torchmetrics", "torch-fidelity")}
    protocol = {
        "data": "generated circles, held out" if args.data == GENERATED else Path(args.data).name,
        "images": len(samples.truth), "size": bench.size, "format": "8-bit RGB",
        "seeds": args.seeds, **asdict(sd.sampling),
        "annotator": args.annotator, "references": "the same samples' true pictures, and the "
        f"teacher's pictures with the {samples.settings[0]}",
        "base": {"file": args.checkpoint.name, "sha256": sha256(args.checkpoint)},
        "missing": metrics.missing, "device": args.device.type,
        "versions": {"python": platform.python_version()} | versions}
    if args.vae:
        protocol["vae"] = {"file": args.vae.name, "sha256": sha256(args.vae)}
    if args.buckets:
        protocol["height"], protocol["width"] = samples.truth.shape[-2:]

    protocol |= {name: value for name, value in (
        ("prompt_setting", args.prompt_setting), ("prompt_suffix", args.prompt_suffix)) if value}
    limits = bounds(sd.vae, samples, bench.truth)
    names = [BASE, *bench.files]
    rows = {name: bench.costs(name) for name in names}  # its times while nothing else runs
    pictures = {}

    def store(name: str, measures: dict, sampled: dict[int, dict[str, Tensor]]) -> None:
        rows[name] |= measures
        pictures[name] = sampled[args.seeds[0]]
        done = {name: rows[name] for name in names if name in pictures}
        results.update({"protocol": protocol, "bounds": limits, "networks": done})
        with atomic_write(args.out / "results.json") as temporary:
            temporary.write_text(json.dumps(results, indent=1) + "\n")
        print(f"measured {name}, {len(done)} of {len(names)}", file=sys.stderr)

    results: dict = {}
    # The teacher comes first: the others are compared with its pictures.
    if TEACHER in names:
        measures, sampled = bench.measure(TEACHER)
        bench.compare_with({seed: by_setting[samples.settings[0]]
                            for seed, by_setting in sampled.items()})
        store(TEACHER, measures, sampled)
    others = [name for name in names if name != TEACHER]
    processes = min(args.processes or processes_for(args, bench.size), len(others))
    for name, found in zip(others, measured(bench, others, processes), strict=True):
        store(name, *found)
    tables = markdown(results)
    with atomic_write(args.out / "results.md") as temporary:
        temporary.write_text(tables)
    write_png(args.out / "figure.png", figure(samples, {name: pictures[name] for name in names}))
    print(f"{tables}\n{args.out / 'results.md'}, results.json, figure.png")


if __name__ == "__main__":
    sys.exit(run(main))
