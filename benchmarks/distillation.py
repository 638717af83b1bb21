"""Does distillation work? Every student with and without its teacher, at equal images: python -m
benchmarks.distillation --out runs/distillation

Variants, each of --images pictures (48,000 by default, the papers' number) in batches of 16, from
fresh weights:

    alone      L_d only: no teacher layers     L_layer only: teacher's and student's control
    networks alone, no UNet distilled  L_layer for three quarters of the steps, then all three
    losses; mlp, which cannot make its teacher's layers: L_d and L_td from the start started    the
    same as distilled from the teacher's weights, for students that can take them and are not the
    teacher's equal

Budget: 25 trainings a seed, 3 to 19 minutes each on one core of an AMD EPYC, 4 hours a seed. A
training that has finished is not run again, one that was interrupted is continued, and several
processes may share --out with different rows (--only), so the command can be repeated, stopped and
split at will. `layers` and `distilled` are the same until the last quarter (but mlp's), and trained
once until there. Ends in results.json, a table, two plots and, in best/, the best network of each
student in float16, of all rows that are there. """

import json
import shutil
import sys
from argparse import Namespace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, stdev

import torch
from matplotlib.figure import Figure

import train
from common.cli import Parser, non_negative, positive, run
from common.devices import tune_cpu
from common.files import atomic_write
from evaluation.fidelity import control_fidelity
from evaluation.report import spread, table
from kd import STUDENTS
from weights import load_controlnet, load_stable_diffusion, save_controlnet
from weights.files import read_tensors

VARIANTS = ("alone", "layers", "distilled", "started")
FRESH_ONLY = ("mlp", "lite")  # nothing of the teacher fits them, and alone they want the lower rate
# the teacher's own architecture; diverges at the others' rate when L_d and L_td join
LARGEST = "original"
BATCH = 16                    # pictures a step
# measurements along a training, each of WATCHED circles in WATCHED_STEPS DDIM steps
POINTS = 30
WATCHED, WATCHED_STEPS = 32, 10
MINUTES = 10                  # a row of 48,000 images on one core of an AMD EPYC
# three to four times the usual gradient of L_d: without it `modulated`, seed 1, diverges at 2e-3
CLIP = "0.1"
# enters the SD encoder, and cannot make its teacher's layers: L_layer spoils it
INJECTED = "mlp"
LOWEST = 0.75                 # overlap that the chart of the sizes shows
BASE, TEACHER = "base", "teacher"

Key = tuple[str, str, int]  # variant, student, seed


def keys(seeds: list[int]) -> list[Key]:
    """Every row of the experiment, the smallest students first."""
    return [(v, s, seed) for seed in seeds for s in reversed(STUDENTS) for v in VARIANTS
            if v != "started" or s not in (*FRESH_ONLY, LARGEST)]


def recipe(variant: str, student: str, steps: int) -> list[str]:
    """What is trained on, at which rate: the README says what was tried. L_layer keeps a tenth of
    the weight when the others count, lest it hold back a student that cannot have the teacher's
    layers."""
    first, rate = str(steps * 3 // 4), "1e-3" if student == LARGEST else "2e-3"
    if variant == "alone":
        return [
            "--teacher", "none",
            *(["--lr", "1e-3"] if student in FRESH_ONLY else ["--lr", "2e-3", "--clip", CLIP])
        ]
    if variant == "layers":
        return ["--layer-only-steps", str(steps), "--lr", rate]
    if student == INJECTED:
        return ["--layer-only-steps", "0", "--loss-layer", "0", "--lr", "1e-3"]
    init = "teacher" if variant == "started" else "random"
    return [
        "--layer-only-steps", first, "--loss-d", "10", "--loss-td", "10", "--lr", rate, "--init",
        init
    ]


def settings(key: Key, images: int, out: Path, trunk: bool = False) -> list[str]:
    """The command line of a training. The learning rate falls to zero over the last fifth in all of
    them. `trunk`: its first three quarters."""
    variant, student, seed = key
    steps = images // BATCH
    every = str(max(1, steps // POINTS))
    lengths = ["--steps", str(steps * 3 // 4)] if trunk else [
        "--steps", str(steps), "--decay", str(steps // 5)
    ]
    lengths += ["--batch-size", str(BATCH), "--save-every", every, "--sample-every", every]
    return [
        "--student", student, *recipe(variant, student, steps), *lengths, "--seed",
        str(seed), "--cache",
        str(out / "cache")
    ]


def trained(key: Key, images: int, out: Path) -> Path:
    """Run a training, or the rest of one that was interrupted; returns its folder. Raises
    KeyboardInterrupt if it was asked to stop."""
    folder = out / "-".join(map(str, key))
    if key[0] in ("layers", "distilled") and key[1] != INJECTED and not folder.exists():
        trunk = out / "-".join(("trunk", *map(str, key[1:])))
        go(settings(("distilled", *key[1:]), images, out, trunk=True), trunk)
        unfinished = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(trunk, unfinished)
        unfinished.rename(folder)
    go(settings(key, images, out), folder)
    return folder


def go(arguments: list[str], folder: Path) -> None:
    steps, file = arguments[arguments.index("--steps") + 1], folder / "controlnet.safetensors"
    if not file.exists() or read_tensors(file)[1]["step"] != steps:
        train.main([
            *arguments, "--out",
            str(folder), *["--resume"][:(folder / "state" / "state.pt").exists()]
        ])
        if read_tensors(file)[1]["step"] != steps:
            raise KeyboardInterrupt


def curve(folder: Path) -> dict[str, list[float]]:
    """Images seen, seconds of training (without those of measuring and saving) and overlap at every
    measurement."""
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    took = [b["seconds"] - a["seconds"] for a, b in pairwise(entries)]
    found, spent = {"images": [], "seconds": [], "overlap": []}, 0.0
    for i, entry in enumerate(entries):
        window = took[max(0, i - 50) : i + 50]
        spent += min(took[i - 1] if i else window[0], 2 * median(window))
        if "overlap" in entry:
            for name, value in (("images", entry["step"] * BATCH), ("seconds", round(
                    spent, 1)), ("overlap", round(entry["overlap"], 4))):
                found[name].append(value)
    return found


def measured(sd, net, circles: int) -> dict[str, dict[str, float]]:
    """Control fidelity on held-out circles with the right and with the empty prompt, and as it is
    measured along a training."""
    return {
        "right prompt":
        control_fidelity(sd, net, count=circles, size=sd.resolution),
        "empty prompt":
        control_fidelity(sd, net, count=circles, size=sd.resolution, prompts=False),
        "along a training":
        control_fidelity(sd, net, count=WATCHED, size=sd.resolution, steps=WATCHED_STEPS),
    }


def row(sd, file: Path, path: Path | None, circles: int, make=lambda: None) -> dict:
    """One row, from `file` if it is there: the measurements of the network in `path` (None: of the
    base alone), after `make` has made it."""
    if file.exists() and (found := json.loads(file.read_text()))["circles"] == circles:
        return found
    make()
    net = load_controlnet(path, sd.unet) if path else None
    found = {
        "circles": circles, "parameters": sum(p.numel() for p in net.parameters()) if net else 0,
        **measured(sd, net, circles)
    }
    with atomic_write(file) as temporary:
        temporary.write_text(
            json.dumps(
                found
                | ({"curve": curve(file.parent)} if (file.parent / "log.jsonl").exists() else {}),
                indent=1) + "\n")
    return json.loads(file.read_text())


# --- What comes of it: a table, two plots, the best networks ---


def reached(found: dict, overlap: float) -> tuple[float, float] | None:
    """Images and seconds after which a training first has this overlap; None if never."""
    points = zip(*found["curve"].values(), strict=True)
    return next(((images, seconds) for images, seconds, value in points if value >= overlap), None)


def grouped(rows: dict[str, dict]) -> dict[tuple[str, str], list[dict]]:
    """(student, variant) -> one row a seed, in the order of STUDENTS and VARIANTS."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for student in STUDENTS:
        for variant in VARIANTS:
            if found := [
                    row for name, row in rows.items() if name.startswith(f"{variant}-{student}-")
            ]:
                groups[student, variant] = found
    return groups


def markdown(results: dict) -> str:
    """Mean and standard deviation over the seeds that are there, and where 90 % of the teacher's
    overlap was first reached."""
    others, goal = results[
        "others"], 0.9 * results["others"][TEACHER]["along a training"]["overlap"]
    head = [
        "", "trained", "parameters, M", "seeds", "overlap", "of the teacher's", "colour error",
        "empty prompt"
    ]
    head += [f"images to {goal:.2f}", f"seconds to {goal:.2f}"]
    lines = [
        f"{results['images']:,} pictures a training in batches of {BATCH}; overlap and colour error on {results['circles']} held-out circles, mean ± "
        "standard deviation over seeds. The last two columns: when a training first had 90 % of the teacher's overlap, both measured on "
        f"{WATCHED} circles with {WATCHED_STEPS} steps.",
        "",
    ]
    whole, cells = others[TEACHER]["right prompt"]["overlap"], []
    for (student, variant), group in ({(name, ""): [found]
                                       for name, found in others.items()}
                                      | grouped(results["rows"])).items():
        right, empty = (
            spread([found[prompt]["overlap"] for found in group])
            for prompt in ("right prompt", "empty prompt"))
        of_teacher = f"{mean(found['right prompt']['overlap'] for found in group) / whole:.1%}"
        error = f"{mean(found['right prompt']['color_error'] for found in group):.1f}"
        times = [reached(found, goal) for found in group if "curve" in found]
        when = ["-", "-"] if not times else ["never", "never"] if None in times else [
            f"{mean(t[i] for t in times):,.0f}" for i in (0, 1)
        ]
        size = f"{group[0]['parameters'] / 1e6:.2f}" if group[0]["parameters"] else "-"
        cells.append([
            student, variant, size,
            str(len(group)) if variant else "-", right, of_teacher, error, empty, *when
        ])
    return "\n".join([*lines, *table(head, cells)]) + "\n"


def curves(results: dict) -> Figure:
    """Fidelity against images seen, a panel a student and a colour a variant, a line a seed."""
    groups = grouped(results["rows"])
    students = [student for student in STUDENTS if any(student == key[0] for key in groups)]
    figure = Figure(figsize=(12, 2.6 * -(-len(students) // 4)), layout="constrained")
    panels = figure.subplots(
        -(-len(students) // 4), 4, squeeze=False, sharex=True, sharey=True).flatten()
    for axes, student in zip(panels[: len(students)], students, strict=True):
        for i, variant in enumerate(VARIANTS):
            for found in groups.get((student, variant), []):
                axes.plot(
                    found["curve"]["images"], found["curve"]["overlap"], color=f"C{i}", linewidth=1)
        axes.axhline(
            results["others"][TEACHER]["along a training"]["overlap"],
            color="black",
            linewidth=0.7,
            linestyle=":")
        axes.set_title(f"{student}", fontsize=9)
        axes.set_ylim(0.3, 1)
        axes.tick_params(labelsize=7, labelbottom=True, labelleft=True)
        axes.set_xlabel("images seen", fontsize=7)
        axes.set_ylabel("overlap", fontsize=7)
    for axes in panels[len(students) :]:
        axes.remove()
    legend(figure, panels[0], groups)
    return figure


def sizes(results: dict) -> Figure:
    """Fidelity against size at the end of training, a point a student, a colour a variant; bars:
    standard deviation over the seeds."""
    groups, figure = grouped(results["rows"]), Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (_, variant), group in groups.items():
        values = [found["right prompt"]["overlap"] for found in group]
        bar = stdev(values) if len(values) > 1 else 0
        axes.errorbar(
            group[0]["parameters"] / 1e6,
            mean(values),
            bar,
            fmt="o",
            markersize=4,
            color=f"C{VARIANTS.index(variant)}")
    parameters = {student: group[0]["parameters"] / 1e6 for (student, _), group in groups.items()}
    # every other name below its points, lest those of equal size meet
    for i, student in enumerate(sorted(parameters, key=parameters.get)):
        overlaps = [
            found["right prompt"]["overlap"] for key, group in groups.items() if key[0] == student
            for found in group
        ]
        edge, side, align = (max(overlaps), 6,
                             "bottom") if i % 2 == 0 else (max(LOWEST, min(overlaps)), -6, "top")
        axes.annotate(
            student, (parameters[student], edge), (0, side),
            textcoords="offset points",
            ha="center",
            va=align,
            fontsize=7)
    axes.axhline(
        results["others"][TEACHER]["right prompt"]["overlap"],
        color="black",
        linewidth=0.7,
        linestyle=":")
    axes.set_xlabel("million parameters (dotted: the teacher's overlap)", fontsize=8)
    axes.set_xscale("log")
    axes.set_xticks(ticks := [0.25, 0.5, 1, 2, 4], [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.margins(0.1, 0.15)
    axes.set_ylim(bottom=LOWEST - 0.03)
    axes.set_ylabel("overlap with the right prompt", fontsize=8)
    axes.tick_params(labelsize=7)
    legend(figure, axes, groups)
    return figure


def legend(figure: Figure, axes, groups: dict) -> None:
    there = [variant for variant in VARIANTS if any(variant == key[1] for key in groups)]
    lines = [axes.plot([], [], color=f"C{VARIANTS.index(variant)}")[0] for variant in there]
    figure.legend(lines, there, loc="outside upper center", ncols=len(there), fontsize=8)


def write(results: dict, out: Path, sd) -> None:
    with atomic_write(out / "results.json") as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n")
    with atomic_write(out / "results.md") as temporary:
        temporary.write_text(markdown(results))
    for name, figure in (("curves", curves(results)), ("sizes", sizes(results))):
        with atomic_write(out / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=100, metadata={"Software": None})
    for student in STUDENTS:  # of those whose networks are here
        trained = [
            name for name in results["rows"]
            if f"-{student}-" in name and (out / name / "controlnet.safetensors").exists()
        ]
        if trained:
            best = max(trained, key=lambda name: results["rows"][name]["right prompt"]["overlap"])
            net = load_controlnet(out / best / "controlnet.safetensors", sd.unet)
            steps = results["images"] // BATCH
            save_controlnet(
                out / "best" / f"{student}.safetensors",
                net,
                base="sd.safetensors",
                step=steps,
                dtype=torch.float16)


def parse(argv: list[str] | None) -> Namespace:
    p = Parser(__doc__)
    p.add_argument(
        "--images",
        type=positive,
        default=48_000,
        help="pictures a training sees (default: 48,000)")
    p.add_argument(
        "--seeds",
        type=non_negative,
        nargs="+",
        default=[0, 1],
        help="one training of every row each (default: 0 1)")
    p.add_argument(
        "--circles",
        type=positive,
        default=256,
        help="held-out circles a row is measured on (default: 256)")
    p.add_argument(
        "--only",
        nargs="+",
        default=[""],
        help=
        "rows to train whose name, such as alone-loha-0, begins with one of these words (default: all)"
    )
    p.add_argument(
        "--out",
        type=Path,
        default=Path("runs/distillation"),
        help="folder of the runs, the table and the plots (default: runs/distillation)")
    args = p.parse_args(argv)
    if args.images < BATCH * POINTS:
        p.error(f"expected at least {BATCH * POINTS} --images, got {args.images}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    sd = load_stable_diffusion(train.TINY / "sd.safetensors")
    tune_cpu(sd.resolution)
    # the rows are measured below, and evaluate.py draws
    train.report = train.draw = lambda *_: None
    train.WATCHED, train.SAMPLE_STEPS = WATCHED, WATCHED_STEPS
    results: dict = {"images": args.images, "circles": args.circles, "others": {}, "rows": {}}
    results["others"][BASE] = row(sd, args.out / "base.json", None, args.circles)
    results["others"][TEACHER] = row(sd, args.out / "teacher.json",
                                     train.TINY / "controlnet.safetensors", args.circles)
    gathered = args.out / "results.json"  # rows of an earlier command, maybe on another machine
    known = json.loads(gathered.read_text()) if gathered.exists() else {}
    if (known.get("images"), known.get("circles")) == (args.images, args.circles):
        results["rows"] = known["rows"]
    names = {"-".join(map(str, key)): key for key in keys(args.seeds)}
    made = [name for name in names if (args.out / name / "result.json").exists()]
    to_make = [
        name for name in names
        if name.startswith(tuple(args.only)) and name not in made and name not in results["rows"]
    ]
    print(
        f"{len(to_make)} rows to make, about {MINUTES / 60 * len(to_make) * args.images / 48_000:.1f} h on one core",
        flush=True)
    for name, key in names.items():
        if name in made or name in to_make:
            network = args.out / name / "controlnet.safetensors"
            make = partial(trained, key, args.images, args.out)
            results["rows"][name] = row(sd, network.with_name("result.json"), network, args.circles,
                                        make)
    write(results, args.out, sd)
    print("\n" + markdown(results))


if __name__ == "__main__":
    sys.exit(run(main))
