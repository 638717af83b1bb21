"""Train a ControlNet, or distil one into a lighter student.

    python train.py --student reduced_layer     distil a student from the teacher ControlNet
    python train.py                             train a ControlNet itself
    python train.py --ablation gaussian         train a ControlNet with one thing changed, as the paper's ablations do

Without further arguments both run on the tiny model of weights/tiny/ and on circles drawn on the fly.
"""

import argparse
import math
import signal
import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from controlnet import ControlNet
from controlnet.sampling import Control, generate, initial_latents
from data.batches import batches
from data.circles import HELD_OUT, Circles
from data.cli import Parser, device, not_negative, not_negative_float, positive, positive_float, run, share, tune_cpu
from data.folder import Folder
from data.pictures import grid, to_image, write_png
from diffusion import TIMESTEPS, q_sample, training_target
from kd import ABLATIONS, STUDENTS, build_student, diffusion_loss, layerwise_loss, teacher_loss
from kd.fidelity import print_fidelity
from kd.from_teacher import from_teacher
from unet.blocks import initialize
from vae import LatentCache
from weights import StableDiffusion, load_controlnet, load_stable_diffusion, save_controlnet
from weights.files import shapes_of
from weights.run import Log, Stop, begin, resume, save

TINY = Path(__file__).parent / "weights" / "tiny"
GENERATED = 5000        # circles in the generated training set: a tenth of Fill50k
FIDELITY_SAMPLES = 64   # held-out circles the final table is measured on; evaluate.py takes 256
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
    p.add_argument("--data", type=Path, help="folder with Fill50k's prompt.json or an imagefolder's metadata.jsonl (default: circles drawn on the fly)")
    p.add_argument("--canny", action="store_true", help="make the conditions of --data on the fly, the pictures' Canny edges")
    p.add_argument("--resolution", type=positive, help="side of the training pictures, divisible by 8 (default: the checkpoint's, 512 for Stable Diffusion)")
    p.add_argument("--steps", type=positive, default=800, help="optimizer steps in all (default: 800)")
    p.add_argument("--batch-size", type=positive, default=16, help="pictures a forward pass (default: 16)")
    p.add_argument("--accumulate", type=positive, default=1, help="forward passes an optimizer step (default: 1)")
    p.add_argument("--lr", type=positive_float, help="learning rate (default: as the checkpoint says, 1e-5 for Stable Diffusion, 1e-3 for the tiny model)")
    p.add_argument("--decay", type=not_negative, default=0, help="over the last N steps the learning rate falls linearly to zero (default: 0)")
    p.add_argument("--precision", choices=["float32", "bf16"], default="float32", help="of the forward pass; weights stay float32 (default: float32)")
    p.add_argument("--drop-prompt", type=share, default=0.5, help="share of prompts replaced by the empty one (default: 0.5, the paper's)")
    p.add_argument("--loss-d", type=not_negative_float, default=1.0, help="weight of L_d, the diffusion loss (default: 1)")
    p.add_argument("--loss-td", type=not_negative_float, default=1.0, help="weight of L_td, the teacher's prediction (default: 1)")
    p.add_argument("--loss-layer", type=not_negative_float, default=1.0, help="weight of L_layer, the teacher's 13 outputs (default: 1)")
    p.add_argument("--layer-only-steps", type=not_negative, help="first steps with L_layer alone, which needs no UNet (default: 650 with a teacher)")
    p.add_argument("--seed", type=not_negative, default=0, help="of every random draw (default: 0)")
    p.add_argument("--device", type=device, default="auto", help="auto, cpu or cuda (default: auto, CUDA where there is one)")
    p.add_argument("--save-every", type=positive, default=200, help="steps between saved states (default: 200)")
    p.add_argument("--sample-every", type=positive, default=200, help="steps between sample pictures (default: 200)")
    p.add_argument("--out", type=Path, help="folder of the run (default: runs/controlnet, runs/STUDENT or runs/ABLATION)")
    p.add_argument("--resume", action="store_true", help="continue the run in --out exactly")
    args = p.parse_args(argv)
    if args.ablation and (args.student or args.init):
        p.error("an --ablation says what is trained and where it starts: --student and --init do not go with it")
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
    args.init = args.init or ("random" if args.student else "base")
    args.name = args.student or args.ablation or "controlnet"
    args.out = args.out or Path("runs") / args.name
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)

    # --- Everything that is frozen, and the one network that learns ---
    sd = load_stable_diffusion(args.checkpoint, prediction=args.prediction).to(args.device)
    teacher = load_controlnet(args.teacher, sd.unet).to(args.device) if args.teacher else None
    generator = torch.Generator().manual_seed(args.seed)
    net = start(args, sd, teacher, generator).to(args.device).requires_grad_(True).train()
    lr = args.lr or sd.lr
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, fused=True)  # one kernel for all tensors: seven times faster on a small network
    size = args.resolution or sd.resolution
    tune_cpu(size)
    if size % 8:
        raise ValueError(f"expected a --resolution divisible by 8, got {size}")
    data = Folder(args.data, size, args.canny) if args.data else Circles(size, GENERATED, args.seed)
    shown(data)  # a broken picture should stop the run before it has a folder
    parts = (net, optimizer, generator)
    step = resume(args.out, args, parts) if args.resume else begin(args.out, args)
    if args.layer_only_steps:
        rest = f"then all losses to step {args.steps}" if args.layer_only_steps < args.steps else f"and no others: --steps is {args.steps}"
        print(f"steps 1 to {min(args.layer_only_steps, args.steps)}: L_layer alone, {rest}")
    print_networks({args.name: net, "teacher": teacher, "unet": sd.unet, "vae": sd.vae, "text encoder": sd.text})

    # --- The loop ---
    cache = LatentCache(sd.vae, len(data), size)
    passes = batches(data, args.batch_size, args.seed, first=step * args.accumulate, workers=2 if args.device.type == "cuda" else 0)
    images, weight_of = args.batch_size * args.accumulate, {"L_d": args.loss_d, "L_td": args.loss_td, "L_layer": args.loss_layer}
    log = Log(args.out)

    if args.resume:
        write_outputs(args, sd, net, data, step)  # the run may have been killed after it saved this step and before it wrote them
    with tqdm(total=args.steps * images, initial=step * images, unit="image", desc="training", smoothing=0.05) as progress, Stop() as stop:
        while step < args.steps and not stop.signal:
            optimizer.param_groups[0]["lr"] = lr * min(1.0, (args.steps - step) / args.decay if args.decay else 1.0)
            optimizer.zero_grad()
            totals: dict[str, float] = {}
            for _ in range(args.accumulate):
                losses = losses_of(args, sd, net, teacher, next(passes), cache, generator, layer_only=step < args.layer_only_steps)
                losses["loss"] = sum(weight_of[name] * value for name, value in losses.items())
                (losses["loss"] / args.accumulate).backward()
                for name, value in losses.items():
                    totals[name] = totals.get(name, 0.0) + value.item() / args.accumulate
            totals["gradient"] = torch.nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None]).item()
            for name in ("loss", "gradient"):  # before the weights are touched: what was saved, and what is saved next, is sound
                if not math.isfinite(totals[name]):
                    problem = f"the {name} became {totals[name]} at step {step + 1}"
                    raise FloatingPointError(f"{problem}; the state last saved in {args.out} is kept. Try a lower --lr")
            optimizer.step()
            step += 1
            progress.update(images)
            progress.set_postfix(loss=f"{totals['loss']:.4f}", refresh=False)
            log.write({"step": step, **totals, "lr": optimizer.param_groups[0]["lr"]})
            if step % args.save_every == 0 or step == args.steps or stop.signal:
                save(args.out, step, parts)
                write_outputs(args, sd, net, data, step)
            elif step % args.sample_every == 0:
                draw_samples(args, sd, net, data, step)
    log.file.close()
    if stop.signal:
        print(f"stopped by {stop.signal.name} after step {step} of {args.steps}, which is saved: go on with --resume")
        if stop.signal == signal.SIGINT:
            raise KeyboardInterrupt
        return
    report(args, sd, net, teacher, size)
    weights = args.out / "controlnet.safetensors"
    base = "" if args.checkpoint == TINY / "sd.safetensors" else f" --checkpoint {args.checkpoint}"
    base += f" --prediction {args.prediction}" if args.prediction else ""
    print(f"\npicture: {args.out / 'samples' / f'{step:06}.png'}\nweights: {weights}")
    print(f'try it:  python sample.py --controlnet {weights}{base} --condition {args.out}/samples/condition.png --prompt "{shown(data)[0]["prompt"]}"')


def write_outputs(args, sd: StableDiffusion, net: ControlNet, data, step: int) -> None:
    """The control network by itself, for every other program, and the picture of a step where one is due and not there."""
    save_controlnet(args.out / "controlnet.safetensors", net, base=args.checkpoint.name, step=step)
    if (step % args.sample_every == 0 or step == args.steps) and not (args.out / "samples" / f"{step:06}.png").exists():
        draw_samples(args, sd, net, data, step)


def start(args: argparse.Namespace, sd: StableDiffusion, teacher: ControlNet | None, generator: torch.Generator) -> ControlNet:
    """The control network at step 0, as --init says. Fresh weights are drawn from `generator`."""
    if args.ablation:
        return ABLATIONS[args.ablation](sd.unet, generator)
    if args.init == "teacher":
        return from_teacher(build_student(args.student, sd.unet, generator), teacher, generator, args.copy_zero_convs)
    if args.init == "base":
        if args.student not in (None, "original"):
            raise ValueError("--init base copies the SD encoder, which a student's layers do not fit: use random or a control network file")
        net = ControlNet.from_unet(sd.unet, generator=generator)
        net.architecture = args.student or net.architecture
        return net
    if args.init == "random":
        return build_student(args.student, sd.unet, generator) if args.student else initialize(ControlNet(sd.unet.config), generator)
    net = load_controlnet(args.init, sd.unet)
    if args.student:
        with torch.device("meta"):
            wanted = build_student(args.student, sd.unet)
        if net.config != wanted.config or shapes_of(net.state_dict()) != shapes_of(wanted.state_dict()):
            raise ValueError(f"expected a {args.student} file in --init, {args.init} holds another architecture: {net.architecture}, {net.config}")
    net.architecture = args.student or net.architecture
    return net


def losses_of(args, sd: StableDiffusion, net: ControlNet, teacher: ControlNet | None, batch: dict, cache: LatentCache,
              generator: torch.Generator, layer_only: bool) -> dict[str, Tensor]:
    """The losses of one forward pass by name: L_d, and with a teacher L_td and L_layer. Every draw is made on the CPU, whatever the device."""
    count, device = len(batch["index"]), next(net.parameters()).device

    def noise() -> Tensor:
        return torch.randn((count, 4, *(side // 8 for side in batch["condition"].shape[-2:])), generator=generator)

    x0, eps = cache.latents(batch["index"], batch["target"], noise()), noise()
    t = torch.randint(TIMESTEPS, (count,), generator=generator)
    dropped = torch.rand(count, generator=generator) < args.drop_prompt  # without a prompt the condition has to say it all (paper, section 3.4)
    with torch.no_grad():
        context = sd.text.encode(["" if drop else prompt for drop, prompt in zip(dropped, batch["prompt"], strict=True)])
    x_t, target = q_sample(x0, t, eps).to(device), training_target(x0, t, eps, sd.prediction).to(device)
    t, condition = t.to(device), batch["condition"].to(device)

    losses: dict[str, Tensor] = {}
    with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        with torch.no_grad():  # the frozen encoder does not see the control: it runs once, for student and teacher, if anyone needs it
            needed = not layer_only or "encoder" in (net.connects_to, teacher.connects_to)
            features = sd.unet.encode(x_t, t, context) if needed else None

        def control_of(network: ControlNet) -> list[Tensor]:
            return network.control(sd.unet, features, x_t, condition, t) if features else network(x_t, condition, t, context)
        control = control_of(net)
        if teacher:
            with torch.no_grad():
                control_t = control_of(teacher)
            losses["L_layer"] = layerwise_loss(control, control_t)
            if layer_only:
                return losses
        eps_s = sd.unet.decode(features, control)  # frozen too, but the gradient has to pass through it to reach the control
        losses["L_d"] = diffusion_loss(eps_s.float(), target)
        if teacher:
            with torch.no_grad():
                eps_t = sd.unet.decode(features, control_t)
            losses["L_td"] = teacher_loss(eps_s.float(), eps_t.float())
    return losses


# --- What a run shows ---


def print_networks(networks: dict[str, torch.nn.Module | None]) -> None:
    """A table of what learns and what is frozen."""
    for name, network in networks.items():
        if network is not None:
            parameters = list(network.parameters())
            word = "trainable" if any(p.requires_grad for p in parameters) else "frozen"
            print(f"{word:10} {name:16} {sum(p.numel() for p in parameters):>13,} parameters")


def shown(data: Circles | Folder) -> list[dict]:
    """The samples of the pictures: four held-out circles, or the first four of a folder."""
    if isinstance(data, Circles):
        data = Circles(data.size, 4, first=HELD_OUT)
    return [data[i] for i in range(min(4, len(data)))]


@torch.no_grad()
def draw_samples(args, sd: StableDiffusion, net: ControlNet, data, step: int) -> None:
    """Write samples/STEP.png, Prompt | Control | Reconstruction | Samples: the same four samples and noises every time."""
    samples, device = shown(data), next(net.parameters()).device
    condition = torch.stack([s["condition"] for s in samples]).to(device)
    context = sd.text.encode([s["prompt"] for s in samples])
    latents = initial_latents(len(samples), data.size, data.size, torch.Generator().manual_seed(args.seed)).to(device)
    net.eval()
    pictures = generate(sd.unet, sd.vae, [Control(net, condition)], latents, context, sd.text.encode([""]).expand_as(context),
                        steps=SAMPLE_STEPS, guidance=sd.guidance, prediction=sd.prediction)
    net.train()
    means, _ = sd.vae.encode(torch.stack([s["target"] for s in samples]).to(device))
    reconstructions = (sd.vae.decode(means) / 2 + 0.5).clamp(0, 1)
    rows = [[s["prompt"], s["condition"], r, p] for s, r, p in zip(samples, reconstructions.cpu(), pictures.cpu(), strict=True)]
    write_png(args.out / "samples" / "condition.png", to_image(samples[0]["condition"]))
    write_png(args.out / "samples" / f"{step:06}.png", grid(["Prompt", "Control", "Reconstruction", "Samples"], rows, cell=max(128, min(data.size, 256))))


def report(args, sd: StableDiffusion, net: ControlNet, teacher: ControlNet | None, size: int) -> None:
    """Control fidelity on held-out circles: the base, the teacher, and what was trained, side by side."""
    if args.data:
        print("control fidelity is measured on generated circles only: look at the samples")
        return
    networks = {"base without control": None} | ({"teacher": teacher} if teacher else {}) | {args.name: net}
    net.eval()
    print_fidelity(sd, networks, count=FIDELITY_SAMPLES, size=size, steps=SAMPLE_STEPS)


if __name__ == "__main__":
    sys.exit(run(main))
