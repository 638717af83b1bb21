"""Train a ControlNet, or distil one into a lighter student.

    python train.py --student reduced_layer     distil a student from the teacher ControlNet
    python train.py                             train a ControlNet itself
    python train.py --ablation gaussian         train a ControlNet with one thing changed, as the paper's ablations do
    torchrun --nproc-per-node 2 train.py ...    the same on two GPUs (or CPUs): --batch-size is each one's

Without further arguments both run on the tiny model of weights/tiny/ and on circles drawn on the fly.
"""

import argparse
import math
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from common.cli import Parser, fraction, non_negative, non_negative_float, positive, positive_float, run
from common.devices import device, tune_cpu
from controlnet import ControlNet
from controlnet.ablations import ABLATIONS
from data.circles import Circles
from data.folder import Folder
from diffusion import TIMESTEPS, q_sample, training_target
from evaluation.fidelity import print_fidelity
from kd import STUDENTS
from training import parallel
from training.batches import Shuffled, batches
from training.cache import Cache
from training.ema import Average
from training.previews import measures, print_networks, save_sample_grid, shown
from training.probe import PROBES, Probe, averages
from training.start import start
from training.state import Log, Stop, begin, event_writer, resume, save
from training.step import Step
from vae import sample_latents
from weights import StableDiffusion, load_controlnet, load_stable_diffusion, save_controlnet, save_stable_diffusion

TINY = Path(__file__).parent / "weights" / "tiny"
GENERATED = 5000        # circles in the generated training set: a tenth of Fill50k
FIDELITY_SAMPLES = 64   # held-out circles the final table is measured on; evaluate.py takes 256
WATCHED = 16            # held-out circles whose fidelity goes into the log every --sample-every steps
SAMPLE_STEPS = 20       # DDIM steps of the pictures and the table


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = Parser(__doc__)
    p.add_argument("--student", choices=list(STUDENTS), help="distil this student (default: none, train a ControlNet)")
    p.add_argument("--ablation", choices=list(ABLATIONS), help="train this ablation of the ControlNet paper instead (default: none)")
    p.add_argument("--checkpoint", type=Path, default=TINY / "sd.safetensors", help="Stable Diffusion in one file, original naming (default: the tiny model)")
    p.add_argument("--prediction", choices=["noise", "v"], help="what the checkpoint predicts; v: SD 2.1 at 768 (default: what the file says, else noise)")
    p.add_argument("--teacher", help="teacher ControlNet of a student; none = train it without (default: weights/tiny/controlnet.safetensors)")
    p.add_argument("--init", help="where the control network starts: base (a copy of the SD encoder, a ControlNet's default), "
                                  "random (a student's default), teacher (the teacher's layers that fit a student), or any control network file")
    p.add_argument("--copy-zero-convs", action="store_true", help="with --init teacher: copy the zero convolutions too, not to start at the base model")
    p.add_argument("--mode", choices=["default", "small", "large"], default="default",
                   help="small: only the middle block is connected; large: the SD decoder learns too, after --unlock-at steps (default: default)")
    p.add_argument("--unlock-at", type=non_negative, help="with --mode large: steps before the SD decoder is unlocked (default: those of L_layer alone)")
    p.add_argument("--data", type=Path, help="folder with Fill50k's prompt.json or an imagefolder's metadata.jsonl (default: circles drawn on the fly)")
    p.add_argument("--canny", action="store_true", help="make the conditions of --data on the fly, the pictures' Canny edges")
    p.add_argument("--shuffle-conditions", action="store_true", help="train on wrong conditions: a control experiment, the probe must stay at zero")
    p.add_argument("--cache", type=Path, help="folder to keep latents and text states in, from run to run (default: in memory, up to 2 GiB each)")
    p.add_argument("--resolution", type=positive, help="side of the training pictures, divisible by 8 (default: the checkpoint's, 512 for Stable Diffusion)")
    p.add_argument("--steps", type=positive, default=800, help="optimizer steps in all (default: 800)")
    p.add_argument("--batch-size", type=positive, default=16, help="pictures a forward pass, of each process (default: 16)")
    p.add_argument("--accumulate", type=positive, default=1, help="forward passes an optimizer step (default: 1)")
    p.add_argument("--lr", type=positive_float, help="learning rate (default: as the checkpoint says, 1e-5 for Stable Diffusion, 1e-3 for the tiny model)")
    p.add_argument("--warmup", type=non_negative, default=0, help="over the first N steps the learning rate rises linearly (default: 0)")
    p.add_argument("--decay", type=non_negative, default=0, help="over the last N steps the learning rate falls to zero, linearly (default: 0)")
    p.add_argument("--cosine", action="store_true", help="let it fall along half a cosine instead")
    p.add_argument("--clip", type=positive_float, help="scale gradients down to this norm when theirs is larger (default: never)")
    p.add_argument("--ema", type=fraction, help="keep a moving average of the control network with this decay, such as 0.999, in its own file (default: none)")
    p.add_argument("--precision", choices=["float32", "bf16"], default="float32",
                   help="of the forward pass and of the frozen networks; what learns and its optimizer stay float32 (default: float32)")
    p.add_argument("--checkpointing", action="store_true", help="gradient checkpointing: compute activations twice instead of keeping them")
    p.add_argument("--drop-prompt", type=fraction, default=0.5, help="share of prompts replaced by the empty one (default: 0.5, the paper's)")
    p.add_argument("--loss-d", type=non_negative_float, default=1.0, help="weight of L_d, the diffusion loss (default: 1)")
    p.add_argument("--loss-td", type=non_negative_float, default=1.0, help="weight of L_td, the teacher's prediction (default: 1)")
    p.add_argument("--loss-layer", type=non_negative_float, default=1.0, help="weight of L_layer, the teacher's 13 outputs (default: 1)")
    p.add_argument("--layer-only-steps", type=non_negative, help="first steps with L_layer alone, which needs no UNet (default: 650 with a teacher)")
    p.add_argument("--seed", type=non_negative, default=0, help="of every random draw (default: 0)")
    p.add_argument("--device", type=device, default="auto", help="auto, cpu or cuda (default: auto, CUDA where there is one)")
    p.add_argument("--save-every", type=positive, default=200, help="steps between saved states (default: 200)")
    p.add_argument("--sample-every", type=positive, default=200, help="steps between sample pictures, probes and control fidelity (default: 200)")
    p.add_argument("--tensorboard", action="store_true", help="write event files for TensorBoard too")
    p.add_argument("--out", type=Path, help="folder of the run (default: runs/controlnet, runs/STUDENT or runs/ABLATION)")
    p.add_argument("--resume", action="store_true", help="continue the run in --out exactly")
    args = p.parse_args(argv)
    if args.ablation and (args.student or args.init):
        p.error("an --ablation says what is trained and where it starts: --student and --init do not go with it")
    if args.ablation and args.mode != "default":
        p.error("an --ablation has the default mode")
    if args.unlock_at is not None and args.mode != "large":
        p.error("--unlock-at needs --mode large")
    if args.cosine and not args.decay:
        p.error("--cosine is the curve of --decay, which says over how many steps")
    if args.canny and not args.data:
        p.error("--canny needs --data, a folder of pictures")
    if args.copy_zero_convs and args.init != "teacher":
        p.error("--copy-zero-convs needs --init teacher")
    if args.student is None and args.teacher not in (None, "none"):
        p.error("--teacher needs a --student to teach")
    args.teacher = args.teacher or (str(TINY / "controlnet.safetensors") if args.student else "none")
    args.teacher = None if args.teacher == "none" else args.teacher
    if args.layer_only_steps is None:
        args.layer_only_steps = 650 if args.teacher and args.loss_layer > 0 else 0
    if args.layer_only_steps and not (args.teacher and args.loss_layer > 0):
        p.error("--layer-only-steps needs a teacher and a --loss-layer above 0")
    if args.init == "teacher" and not args.teacher:
        p.error("--init teacher needs a --student and its --teacher")
    args.unlock_at = args.layer_only_steps if args.unlock_at is None else args.unlock_at
    if args.unlock_at < args.layer_only_steps and args.mode == "large":
        p.error(f"--unlock-at must not come before the end of --layer-only-steps, {args.layer_only_steps}: L_layer says nothing to the SD decoder")
    args.init = args.init or ("random" if args.student else "base")
    args.name = args.student or args.ablation or "controlnet"
    args.out = args.out or Path("runs") / args.name
    args.processes = parallel.processes()
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    sd = load_stable_diffusion(args.checkpoint, prediction=args.prediction)
    size = args.resolution or sd.resolution
    if size % 8:
        raise ValueError(f"expected a --resolution divisible by 8, got {size}")
    tune_cpu(size)
    teacher = load_controlnet(args.teacher, sd.unet) if args.teacher else None
    generator = torch.Generator().manual_seed(args.seed)
    net = start(args, sd.unet, teacher, generator)
    data = Folder(args.data, size, args.canny) if args.data else Circles(size, GENERATED, args.seed)
    shown(data, PROBES)  # a broken picture should stop the run before it has a folder
    if args.tensorboard:
        event_writer()
    with parallel.group(args.device):
        asked, average = train(args, sd, net, teacher, data, generator)
    if asked == signal.SIGINT:
        raise KeyboardInterrupt
    if not asked and parallel.rank() == 0:
        report(args, sd, {"teacher": teacher, args.name: net, f"{args.name}, averaged": average and average.net}, data)


def train(
    args, sd: StableDiffusion, net: ControlNet, teacher: ControlNet | None, data, generator: torch.Generator
) -> tuple[signal.Signals | None, Average | None]:
    """From step 0, or where the run in --out stands, to --steps or a signal. Returns the signal that stopped it, and the averaged network."""
    # --- Everything that is frozen, and the one network that learns ---
    for network in (sd.unet, sd.text, teacher):
        if network and args.precision == "bf16" and not (network is sd.unet and args.mode == "large"):  # its decoder is to learn
            network.to(torch.bfloat16)  # the autoencoder is not worth it: it runs once a picture, and everything is measured by its latents
    for network in (sd.unet, sd.text, sd.vae, teacher, net):
        network and network.to(args.device)
    net.checkpointing = sd.unet.checkpointing = args.checkpointing
    learner, lr = Step(sd.unet, net, teacher, args.mode, args.precision == "bf16"), args.lr or sd.lr
    trained = [*net.parameters(), *(learner.decoder.parameters() if args.mode == "large" else [])]
    optimizer = torch.optim.AdamW(trained, lr=lr, fused=True)  # one kernel for all tensors: seven times faster on a small network
    average = Average(net, args.ema) if args.ema is not None else None
    parts = {"net": net, "optimizer": optimizer, "generator": generator}
    parts |= ({"ema": average.net} if average else {}) | ({"decoder": learner.decoder} if args.mode == "large" else {})

    first, count = parallel.rank() == 0, parallel.processes()  # of several processes, the first one writes
    step = resume(args.out, args, parts, writes=first) if args.resume else begin(args.out, args, writes=first)
    parallel.wait()
    probe = Probe(sd, shown(data, PROBES)) if first else None
    if first and args.resume:
        write_outputs(args, sd, net, average, data, step)  # the run may have been killed after it saved this step and before it wrote them
    log = Log(args.out, step, args.tensorboard) if first else None
    latents, text = caches(sd, args.cache)
    seen, workers = Shuffled(data) if args.shuffle_conditions else data, 2 if args.device.type == "cuda" else 0
    passes = batches(seen, args.batch_size * count, args.seed, step * args.accumulate, workers, parallel.mine)
    weight_of, images = {"L_d": args.loss_d, "L_td": args.loss_td, "L_layer": args.loss_layer}, args.batch_size * args.accumulate * count

    # --- The loop ---
    wrapped = None
    with tqdm(total=args.steps * images, initial=step * images, unit="image", desc="training", smoothing=0.05, disable=not first) as progress, Stop() as stop:
        asked = None
        while step < args.steps and not asked:
            if wrapped is None or args.mode == "large" and step == args.unlock_at:
                if args.mode == "large" and step >= args.unlock_at:
                    learner.unlock()
                wrapped = None
                wrapped = parallel.wrapped(learner)
                if first:
                    announce(args, step, sd, net, teacher, learner)
            optimizer.param_groups[0]["lr"] = lr * rate(args, step)
            optimizer.zero_grad()
            sums: dict[str, Tensor] = {}
            for number in range(args.accumulate):
                last = number == args.accumulate - 1  # several processes exchange gradients then, once a step
                with wrapped.no_sync() if count > 1 and not last else nullcontext():
                    losses, signals = wrapped(*drawn(args, sd, next(passes), latents, text, generator), step < args.layer_only_steps)
                    losses["loss"] = sum(weight_of[name] * value for name, value in losses.items())
                    (losses["loss"] / args.accumulate).backward()
                for name, value in (losses | signals).items():
                    sums[name] = sums.get(name, 0.0) + value.detach()
            entry = averages(parallel.summed(sums), args.accumulate * count)
            norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
            entry["gradient"] = norm.item()
            for name in ("loss", "gradient"):  # before the weights are touched: what was saved, and what is saved next, is sound
                if not math.isfinite(entry[name]):
                    problem = f"the {name} became {entry[name]} at step {step + 1}"
                    raise FloatingPointError(f"{problem}; the state last saved in {args.out} is kept. Try a lower --lr")
            if args.clip:
                torch.nn.utils.clip_grads_with_norm_(trained, args.clip, norm)
            optimizer.step()
            if average:
                average.update(net)
            step += 1
            asked = parallel.agreed(stop.signal)  # one that comes from here on is heard after the next step
            if first:
                progress.update(images)
                progress.set_postfix(loss=f"{entry['loss']:.4f}", refresh=False)
                if step % args.sample_every == 0:
                    with autocast(args):
                        entry |= measures(sd, net, probe, data, WATCHED, SAMPLE_STEPS)
                log.write({"step": step, **entry, "lr": optimizer.param_groups[0]["lr"]})
                if step % args.save_every == 0 or step == args.steps or asked:
                    save(args.out, step, parts)
                    write_outputs(args, sd, net, average, data, step)
                elif step % args.sample_every == 0:
                    draw(args, sd, net, data, step)
    if first:
        log.close()
        if asked:
            print(f"stopped by {asked.name} after step {step} of {args.steps}, which is saved: go on with --resume")
    return asked, average


def rate(args, step: int) -> float:
    """The learning rate of a step, counted from 0, as a share of --lr."""
    rising = min(1.0, (step + 1) / args.warmup) if args.warmup else 1.0
    falling = min(1.0, (args.steps - step) / args.decay) if args.decay else 1.0
    return rising * (0.5 - 0.5 * math.cos(math.pi * falling) if args.cosine else falling)


def caches(sd: StableDiffusion, folder: Path | None) -> tuple[Cache, Cache]:
    """What the frozen autoencoder says of a picture, mean and log variance (2, 4, S/8, S/8), and the text encoder of a prompt (N, D)."""
    latents = Cache(sd.vae, lambda picture: torch.cat(sd.vae.encode(picture[None].to(sd.vae.quant_conv.weight))), folder)
    return latents, Cache(sd.text, lambda prompt: sd.text.encode([prompt])[0], folder)


@torch.no_grad()
def drawn(args, sd: StableDiffusion, batch: dict, latents: Cache, text: Cache, generator: torch.Generator) -> tuple[Tensor, ...]:
    """What one forward pass is given: noisy latents, what is to be predicted, timesteps, text states, conditions.

    Every number is drawn on the CPU, whatever the device, and for the whole batch of all processes, of which each takes its part.
    """
    count = len(batch["prompt"]) * parallel.processes()

    def noise() -> Tensor:
        return parallel.mine(torch.randn((count, 4, *(side // 8 for side in batch["condition"].shape[-2:])), generator=generator))

    mean, logvar = latents(batch["target"]).unbind(dim=1)
    x0, eps = sample_latents(mean, logvar, noise()), noise()
    t = parallel.mine(torch.randint(TIMESTEPS, (count,), generator=generator))
    dropped = parallel.mine(torch.rand(count, generator=generator) < args.drop_prompt)  # without a prompt the condition has to say it all (section 3.4)
    context = text(["" if drop else prompt for drop, prompt in zip(dropped, batch["prompt"], strict=True)])
    x_t, target = q_sample(x0, t, eps), training_target(x0, t, eps, sd.prediction)
    return tuple(tensor.to(args.device) for tensor in (x_t, target, t, context, batch["condition"]))


# --- What a run shows and writes ---


def announce(args, step: int, sd: StableDiffusion, net: ControlNet, teacher: ControlNet | None, learner: Step) -> None:
    """Say which losses count and which weights learn from this step on."""
    if step < args.layer_only_steps:
        rest = f"then all losses to step {args.steps}" if args.layer_only_steps < args.steps else f"and no others: --steps is {args.steps}"
        tqdm.write(f"steps {step + 1} to {min(args.layer_only_steps, args.steps)}: L_layer alone, {rest}")
    encoder = torch.nn.ModuleList([sd.unet.time_embed, sd.unet.input_blocks, sd.unet.middle_block])
    networks = {args.name: net, "teacher": teacher, "SD encoder": encoder, "SD decoder": learner.decoder, "autoencoder": sd.vae, "text encoder": sd.text}
    print_networks(f"from step {step + 1}", networks)


def autocast(args) -> torch.autocast:
    """Where --precision bf16 runs in it."""
    return torch.autocast(args.device.type, torch.bfloat16, enabled=args.precision == "bf16")


def write_outputs(args, sd: StableDiffusion, net: ControlNet, average: Average | None, data, step: int) -> None:
    """The networks by themselves, for every other program, and the picture of a step where one is due and not there."""
    save_controlnet(args.out / "controlnet.safetensors", net, base=args.checkpoint.name, step=step)
    if average:
        save_controlnet(args.out / "controlnet_ema.safetensors", average.net, base=args.checkpoint.name, step=step)
    if args.mode == "large" and step > args.unlock_at:
        save_stable_diffusion(args.out / "sd.safetensors", sd, torch.float32)
    if (step % args.sample_every == 0 or step == args.steps) and not (args.out / "samples" / f"{step:06}.png").exists():
        draw(args, sd, net, data, step)


def draw(args, sd: StableDiffusion, net: ControlNet, data, step: int) -> None:
    with autocast(args):
        save_sample_grid(sd, net, data, args.out / "samples", step, args.seed, SAMPLE_STEPS)


def report(args, sd: StableDiffusion, networks: dict[str, ControlNet | None], data) -> None:
    """Control fidelity on held-out circles: the base, the teacher, and what was trained, side by side; and what to do next."""
    if args.data:
        print("control fidelity is measured on generated circles only: look at the samples")
    else:
        with autocast(args):
            rows = {"base without control": None} | {name: net for name, net in networks.items() if net}
            print_fidelity(sd, rows, count=FIDELITY_SAMPLES, size=data.size, steps=SAMPLE_STEPS)
    weights, changed = args.out / "controlnet.safetensors", args.out / "sd.safetensors"
    base = changed if args.mode == "large" and args.steps > args.unlock_at else args.checkpoint
    words = ("" if base == TINY / "sd.safetensors" else f" --checkpoint {base}") + (f" --prediction {args.prediction}" if args.prediction else "")
    print(f"\npicture: {args.out / 'samples' / f'{args.steps:06}.png'}\nweights: {weights}")
    print(f'try it:  python sample.py --controlnet {weights}{words} --condition {args.out}/samples/condition.png --prompt "{shown(data)[0]["prompt"]}"')


if __name__ == "__main__":
    sys.exit(run(main))
