"""How fast is this beside diffusers? python -m benchmarks.speed guided picture training

    guided        the UNet and a ControlNet, for both halves of classifier-free guidance
    picture       20 such steps with DDIM and the decoding of the latents; text states are given
    training      an optimizer step of a ControlNet
    distillation  an optimizer step of a student, with all losses and with L_layer alone
    students      every control network alone, a guided step and a picture with it (ours only)
    start-up      seconds until the first step is possible: importing, loading float16 files
    goals         time until a student has 90 and 95 % of its teacher's overlap, from
                  docs/distillation.json

Both sides run in this process and take turns, on the same random weights: no file is needed. The
differences are the largest ones of the results (in training: of the gradients), relative to the
largest value.
"""

import json
import os
import subprocess
import sys
import tempfile
import traceback
from argparse import Namespace
from functools import partial
from pathlib import Path
from statistics import mean, median

from common.cli import Parser, add_device_option, answer, picture_side, positive, run
from kd import STUDENTS

SECTIONS = ("guided", "picture", "training", "distillation", "students", "start-up", "goals")
STEPS, GUIDANCE = 20, 7.5
ROOT = Path(__file__).parent.parent


def parse(argv: list[str] | None) -> Namespace:
    p = Parser(__doc__)
    p.add_argument("sections", nargs="*", metavar="SECTION", help="what to measure (default: all)")
    p.add_argument("--base", choices=["sd15", "tiny"], default="sd15",
                   help="the base model's shape (default: sd15)")
    p.add_argument("--resolution", type=picture_side, help="side of the pictures, divisible by 8 "
                   "(default: 512 on CUDA, 256 on a CPU; tiny: 64)")
    p.add_argument("--batch-sizes", type=positive, nargs="+",
                   help="pictures at once (default: 1 8 on CUDA, 1 on a CPU)")
    p.add_argument("--repeats", type=positive, help="runs a median is over; a third of them for "
                   "pictures and start-up (default: 9 on CUDA, 3 on a CPU)")
    p.add_argument("--precision", choices=["float32", "tf32", "bf16"], default="float32",
                   help="tf32: float32 whose products a GPU may round (default: float32)")
    p.add_argument("--compile", action="store_true", help="both sides compiled too")
    p.add_argument("--channels-last", action="store_true",
                   help="ours with its tensors channels-last too")
    p.add_argument("--untuned", action="store_true", help="leave PyTorch's settings as they are, "
                   "as in diffusers' examples: no trial of convolution algorithms on CUDA")
    p.add_argument("--student", default="reduced_layer",
                   choices=[name for name in STUDENTS if name != "mlp"],
                   help="which student to distil; diffusers has no place for mlp's outputs "
                        "(default: reduced_layer)")
    p.add_argument("--threads", type=positive, help="of the CPU (default: PyTorch's choice)")
    add_device_option(p)
    args = p.parse_args(argv)
    if unknown := set(args.sections) - set(SECTIONS):
        p.error(f"expected sections among {', '.join(SECTIONS)}, got {', '.join(unknown)}")
    args.sections = args.sections or list(SECTIONS)
    from common.devices import device
    args.device = device(args.device)
    on_cuda = args.device.type == "cuda"
    args.resolution = args.resolution or (
        64 if args.base == "tiny" else 512 if on_cuda else 256)
    args.batch_sizes = args.batch_sizes or ([1, 8] if on_cuda else [1])
    args.repeats = args.repeats or (9 if on_cuda else 3)
    return args


if __name__ == "__main__":  # before PyTorch is imported
    answer(parse)

import diffusers
import torch
from torch import Tensor, nn

from benchmarks import speed_diffusers
from benchmarks.costs import NETWORKS
from benchmarks.distillation_results import TEACHER, goal_reached, grouped
from benchmarks.speed_measure import (
    CHANNELS_LAST,
    Side,
    calls,
    channels_last,
    compare,
    dtype_of,
    matmul_rate,
    name_compiled,
    random_base,
    random_control,
    random_inputs,
    seconds,
    twin,
)
from benchmarks.speed_training import distillation, training
from common.devices import CudaGraph, compile_blocks, tune
from controlnet import ControlNetwork
from controlnet.sampling import Control, controlled, generate
from diffusion import Sampling
from unet import UNet
from unet.attention import SpatialTransformer
from unet.blocks import ResBlock
from vae import VAE
from vae.model import ResnetBlock
from weights import save_controlnet, save_stable_diffusion

# --- Sampling ---


@torch.no_grad()
def sampling(args: Namespace) -> None:
    """Guided steps and pictures: in one go, so that nothing is compiled twice."""
    dtype = dtype_of(args)
    sd, net = random_base(args), random_control("controlnet", args)
    ours = [network.to(dtype) for network in (sd.unet, sd.vae, net)]
    theirs = [speed_diffusers.converted(network, dtype) for network in ours]
    sides = [("ours", ours_sampling, ours), ("diffusers", diffusers_sampling, theirs)]
    if args.channels_last:
        sides.append((CHANNELS_LAST, ours_sampling, list(map(channels_last, ours))))
    for batch in args.batch_sizes:
        if args.compile:
            torch._dynamo.reset()
        compiled = [(name, make, compiled_twins(networks)) for name, make, networks in sides
                    ] if args.compile else []
        for section in ("guided", "picture"):
            if section in args.sections:
                pictures = section == "picture"
                made = [make(name, *networks, args, batch, pictures)
                        for name, make, networks in sides + compiled]
                name_compiled(made[len(sides):], made)
                what = f"picture, {STEPS} steps" if pictures else "guided step"
                compare(f"{what}, batch {batch}", made, args,
                        -(-args.repeats // 3) if pictures else args.repeats)


def compiled_twins(networks: list[nn.Module]) -> list[nn.Module]:
    """UNet, autoencoder and ControlNet: ours as sample.py --compile does it; diffusers' UNet and
    ControlNet whole, as in its documentation."""
    unet, vae, net = twins = list(map(twin, networks))
    if isinstance(unet, UNet):
        for network in twins:
            compile_blocks(network, (ResBlock, SpatialTransformer, ResnetBlock))
    else:
        unet.compile()
        net.compile()
    return twins


def ours_sampling(name: str, unet: UNet, vae: VAE, net: ControlNetwork, args: Namespace,
                  batch: int, pictures: bool) -> Side:
    compiled = any(module._compiled_call_impl for module in unet.modules())
    recorded = compiled and args.device.type == "cuda"  # as in sample.py
    x = random_inputs(args, batch)
    dtype = dtype_of(args)
    context, negative = x["context"].to(dtype), x["negative"].to(dtype)
    control = Control(net, x["condition"])
    step = controlled(unet, [control.encoded(x["noise"].to(dtype))])
    latents = x["noise"].to(dtype).repeat(2, 1, 1, 1)
    timesteps, both = torch.full((2 * batch,), 500, device=args.device), torch.cat(
        [negative, context])

    if recorded:
        step = CudaGraph(step)

    def picture() -> Tensor:
        return generate(unet, vae, [control], x["noise"], context, negative,
                        Sampling(STEPS, GUIDANCE), cuda_graph=recorded)

    if pictures:
        return Side(name, picture, modules=[unet, vae, net])
    return Side(name, lambda: step(latents, timesteps, both), modules=[unet, net],
                calls=calls(args))


def diffusers_sampling(name: str, unet: nn.Module, vae: nn.Module, net: nn.Module,
                       args: Namespace, batch: int, pictures: bool) -> Side:
    x = random_inputs(args, batch)
    dtype = dtype_of(args)
    context, negative = x["context"].to(dtype), x["negative"].to(dtype)
    inputs = (x["noise"].to(dtype).repeat(2, 1, 1, 1), torch.tensor(500, device=args.device),
              torch.cat([negative, context]), x["condition"].to(dtype).repeat(2, 1, 1, 1))
    pipe = speed_diffusers.pipeline(unet, vae, net)

    def picture() -> Tensor:
        return pipe(image=x["condition"], prompt_embeds=context, negative_prompt_embeds=negative,
                    latents=x["noise"].to(dtype), num_inference_steps=STEPS,
                    guidance_scale=GUIDANCE, output_type="pt").images

    if pictures:
        return Side(name, picture, modules=[unet, vae, net])
    return Side(name, lambda: speed_diffusers.guided_step(unet, net, *inputs),
                modules=[unet, net], calls=calls(args))


@torch.no_grad()
def students(args: Namespace) -> None:
    """Times of every control network."""
    dtype = dtype_of(args)
    sd = random_base(args)
    unet, vae = sd.unet.to(dtype), sd.vae.to(dtype)
    for batch in args.batch_sizes:
        print(f"\ncontrol networks, batch {batch}\n{'':28}{'M, merged':>10}{'control ms':>12}"
              f"{'step ms':>10}{'picture ms':>12}", flush=True)
        for name in NETWORKS:
            net = random_control(name, args).to(dtype).for_inference().requires_grad_(False)
            x = random_inputs(args, batch)
            inputs = [x[key].to(dtype).repeat(2, *[1] * (x[key].ndim - 1))
                      for key in ("noise", "condition", "timesteps", "context")]
            features = unet.encode(inputs[0], inputs[2], inputs[3])
            works = [
                partial(net.control, *inputs, unet, features),
                ours_sampling(name, unet, vae, net, args, batch, pictures=False).work,
                ours_sampling(name, unet, vae, net, args, batch, pictures=True).work]
            times = []
            for work, in_a_row in zip(works, (calls(args), calls(args), 1), strict=True):
                work()
                repeats = args.repeats if in_a_row > 1 else -(-args.repeats // 3)
                times.append(1e3 * median(
                    seconds(work, args.device, in_a_row) for _ in range(repeats)))
            size = sum(p.numel() for p in net.parameters()) / 1e6
            print(f"{name:28}{size:>10.1f}{times[0]:>12.1f}{times[1]:>10.1f}{times[2]:>12.1f}",
                  flush=True)


# --- Start-up ---

OURS = """
from time import perf_counter
start = perf_counter()
import sample
imported = perf_counter()
settings, _ = sample.parse({options})
sd, networks = sample.load(settings)
"""
DIFFUSERS = """
from time import perf_counter
start = perf_counter()
import torch
from diffusers import StableDiffusionControlNetPipeline
imported = perf_counter()
pipe = StableDiffusionControlNetPipeline.from_pretrained({folder!r}, torch_dtype=torch.{dtype})
pipe.to("{device}")
"""
END = """
import json, torch
if torch.cuda.is_available():
    torch.cuda.synchronize()
print(json.dumps([imported - start, perf_counter() - imported]))
"""


def start_up(args: Namespace) -> None:
    """In processes of their own, from files that the system has read before."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sd, net = random_base(args), random_control("controlnet", args)
        save_stable_diffusion(folder / "sd.safetensors", sd)
        save_controlnet(folder / "controlnet.safetensors", net, dtype=torch.float16)
        speed_diffusers.save_folder(folder / "diffusers", [sd.unet, sd.vae, sd.text, net])
        del sd, net
        device = args.device.type
        options = ["--checkpoint", str(folder / "sd.safetensors"), "--device", device,
                   "--controlnet", str(folder / "controlnet.safetensors"),
                   "--precision", args.precision.replace("tf32", "float32")]
        children = {
            "ours": OURS.format(options=options),
            "diffusers": DIFFUSERS.format(folder=str(folder / "diffusers"), device=device,
                                          dtype=str(dtype_of(args)).removeprefix("torch."))}
        times = {side: [] for side in children}
        for _ in range(1 + -(-args.repeats // 3)):
            for side, program in children.items():
                times[side].append(child_seconds(program + END, args))
        print(f"\nstart-up{'':20}{'import s':>10}{'load s':>10}{'sum s':>10}{'times ours':>12}")
        for side, measured in times.items():
            imports, loads = (median(column) for column in zip(*measured[1:], strict=True))
            total = median(map(sum, measured[1:]))
            print(f"{side:28}{imports:>10.2f}{loads:>10.2f}{total:>10.2f}"
                  f"{total / median(map(sum, times['ours'][1:])):>12.2f}", flush=True)


def child_seconds(program: str, args: Namespace) -> list[float]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    if args.threads:
        environment["OMP_NUM_THREADS"] = str(args.threads)
    child = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, text=True,
                           capture_output=True, check=False)
    if child.returncode:
        raise RuntimeError(f"a start-up failed: {child.stderr[-2000:]}")
    return json.loads(child.stdout.splitlines()[-1])


# --- Time to a student ---


def goals(args: Namespace) -> None:
    """From the published experiment, which `python -m benchmarks.distillation` repeats."""
    results = json.loads((ROOT / "docs" / "distillation.json").read_text())
    whole = results["others"][TEACHER]["along a training"]["overlap"]
    groups = grouped(results["rows"])
    print(f"\nseconds of training (and pictures seen) until a student first has a share of its "
          f"teacher's\noverlap, {whole:.3f}: the means over the seeds; times faster than alone")
    print(f"{'':28}" + "".join(f"{f'{share:.0%}':>20}{'faster':>8}" for share in (0.9, 0.95)))
    for (student, variant), rows in groups.items():
        line = f"{f'{student}, {variant}':28}"
        for share in (0.9, 0.95):
            reached = mean_goal(rows, share * whole)
            alone = mean_goal(groups.get((student, "alone"), []), share * whole)
            cell = f"{reached[1]:,.0f} ({reached[0]:,.0f})" if reached else "never"
            faster = f"{alone[1] / reached[1]:.1f}" if alone and reached else "-"
            line += f"{cell:>20}{faster:>8}"
        print(line, flush=True)


def mean_goal(rows: list[dict], overlap: float) -> tuple[float, float] | None:
    """Images and seconds; None if a training never gets there."""
    reached = [goal_reached(row, overlap) for row in rows]
    if not reached or None in reached:
        return None
    return tuple(mean(column) for column in zip(*reached, strict=True))


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if not args.untuned:
        tune(args.resolution, "float32" if args.precision == "float32" else "bf16")
    if args.threads:
        torch.set_num_threads(args.threads)
    machine = f"CPU, {torch.get_num_threads()} threads"
    if args.device.type == "cuda":
        machine = torch.cuda.get_device_name()
    args.matmul_rate = matmul_rate(args)
    print(f"{args.base}, {args.resolution} pixels, {args.precision}, {machine}, torch "
          f"{torch.__version__}, diffusers {diffusers.__version__}; medians of {args.repeats}; "
          f"share: of {args.matmul_rate / 1e12:.3g} TFLOP/s in a large matrix product", flush=True)
    sections = {"guided": sampling, "picture": sampling, "training": training,
                "distillation": distillation, "students": students, "start-up": start_up,
                "goals": goals}
    failed = []
    for section in dict.fromkeys(sections[name] for name in args.sections):
        try:
            section(args)
        except Exception as problem:  # the others are still worth their time
            traceback.print_exc()
            failed.append(f"{section.__name__} ({problem})")
    if failed:
        raise ValueError(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    sys.exit(run(main))
