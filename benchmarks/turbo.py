"""How few steps does a picture need? python -m benchmarks.turbo

The tiny Turbo at 1, 2, 4 and 20 steps under four control networks: the ControlNet of the base that
it was made from, unchanged; one that was trained on it; two of its students. Beside them the base
itself under its own ControlNet, at 20 guided steps. Control fidelity on held-out circles, and the
milliseconds of a single picture, from noise to pixels. Writes --out, a grid of pictures beside it,
and prints the table.
"""

import json
import sys
from argparse import Namespace
from pathlib import Path
from statistics import median
from time import perf_counter

from common.cli import Parser, answer, positive, run


def parse(argv: list[str] | None) -> Namespace:
    p = Parser(__doc__)
    p.add_argument("--images", type=positive, default=256,
                   help="held-out circles a network is measured on (default: 256)")
    p.add_argument("--repeats", type=positive, default=9,
                   help="pictures a time is the median of (default: 9)")
    p.add_argument("--out", type=Path, default=Path("runs/turbo.json"),
                   help="the results (default: runs/turbo.json)")
    return p.parse_args(argv)


if __name__ == "__main__":  # before PyTorch is imported
    answer(parse)

import torch
from PIL import Image
from torch.utils.data import default_collate

from common.devices import tune
from common.files import atomic_write
from controlnet import ControlNetwork
from controlnet.sampling import Control, sample_picture, sample_pictures
from data.circles import HELD_OUT, Circles
from data.grids import grid
from data.pictures import write_png
from evaluation.fidelity import control_fidelity
from evaluation.report import table
from weights import StableDiffusion, load_controlnet, load_stable_diffusion, tiny

STEPS = (1, 2, 4, 20)
SHOWN = 5  # circles in the grid
BASE = "the base, its ControlNet"
NETWORKS = {
    "the base's ControlNet, unchanged": tiny.CONTROLNET,
    "ControlNet trained on it": tiny.TURBO_CONTROLNET,
    "reduced_layer": tiny.TURBO_STUDENTS / "reduced_layer.safetensors",
    "lite": tiny.TURBO_STUDENTS / "lite.safetensors",
}


def milliseconds(sides: dict[str, tuple[StableDiffusion, ControlNetwork]],
                 repeats: int) -> dict[str, float]:
    """The median time of a picture on each side. The sides take turns, so that what else the
    machine does is shared by all."""
    condition = Circles(64, 1, first=HELD_OUT)[0]["condition"][None]
    times = {name: [] for name in sides}
    for _ in range(repeats + 1):
        for name, (sd, net) in sides.items():
            context, negative = sd.text.encode(["red circle"]), sd.text.encode([""])
            before = perf_counter()
            sample_picture(sd, [Control(net, condition)], 64, 64, context, negative, seed=0)
            times[name].append(1000 * (perf_counter() - before))
    return {name: median(values[1:]) for name, values in times.items()}  # the first warms up


def as_table(results: dict) -> str:
    """Results as Markdown: a row for each network and number of steps."""
    reference = results["rows"][BASE]
    rows = [[name, f"{row['overlap']:.3f}", f"{row['overlap'] / reference['overlap']:.1%}",
             f"{row['color_error']:.1f}", f"{row['ms']:.0f}", f"{reference['ms'] / row['ms']:.1f}"]
            for name, row in results["rows"].items()]
    head = ["network, steps", "overlap", "of the base's", "colour error", "ms a picture",
            "times as fast"]
    return "\n".join(table(head, rows)) + "\n"


def pictures(sides: dict[str, tuple[StableDiffusion, ControlNetwork]]) -> Image.Image:
    """The same circles on the base and, in few steps, on Turbo."""
    samples = default_collate([Circles(64, SHOWN, first=HELD_OUT)[i] for i in range(SHOWN)])
    columns = {"condition": samples["condition"]}
    for name, (sd, net) in sides.items():
        if not name.endswith(" 20"):
            title = name.replace("the base's ControlNet, ", "").replace("ControlNet ", "")
            columns[title] = sample_pictures(sd, net, samples["condition"], samples["prompt"],
                                             seed=0, name=name)
    return grid(list(columns), [list(row) for row in zip(*columns.values(), strict=True)])


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    base, turbo = load_stable_diffusion(tiny.SD), load_stable_diffusion(tiny.TURBO)
    tune(base.resolution)
    circles = Circles(base.resolution, args.images, first=HELD_OUT)
    sides = {BASE: (base, load_controlnet(tiny.CONTROLNET, base.unet))}
    for name, file in NETWORKS.items():
        net = load_controlnet(file, turbo.unet).for_inference()
        sides |= {f"{name}, {steps}": (turbo.sampled(steps), net) for steps in STEPS}
    times = milliseconds(sides, args.repeats)
    rows = {name: control_fidelity(sd, net, circles, name=name) | {"ms": times[name]}
            for name, (sd, net) in sides.items()}
    write_png(args.out.with_suffix(".png"), pictures(sides))
    results = {"images": args.images, "threads": torch.get_num_threads(), "rows": rows}
    with atomic_write(args.out) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n")
    print(as_table(results))


if __name__ == "__main__":
    sys.exit(run(main))
