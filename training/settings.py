"""What a training run is to do: train.py's command line as one frozen object.

Every option is one field: its default, the type that checks it, its help.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from common import cli
from common.cli import option
from controlnet.ablations import ABLATIONS
from kd import STUDENTS
from training import parallel
from weights import tiny

LAYER_ONLY_STEPS = 650  # of the default 800 steps: the cheap phase first (docs/experiments.md)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All options with every default resolved, and the number of processes."""

    checkpoint: Path
    prediction: str | None
    device: torch.device
    student: str | None = option("distil this student (default: none, train a ControlNet)",
                                 choices=list(STUDENTS))
    ablation: str | None = option("train this ablation of the ControlNet paper instead",
                                  choices=list(ABLATIONS))
    teacher: str | None = option("teacher ControlNet of a student; none = train it without "
                                 "(default: weights/tiny/controlnet.safetensors)")
    init: str = option("where the control network starts: base (a copy of the SD encoder, a "
                       "ControlNet's default), random (a student's default), teacher (the "
                       "teacher's layers that fit), or any control network file")
    copy_zero_convs: bool = option("with --init teacher: copy the zero convolutions too", False)
    mode: str = option("small: only the middle block is connected; large: the SD decoder learns "
                       "too, after --unlock-at steps", "default",
                       choices=["default", "small", "large"])
    unlock_at: int = option("with --mode large: steps before the SD decoder is unlocked "
                            "(default: those of L_layer alone)", type=cli.non_negative)
    data: Path | None = option("folder with prompt.json or metadata.jsonl (default: generated "
                               "circles)", type=Path)
    canny: bool = option("use the Canny edges of the pictures in --data as conditions", False)
    shuffle_conditions: bool = option("train on wrong conditions: a control experiment, the probe "
                                      "must stay at zero", False)
    cache: Path | None = option("folder that keeps latents and text states from run to run "
                                "(default: in memory, up to 2 GiB each)", type=Path)
    resolution: int | None = option("side of the training pictures, divisible by 8 (default: the "
                                    "checkpoint's)", type=cli.picture_side)
    drop_prompt: float = option("fraction of prompts replaced by the empty one", 0.5, cli.fraction)
    steps: int = option("optimizer steps in all", 800, cli.positive)
    batch_size: int = option("pictures per forward pass and process", 16, cli.positive)
    accumulate: int = option("gradient accumulation: forward passes per step", 1, cli.positive)
    lr: float | None = option("learning rate (default: the checkpoint's, 1e-5 for Stable "
                              "Diffusion, 1e-3 for the tiny model)", type=cli.positive_float)
    warmup: int = option("steps over which the learning rate rises, linearly", 0, cli.non_negative)
    decay: int = option("last steps, over which the learning rate falls to zero, linearly", 0,
                        cli.non_negative)
    cosine: bool = option("let the learning rate fall along half a cosine instead of a line", False)
    clip: float | None = option("largest norm of the gradient, clipped to it (default: never)",
                                type=cli.positive_float)
    ema: float | None = option("keep an exponential moving average with this decay, such as 0.999, "
                               "in controlnet_ema.safetensors (default: none)", type=cli.fraction)
    precision: str = option("of forward passes and frozen networks; what learns stays in float32",
                            "float32", cli.precision)
    checkpointing: bool = option("recompute activations in the backward pass", False)
    loss_d: float = option("weight of L_d, the diffusion loss", 1.0, cli.non_negative_float)
    loss_td: float = option("weight of L_td, against the teacher's prediction", 1.0,
                            cli.non_negative_float)
    loss_layer: float = option("weight of L_layer, against the teacher's 13 outputs", 1.0,
                               cli.non_negative_float)
    layer_only_steps: int = option("first steps with L_layer alone, which needs no UNet (default: "
                                   f"{LAYER_ONLY_STEPS} with a teacher)", type=cli.non_negative)
    seed: int = option("seed of every random number", 0, cli.non_negative)
    out: Path = option("folder of the run (default: runs/NAME)", type=Path)
    resume: bool = option("continue the run in --out exactly", False)
    save_every: int = option("steps between saved states", 200, cli.positive)
    keep: int = option("saved states to keep, besides the last as RUN/state/STEP.pt", 1,
                       cli.positive)
    sample_every: int = option("steps between sample grids, probes and control fidelity", 200,
                               cli.positive)
    log_every: int = option("steps that a line of the log is the mean of; a GPU waits for each "
                            "line", 10, cli.positive)
    sample_steps: int = option("DDIM steps of grids and control fidelity", 20, cli.positive)
    fidelity_samples: int = option("held-out samples that control fidelity is measured on in the "
                                   "log", 16, cli.positive)
    report_samples: int = option("held-out samples of the final table; 0: no table", 64,
                                 cli.non_negative)
    tensorboard: bool = option("write TensorBoard's event files too", False)
    processes: int

    @property
    def name(self) -> str:
        """What is trained."""
        return self.student or self.ablation or "controlnet"

    @property
    def loss_weights(self) -> dict[str, float]:
        """The weight of each loss by its name: --loss-td is L_td's."""
        return {name.replace("loss", "L"): weight for name, weight in vars(self).items()
                if name.startswith("loss_")}


def parse(argv: list[str] | None = None, description: str = "") -> Settings:
    """The command line, checked, with the defaults that depend on each other resolved."""
    p = cli.Parser(description)
    cli.add_base_options(p, tiny.SD)
    cli.add_options(p, Settings)
    args = p.parse_args(argv)
    if args.student and args.teacher is None:
        args.teacher = str(tiny.CONTROLNET)
    args.teacher = None if args.teacher == "none" else args.teacher
    has_layer_loss = args.teacher and args.loss_layer > 0
    if args.layer_only_steps is None:
        args.layer_only_steps = LAYER_ONLY_STEPS if has_layer_loss else 0
    conflicts = {
        "an --ablation fixes what is trained and where it starts: --student and --init do not go "
        "with it": args.ablation and (args.student or args.init),
        "an --ablation has the default mode": args.ablation and args.mode != "default",
        "--teacher needs a --student to teach": args.teacher and not args.student,
        "--init teacher needs a --student and its --teacher":
            args.init == "teacher" and not args.teacher,
        "--copy-zero-convs needs --init teacher": args.copy_zero_convs and args.init != "teacher",
        "--unlock-at needs --mode large": args.unlock_at is not None and args.mode != "large",
        "--unlock-at must not come before the end of --layer-only-steps, "
        f"{args.layer_only_steps}: L_layer does not reach the SD decoder":
            args.unlock_at is not None and args.unlock_at < args.layer_only_steps,
        "--layer-only-steps needs a teacher and a --loss-layer above 0":
            args.layer_only_steps and not has_layer_loss,
        "--canny needs --data, a folder of pictures": args.canny and not args.data,
        "--cosine is the curve of --decay, which sets its length": args.cosine and not args.decay,
    }
    for problem, applies in conflicts.items():
        if applies:
            p.error(problem)
    if args.unlock_at is None:
        args.unlock_at = args.layer_only_steps
    args.init = args.init or ("random" if args.student else "base")
    args.out = args.out or Path("runs") / (args.student or args.ablation or "controlnet")
    return Settings(processes=parallel.world_size(), **vars(args))
