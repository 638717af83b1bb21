"""What a training run is to do: train.py's command line as one frozen object.

Every option is one field: its default, the type that checks it, its help. Like all that reads a
command line, this file imports no PyTorch until the line is right.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common import cli
from common.cli import option
from controlnet import ABLATIONS
from kd import ALTERNATIVES, STUDENTS
from weights import tiny

if TYPE_CHECKING:
    import torch


# What depends on the base model and the machine, if the command line does not say it.
LEFT_OPEN = ("init", "unlock_at", "steps", "batch_size", "accumulate", "lr", "precision",
             "loss_layer", "layer_only_steps")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All options, and the number of processes. None: `training/defaults.py` chooses."""

    checkpoint: Path
    prediction: str | None  # this and the three below, None: as the checkpoint says
    sample_steps: int | None
    guidance: float | None
    spacing: str | None
    device: "torch.device"
    vae: Path | None = option("take the autoencoder (VAE) from here, a file or diffusers' folder "
                              "(default: the checkpoint's)", type=Path, metavar="FILE")
    student: str | None = option("distil this student (default: none, train a ControlNet)",
                                 choices=[*STUDENTS, *ALTERNATIVES])
    ablation: str | None = option("train this ablation of the ControlNet paper instead",
                                  choices=ABLATIONS)
    teacher: str | None = option("teacher ControlNet of a student; none = train it without "
                                 "(default: weights/tiny/controlnet.safetensors)")
    init: str = option("where the control network starts: base (a copy of the SD encoder, a "
                       "ControlNet's default), teacher (the teacher's layers that fit, a student's "
                       "default if any do), random, or any control network file")
    condition_encoder: str | None = option("E(c) of a ControlNet: the paper's, or that of the "
                                           "released code and files (default: released, or as in "
                                           "--init FILE)", choices=["paper", "released"])
    copy_zero_convs: bool = option("with --init teacher: copy the zero convolutions too", False)
    mode: str = option("small: only the middle block is connected; large: what --unlock names of "
                       "Stable Diffusion learns too, after --unlock-at steps", "default",
                       choices=["default", "small", "large"])
    unlock: str = option("with --mode large: decoder (of the UNet, as the released code does) or "
                         "all (of the UNet, as the paper's first version describes it); "
                         "autoencoder and text encoder stay frozen", "decoder",
                         choices=["decoder", "all"])
    unlock_at: int = option("with --mode large: steps before --unlock (default: those of L_layer "
                            "alone)", type=cli.non_negative)
    data: Path | None = option("folder of pairs: with prompt.json, metadata.jsonl, metadata.csv, "
                               "parquet files, or images/ and conditions/ (default: generated "
                               "circles)", type=Path)
    caption_column: str | None = option("column of --data with the prompts (default: text, caption "
                                        "or prompt)")
    condition_resize: str | None = option("how conditions of another size are scaled (default: "
                                          "nearest for palettes of colours, as label maps are, "
                                          "else lanczos)", choices=["nearest", "lanczos"])
    skip_broken: bool = option("decode all pictures of --data first, and leave out the rows that "
                               "are not pairs", False)
    held_out: Path | None = option("folder of pairs that are sampled and measured and not trained "
                                   "on (default: --data's held_out, if it is there)", type=Path)
    canny: bool = option("use the Canny edges of the pictures in --data as conditions", False)
    shuffle_conditions: bool = option("train on wrong conditions: a control experiment, the probe "
                                      "must stay at zero", False)
    cache: Path | None = option("folder that keeps latents and text states, computed once before "
                                "the first step, from run to run (default: .light_controlnet in "
                                "--data; of generated data: in memory)", type=Path)
    no_cache: bool = option("keep no latents: encode the pictures again in every step", False)
    resolution: int | None = option("side of the training pictures, divisible by 8 (default: the "
                                    "checkpoint's)", type=cli.picture_side)
    buckets: bool = option("keep the pictures' aspect ratios, up to 2:1: instead of squares of "
                           "--resolution the nearest of several sizes of at most its area, each "
                           "batch of one of them", False)
    timesteps: str = option("what is trained on: uniform, or those of a sampling run alone, such "
                            "as trailing:4", "uniform", cli.timesteps,
                            metavar="{uniform,SPACING:N}")
    drop_prompt: float = option("fraction of prompts replaced by the empty one", 0.5, cli.fraction)
    steps: int = option("optimizer steps in all (default: 800 for a small base; for Stable "
                        "Diffusion 20,000, a student 10,000)", type=cli.positive)
    batch_size: int = option("pictures per forward pass and process (default: as many of the 16 of "
                             "a step as the GPU has memory for)", type=cli.positive)
    accumulate: int = option("gradient accumulation: forward passes per step (default: up to 16 "
                             "pictures; 1 with --batch-size)", type=cli.positive)
    lr: float = option("learning rate (default: the checkpoint's, 1e-5 for Stable Diffusion, ten "
                       "times that for its students, 1e-3 for the tiny model)",
                       type=cli.positive_float)
    warmup: int = option("steps over which the learning rate rises, linearly", 0, cli.non_negative)
    decay: int = option("last steps, over which the learning rate falls to zero, linearly", 0,
                        cli.non_negative)
    cosine: bool = option("let the learning rate fall along half a cosine instead of a line", False)
    clip: float | None = option("largest norm of the gradient, clipped to it (default: never)",
                                type=cli.positive_float)
    ema: float | None = option("keep an exponential moving average with this decay, such as 0.999, "
                               "in controlnet_ema.safetensors (default: none)", type=cli.fraction)
    precision: str = option("float32, bf16 or fp16, of forward passes and frozen networks; what "
                            "learns stays in float32 (default: bf16 on a GPU that has it, fp16 on "
                            "others, float32 on a CPU)", type=cli.precision)
    checkpointing: bool = option("recompute activations in the backward pass", False)
    compile: bool = option("compile the UNet's and control networks' blocks: slower start, faster "
                           "steps", False)
    loss_d: float = option("weight of L_d, the diffusion loss", 1.0, cli.non_negative_float)
    loss_td: float = option("weight of L_td, against the teacher's prediction", 1.0,
                            cli.non_negative_float)
    loss_layer: float = option("weight of L_layer, against the teacher's 13 outputs (default: 1, "
                               "for mlp 0)", type=cli.non_negative_float)
    weighting: str = option("what L_d and L_td are errors of: the noise, or the picture x0 that it "
                            "leaves, for which the noisiest timesteps count most", "noise",
                            choices=["noise", "x0"])
    layer_statistics: str = option("what L_layer takes the teacher's variance of: of a layer's "
                                   "output as a whole, or of each of its channels", "layer",
                                   choices=["layer", "channel"])
    layer_only_steps: int = option("first steps with L_layer alone, which needs no UNet (default: "
                                   "13 of 16 with a teacher)", type=cli.non_negative)
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
    fidelity_samples: int = option("held-out samples that control fidelity is measured on in the "
                                   "log", 16, cli.positive)
    report_samples: int = option("held-out samples of the final table; 0: no table", 64,
                                 cli.non_negative)
    tensorboard: bool = option("write TensorBoard's event files too", False)
    processes: int
    data_fingerprint: str | None = None  # of what --data holds, wherever it lies

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
    """The command line, checked. With --resume, what it leaves open is as it was in --out."""
    p = cli.Parser(description)
    cli.add_base_options(p, tiny.SD, steps=())
    cli.add_options(p, Settings)
    args = p.parse_args(argv)
    if args.student and args.teacher is None and tiny.is_base(args.checkpoint):
        args.teacher = str(tiny.CONTROLNET)
    conflicts = {
        "--student needs its --teacher, a ControlNet for --checkpoint; or --teacher none, to train "
        "it without": args.student and args.teacher is None,
        "an --ablation fixes what is trained and where it starts: --student and --init do not go "
        "with it": args.ablation and (args.student or args.init),
        "an --ablation has the default mode, and only finetune the large one too":
            args.ablation and args.mode != "default"
            and (args.ablation, args.mode) != ("finetune", "large"),
        "--condition-encoder is a ControlNet's choice: a --student and an --ablation have their "
        "own": args.condition_encoder and (args.student or args.ablation),
        "--layer-statistics channel needs a --student and its --teacher":
            args.layer_statistics == "channel" and args.teacher in (None, "none"),
        "--teacher needs a --student to teach":
            args.teacher not in (None, "none") and not args.student,
        "--init teacher needs a --student and its --teacher":
            args.init == "teacher" and args.teacher in (None, "none"),
        "--copy-zero-convs needs --init teacher": args.copy_zero_convs and args.init != "teacher",
        "--unlock-at needs --mode large": args.unlock_at is not None and args.mode != "large",
        "--unlock all needs --mode large": args.unlock == "all" and args.mode != "large",
        "--ablation finetune trains an SD encoder already: --unlock decoder is the rest":
            args.ablation and args.unlock == "all",
        "--canny needs --data, a folder of pictures": args.canny and not args.data,
        "--caption-column, --condition-resize and --skip-broken need --data":
            not args.data and (args.caption_column or args.condition_resize or args.skip_broken),
        "--buckets needs --data: what is generated is square": args.buckets and not args.data,
        "--buckets and --shuffle-conditions do not go together: the next picture's condition may "
        "have another size": args.buckets and args.shuffle_conditions,
        "--buckets and --compile do not go together: every size would be compiled anew":
            args.buckets and args.compile,
        "--held-out needs --data, what is trained on": args.held_out and not args.data,
        "--cosine is the curve of --decay, which sets its length": args.cosine and not args.decay,
    }
    for problem, applies in conflicts.items():
        if applies:
            p.error(problem)
    args.teacher = None if args.teacher == "none" else args.teacher
    args.out = args.out or Path("runs") / (args.student or args.ablation or "controlnet")
    if args.resume and (args.out / "settings.json").exists():
        before = json.loads((args.out / "settings.json").read_text())
        for name in LEFT_OPEN:
            if getattr(args, name) is None:
                setattr(args, name, before.get(name))
    from common.devices import device
    from training.parallel import world_size
    args.device = device(args.device)
    return Settings(processes=world_size(), **vars(args))
