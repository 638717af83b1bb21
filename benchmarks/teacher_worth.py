"""When is a teacher worth anything, and which recipe helps? python -m benchmarks.teacher_worth

Trainings on drawings beside those of `benchmarks.distillation --data drawings`, and measured like
them: with few drawings, with none but their line art (`benchmarks.teacher_pictures`), with other
forms of L_layer, and of the smallest students, longer or without L_layer. Five to twenty minutes
each on one core. A finished training is not run again and an interrupted one is continued; several
processes may share --out. Writes --out/results.json and prints the table.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

from common.cli import Parser, answer, non_negative, run

OUT = Path("runs/teacher_worth")


def parse(argv: list[str] | None) -> Namespace:
    p = Parser(__doc__)
    p.add_argument("--only", nargs="+", default=[""],
                   help="train only rows whose name begins with one of these words (default: all)")
    p.add_argument("--seeds", type=non_negative, nargs="+", default=[0],
                   help="one training of every row each (default: 0)")
    p.add_argument("--out", type=Path, default=OUT,
                   help=f"folder of the runs and the table (default: {OUT})")
    return p.parse_args(argv)


if __name__ == "__main__":  # before PyTorch is imported
    answer(parse)

import torch
from torch import Tensor

import kd.losses
from benchmarks.distillation import (
    NETWORK,
    finish_run,
    first_drawings,
    make_row,
    stored_row,
    write_text,
)
from benchmarks.distillation_recipes import DRAWINGS, arguments
from benchmarks.teacher_pictures import make_pictures
from common.devices import tune
from evaluation.report import spread, table
from weights import drawings, load_stable_diffusion

# --- Other forms of L_layer: functions in the place of kd.losses.layer_errors ---

Outputs = Sequence[Tensor]


def cosine_errors(student_out: Outputs, teacher_out: Outputs, teacher_variance: Outputs) -> Tensor:
    """(13,): one minus the cosine between the channels of the two outputs at each pixel. Directions
    alone count, so a student finds the outputs' sizes through the other losses."""
    errors = []
    for a_s, a_t in zip(student_out, teacher_out, strict=True):
        product = (a_s * a_t).sum(dim=1)
        t_square, s_square = a_t.square().sum(dim=1), a_s.square().sum(dim=1)
        # A student's outputs begin at zero, where a cosine has no gradient: hence 1 %.
        cosine = product * (t_square * (s_square + 0.01 * t_square) + 1e-8).rsqrt()
        errors.append(1 - cosine.mean())
    return torch.stack(errors)


def deep_errors(student_out: Outputs, teacher_out: Outputs, teacher_variance: Outputs) -> Tensor:
    """(13,): those of L_layer, weighted from 1/7 for the finest output to 13/7 for the middle."""
    errors = _layer_errors(student_out, teacher_out, teacher_variance)
    weights = torch.arange(1, len(errors) + 1)
    return errors * weights / weights.float().mean()


_layer_errors = kd.losses.layer_errors

# --- The trainings ---


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training: a row of the main experiment but for what is said here."""

    row: tuple[str, str]            # variant, student
    what: str                       # in words
    drawings: int | None = None     # train on so many, None: on all
    made: bool = False              # train on the pictures that the teacher made
    images: int = DRAWINGS.images   # that the training draws
    options: str = ""               # of train.py, beside those of the variant
    layer_errors: Callable | None = None

    def replaced(self) -> AbstractContextManager:
        """With its own form of L_layer."""
        if self.layer_errors is None:
            return nullcontext()
        return patch.object(kd.losses, "layer_errors", self.layer_errors)


def few(variant: str, count: int) -> Training:
    return Training(row=(variant, "reduced_layer"), what=f"{count} drawings", drawings=count)


def made(variant: str) -> Training:
    return Training(row=(variant, "reduced_layer"), what="line art alone", made=True)


def layers(student: str, what: str, **how: str | Callable) -> Training:
    return Training(row=("distilled", student), what=what, **how)


OUTPUTS_ALONE = "--layer-only-steps 0 --loss-layer 0 --loss-d 1 --loss-td 1 --lr 1e-3"
LONG = 28_800
TRAININGS = {
    **{f"few-{count}-{variant}": few(variant, count)
       for count in (500, 200, 50) for variant in ("alone", "distilled", "started")},
    **{f"made-{variant}": made(variant) for variant in ("alone", "distilled", "started")},
    "loss-cosine": layers("reduced_channel", "L_layer as a cosine", layer_errors=cosine_errors),
    "loss-deep": layers("reduced_channel", "L_layer by depth", layer_errors=deep_errors),
    "loss-channel": layers("reduced_channel", "L_layer by channel",
                           options="--layer-statistics channel"),
    "loss-x0": layers("reduced_channel", "L_d, L_td by timestep", options="--weighting x0"),
    "small-lite-outputs": layers("lite", "L_d and L_td alone", options=OUTPUTS_ALONE),
    "small-lite-long": Training(row=("alone", "lite"), what="three times as long", images=LONG),
    "small-lite-outputs-long": layers("lite", "L_d and L_td alone, three times as long",
                                      options=OUTPUTS_ALONE, images=LONG),
    "small-mlp-faster": layers("mlp", "a learning rate of 3e-3, not 1e-3", options="--lr 3e-3"),
    "small-mlp-long": Training(row=("alone", "mlp"), what="three times as long", images=LONG),
    "small-mlp-outputs-long": layers("mlp", "three times as long", images=LONG),
}


def make(name: str, training: Training, seed: int, out: Path) -> dict:
    """Train, or what is left of it, and measure: a row as `benchmarks.distillation` has them."""
    experiment = replace(DRAWINGS, out=out, images=training.images)
    data = DRAWINGS.data
    if training.drawings:
        data = first_drawings(data, training.drawings, out / f"{training.drawings}_drawings")
    if training.made:
        data = out / "teacher_pictures"
        make_pictures(data, 1_720)
    folder = out / f"{name}-{seed}"
    sd = load_stable_diffusion(drawings.SD)
    options = arguments((*training.row, seed), replace(experiment, data=data))
    with training.replaced():
        finish_run(options + training.options.split(), folder)
    return make_row(sd, folder / NETWORK, folder / "result.json", experiment)


def markdown(results: dict[str, dict]) -> str:
    """The table: mean and standard deviation over the seeds of each training."""
    rows = []
    for name, training in TRAININGS.items():
        group = [row for key, row in results.items() if key.rpartition("-")[0] == name]
        if group:
            variant, student = training.row
            rows.append([
                student, variant, training.what, f"{training.images:,}", str(len(group)),
                spread([row["right prompt"]["line F1"] for row in group]),
                spread([row["right prompt"]["color_error"] for row in group], 1),
                spread([row["empty prompt"]["line F1"] for row in group])])
    head = ["student", "trained", "on, or how", "pictures", "seeds", "line F1", "colour error",
            "empty prompt"]
    return "\n".join(table(head, rows)) + "\n"


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    tune(load_stable_diffusion(drawings.SD).resolution)
    for seed in args.seeds:
        for name, training in TRAININGS.items():
            file = args.out / f"{name}-{seed}" / "result.json"
            if (f"{name}-{seed}".startswith(tuple(args.only))
                    and not stored_row(file, DRAWINGS.pictures)):
                make(name, training, seed, args.out)
    # Of other processes and earlier runs too.
    stored = args.out / "results.json"
    results = json.loads(stored.read_text()) if stored.exists() else {}
    for file in sorted(args.out.glob("*/result.json")):
        results[file.parent.name] = json.loads(file.read_text())
    write_text(stored, json.dumps(results, indent=1) + "\n")
    print("\n" + markdown(results))


if __name__ == "__main__":
    sys.exit(run(main))
