"""Does distillation work? Every student with and without its teacher, at equal images.

    python -m benchmarks.distillation                     on circles
    python -m benchmarks.distillation --data drawings     on drawings

The variants are described in `benchmarks/distillation_recipes.py`. 25 trainings per seed of 3 to
19 minutes each on one core of an AMD EPYC, 4 hours per seed. A finished training is not run again
and an interrupted one is continued; several processes may share --out with different rows (--only).
Ends in results.json, results.md, two plots and, in best/, the best network of each student in
float16, of all rows that are there.
"""

import json
import shutil
import sys
from argparse import Namespace
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median

from benchmarks.distillation_recipes import (
    CIRCLES,
    DRAWINGS,
    INJECTED,
    Experiment,
    Key,
    arguments,
    keys,
    name_of,
)
from common.cli import Parser, answer, non_negative, positive, run

EXPERIMENTS = {"circles": CIRCLES, "drawings": DRAWINGS}


def parse(argv: list[str] | None) -> Namespace:
    p = Parser(__doc__)
    p.add_argument("--data", choices=EXPERIMENTS, default="circles", help="(default: circles)")
    p.add_argument("--images", type=positive, help="pictures that a training sees (default: "
                   f"{CIRCLES.images}; of drawings {DRAWINGS.images})")
    p.add_argument("--seeds", type=non_negative, nargs="+", default=[0, 1],
                   help="one training of every row each (default: 0 1)")
    p.add_argument("--pictures", type=positive, help="held-out ones that a row is measured on "
                   f"(default: {CIRCLES.pictures}; of drawings {DRAWINGS.pictures}, all)")
    p.add_argument("--only", nargs="+", default=[""],
                   help="train only rows whose name, such as alone-loha-0, begins with one of "
                        "these words (default: all)")
    p.add_argument("--drawings", type=positive, help="train on so many of the drawings, as if "
                   "there were no more (default: on all)")
    p.add_argument("--out", type=Path, help="folder of the runs, the table and the plots (default: "
                   f"{CIRCLES.out}, {DRAWINGS.out})")
    args = p.parse_args(argv)
    given_out = args.out
    default = EXPERIMENTS[args.data]
    for name in ("images", "pictures", "out"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(default, name))
    if args.drawings and not given_out:
        args.out = args.out.with_name(f"{args.out.name}_{args.drawings}")
    if args.drawings and not default.data:
        p.error("--drawings needs --data drawings")
    least = default.batch_size * default.points
    if args.images < least:
        p.error(f"expected at least {least} --images, got {args.images}")
    return args


if __name__ == "__main__":  # before PyTorch is imported
    answer(parse)

import torch

import train
from benchmarks.distillation_results import (
    BASE,
    TEACHER,
    Row,
    markdown,
    plot_curves,
    plot_sizes,
)
from common.devices import tune
from common.files import atomic_write
from controlnet import ControlNetwork
from data.circles import HELD_OUT, Circles
from data.own import evaluation_data
from evaluation.fidelity import control_fidelity
from kd import STUDENTS
from weights import StableDiffusion, load_controlnet, load_stable_diffusion, save_controlnet
from weights.files import read_tensors

MINUTES = 10  # a training of 48,000 images on one core of an AMD EPYC
NETWORK = "controlnet.safetensors"


def first_drawings(data: Path, count: int, folder: Path) -> Path:
    """A copy of a folder of drawings in `folder`, with only the first `count` to train on."""
    if not folder.exists():
        unfinished = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(data / "held_out", unfinished / "held_out")
        index = (data / "train" / "metadata.jsonl").read_text(encoding="utf-8")
        lines = index.splitlines(keepends=True)[:count]
        for line in lines:
            entry = json.loads(line)
            for name in (entry["file_name"], entry["conditioning_image"]):
                copy = unfinished / "train" / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(data / "train" / name, copy)
        (unfinished / "train" / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
        unfinished.rename(folder)
    return folder


# --- One row ---


def train_network(key: Key, experiment: Experiment, folder: Path) -> None:
    """Run a training, or what is left of one. Raises KeyboardInterrupt if a signal stops it.

    `layers` and `distilled` begin with the same steps, which are trained once and then copied.
    """
    variant, student, seed = key
    if variant in ("layers", "distilled") and student != INJECTED and not folder.exists():
        trunk = experiment.out / f"trunk-{student}-{seed}"
        finish_run(arguments(("distilled", student, seed), experiment, shared=True), trunk)
        unfinished = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(trunk, unfinished)
        unfinished.rename(folder)
    finish_run(arguments(key, experiment), folder)


def finish_run(options: list[str], folder: Path) -> None:
    steps = options[options.index("--steps") + 1]
    file = folder / NETWORK
    if file.exists() and read_tensors(file)[1]["step"] == steps:
        return
    if (folder / "state" / "state.pt").exists():
        options = [*options, "--resume"]
    train.main([*options, "--out", str(folder)])
    if read_tensors(file)[1]["step"] != steps:
        raise KeyboardInterrupt


def learning_curve(folder: Path, batch_size: int, measure: str) -> dict[str, list[float]]:
    """Images seen, seconds of training and control fidelity at every measurement in a run's log.

    The seconds leave out measuring and saving: a step counts twice the median of the hundred around
    it at most.
    """
    lines = (folder / "log.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    durations = [later["seconds"] - earlier["seconds"] for earlier, later in pairwise(entries)]
    curve = {"images": [], "seconds": [], measure: []}
    seconds = 0.0
    for i, entry in enumerate(entries):
        nearby = durations[max(0, i - 50) : i + 50]
        # The first step's duration is not in the log: that of the second stands for it.
        seconds += min(durations[i - 1] if i else nearby[0], 2 * median(nearby))
        if measure in entry:
            curve["images"].append(entry["step"] * batch_size)
            curve["seconds"].append(round(seconds, 1))
            curve[measure].append(round(entry[measure], 4))
    return curve


def measure(sd: StableDiffusion, net: ControlNetwork | None, experiment: Experiment) -> Row:
    """Control fidelity on held-out pictures: with the right and with the empty prompt, and as it is
    measured along a training."""
    held_out = Circles(sd.resolution, experiment.pictures, first=HELD_OUT)
    if experiment.data:
        held_out = evaluation_data(experiment.data, sd.resolution).preview(experiment.pictures)
    return {
        "pictures": experiment.pictures,
        "parameters": sum(p.numel() for p in net.parameters()) if net else 0,
        "right prompt": control_fidelity(sd, net, held_out),
        "empty prompt": control_fidelity(sd, net, held_out, prompts=False),
        "along a training": control_fidelity(
            sd.sampled(experiment.point_steps), net, held_out.preview(experiment.point_pictures)),
    }


def stored_row(file: Path, pictures: int) -> Row | None:
    """The row in a file, if it is there and was measured on as many pictures."""
    row = json.loads(file.read_text()) if file.exists() else None
    return row if row and row["pictures"] == pictures else None


def make_row(sd: StableDiffusion, network: Path | None, file: Path, experiment: Experiment) -> Row:
    """Measure a network file (None: the base alone) and store its row."""
    row = measure(sd, load_controlnet(network, sd.unet) if network else None, experiment)
    if (file.parent / "log.jsonl").exists():
        row["curve"] = learning_curve(file.parent, experiment.batch_size, experiment.measure)
    write_text(file, json.dumps(row, indent=1) + "\n")
    return row


# --- All rows ---


def run_experiment(experiment: Experiment, seeds: list[int], only: list[str]) -> dict:
    """Make the rows whose names begin with one of `only`, and return the results of all that are
    there: in --out's folders, or in its results.json, maybe from another machine."""
    out, pictures = experiment.out, experiment.pictures
    sd = load_stable_diffusion(experiment.checkpoint)
    tune(sd.resolution)
    results = {"images": experiment.images, "pictures": pictures, "others": {}, "rows": {}}
    for name, network in ((BASE, None), (TEACHER, experiment.teacher)):
        file = out / f"{name}.json"
        results["others"][name] = stored_row(file, pictures) or make_row(
            sd, network, file, experiment)
    if (out / "results.json").exists():
        earlier = json.loads((out / "results.json").read_text())
        if (earlier["images"], earlier["pictures"]) == (experiment.images, pictures):
            results["rows"] = earlier["rows"]

    by_name = {name_of(key): key for key in keys(seeds)}
    finished = [name for name in by_name if (out / name / "result.json").exists()]
    missing = [name for name in by_name if name.startswith(tuple(only))
               and name not in finished and name not in results["rows"]]
    hours = MINUTES / 60 * len(missing) * experiment.images / 48_000
    print(f"{len(missing)} rows to make, about {hours:.1f} h on one core", flush=True)
    for name, key in by_name.items():
        if name in finished or name in missing:
            folder = out / name
            if stored_row(folder / "result.json", pictures) is None:
                train_network(key, experiment, folder)
                make_row(sd, folder / NETWORK, folder / "result.json", experiment)
    # Read again: another process may have made rows in the meantime.
    for name in by_name:
        if row := stored_row(out / name / "result.json", pictures):
            results["rows"][name] = row
    write_results(results, experiment, sd)
    return results


def write_results(results: dict, experiment: Experiment, sd: StableDiffusion) -> None:
    """results.json, the table, the plots, and the best of each student's networks that are here."""
    out = experiment.out
    write_text(out / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(out / "results.md", markdown(results, experiment))
    for name, figure in (("curves", plot_curves(results, experiment)),
                         ("sizes", plot_sizes(results, experiment))):
        with atomic_write(out / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=100, metadata={"Software": None})
    for student in STUDENTS:
        names = [name for name in results["rows"]
                 if f"-{student}-" in name and (out / name / NETWORK).exists()]
        if names:
            reached = {name: results["rows"][name]["right prompt"] for name in names}
            best = max(names, key=lambda name: reached[name][experiment.measure])
            save_controlnet(
                out / "best" / f"{student}.safetensors",
                load_controlnet(out / best / NETWORK, sd.unet), base=experiment.checkpoint.name,
                step=experiment.steps, dtype=torch.float16)


def write_text(file: Path, text: str) -> None:
    with atomic_write(file) as temporary:
        temporary.write_text(text)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    experiment = replace(EXPERIMENTS[args.data], out=args.out, images=args.images,
                         pictures=args.pictures)
    if args.drawings:
        experiment = replace(experiment, data=first_drawings(
            experiment.data, args.drawings, args.out / f"{args.drawings}_drawings"))
    results = run_experiment(experiment, args.seeds, args.only)
    print("\n" + markdown(results, experiment))


if __name__ == "__main__":
    sys.exit(run(main))
