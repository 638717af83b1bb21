"""How many steps does a start from the teacher save? python -m benchmarks.starts

Distils every student with L_layer alone at equal steps, from fresh weights and from the teacher's,
on the same batches and noise, and measures L_layer on held-out circles as it falls. Seventeen rows,
one to two minutes each on one core; a finished row is kept in --out and not run again. """

import json
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import train
from common.cli import Parser, positive, run
from common.devices import tune_cpu
from common.files import atomic_write
from data.circles import HELD_OUT, Circles
from kd import STUDENTS, build_student
from kd.from_teacher import from_teacher
from training.batches import batches, collate
from training.cache import Cache
from training.step import Step
from weights import StableDiffusion, load_controlnet, load_stable_diffusion

CIRCLES, BATCH = 2000, 16  # trained on
SETTINGS = Namespace(drop_prompt=0.5, device="cpu")


def curve(sd: StableDiffusion, teacher: nn.Module, net: nn.Module, cache: tuple[Cache, Cache],
          steps: int, every: int) -> dict[int, float]:
    """Step -> L_layer on 64 held-out circles, while `net` learns from `teacher` with L_layer
    alone."""
    held_out, learner = Circles(sd.resolution, 64, first=HELD_OUT), Step(sd.unet, net, teacher)
    exam = collate([held_out[i] for i in range(64)])
    data, generator, losses = batches(
        Circles(sd.resolution, CIRCLES), BATCH, seed=0), torch.Generator().manual_seed(1), {}
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
    for step in range(steps + 1):
        if step % every == 0:
            with torch.no_grad():
                found, _ = learner(
                    *train.drawn(SETTINGS, sd, exam, *cache,
                                 torch.Generator().manual_seed(2)),
                    layer_only=True)
            losses[step] = round(found["L_layer"].item(), 4)
        if step == steps:
            break
        optimizer.zero_grad()
        found, _ = learner(
            *train.drawn(SETTINGS, sd, next(data), *cache, generator), layer_only=True)
        found["L_layer"].backward()
        optimizer.step()
    return losses


def networks(sd: StableDiffusion, teacher: nn.Module) -> dict[str, Callable[[], nn.Module]]:
    """Every student with every start that it has."""
    rows: dict[str, Callable[[], nn.Module]] = {}
    for name in STUDENTS:
        def fresh(name: str = name) -> nn.Module:
            return build_student(name, sd.unet, torch.Generator().manual_seed(0))

        rows[f"{name} random"] = fresh
        if name not in ("mlp", "lite"):
            rows[f"{name} teacher"] = lambda fresh=fresh: from_teacher(
                fresh(), teacher,
                torch.Generator().manual_seed(0))
            rows[f"{name} teacher, zero convolutions too"] = lambda fresh=fresh: from_teacher(
                fresh(), teacher,
                torch.Generator().manual_seed(0), True)
    return rows


def main(argv: list[str] | None = None) -> None:
    p = Parser(__doc__)
    p.add_argument("--steps", type=positive, default=150, help="steps a row (default: 150)")
    p.add_argument(
        "--every", type=positive, default=25, help="steps between measurements (default: 25)")
    p.add_argument(
        "--out",
        type=Path,
        default=Path("runs/starts.json"),
        help="the rows (default: runs/starts.json)")
    p.add_argument(
        "--only",
        nargs="+",
        default=[""],
        help="rows whose name begins with one of these words (default: all)")
    args = p.parse_args(argv)
    sd = load_stable_diffusion(train.TINY / "sd.safetensors")
    teacher = load_controlnet(train.TINY / "controlnet.safetensors", sd.unet)
    tune_cpu(sd.resolution)
    cache = train.caches(sd, None)
    stored = json.loads(args.out.read_text()) if args.out.exists() else {}
    # rows of other lengths are kept apart
    done = stored.setdefault(f"{args.steps} steps, measured every {args.every}", {})
    for name, make in networks(sd, teacher).items():
        if name.startswith(tuple(args.only)) and name not in done:
            done[name] = curve(sd, teacher, make().train(), cache, args.steps, args.every)
            with atomic_write(args.out) as temporary:
                temporary.write_text(json.dumps(stored, indent=1) + "\n")
        if name in done:
            print(
                f"{name:46}" + "".join(f"{step:>6}: {loss:.3f}"
                                       for step, loss in done[name].items()),
                flush=True)


if __name__ == "__main__":
    sys.exit(run(main))
