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
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from time import perf_counter

from common.cli import Parser, add_device_option, answer, picture_side, positive, run

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
    p.add_argument("--untuned", action="store_true", help="leave PyTorch's settings as they are, "
                   "as in diffusers' examples: no trial of convolution algorithms on CUDA")
    p.add_argument("--student", default="reduced_layer",
                   help="which student to distil (default: reduced_layer)")
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

import train
from benchmarks import speed_diffusers
from benchmarks.costs import BASES, NETWORKS
from benchmarks.distillation_results import TEACHER, goal_reached, grouped
from common.devices import DTYPES, compile_blocks, tune
from controlnet import ControlNet, ControlNetwork
from controlnet.sampling import Control, controlled, generate
from diffusion import TIMESTEPS, q_sample
from evaluation.costs import count_macs
from kd.students import BUILDERS
from text import CLIP_VIT_L, TOKENS, CLIPText
from text.clip import TINY_TEXT
from training import settings as train_settings
from training.memory import peak_bytes
from unet import UNet
from unet.attention import SpatialTransformer
from unet.blocks import ResBlock
from vae import DOWNSCALE, VAE, sample_latents
from vae.model import ResnetBlock
from weights import StableDiffusion, save_controlnet, save_stable_diffusion

# --- What is measured, and how ---


@dataclass
class Side:
    """One of those that take turns."""

    name: str
    work: Callable[[], object]
    check: Callable[[], list[Tensor]] | None = None   # makes what is compared (default: work)
    modules: list[nn.Module] = field(default_factory=list)
    optimizer: torch.optim.Optimizer | None = None
    same: "Side | None" = None  # if this one is compiled: the same, not compiled
    calls: int = 1              # in a row that one time is measured over
    # What is found out: of a call; of the first one, with what is compiled for it; relative.
    flops: int = 0
    first: float = 0.0
    peak: int | None = None
    difference: float = 0.0

    def stored_bytes(self) -> int:
        """Of weights and of the optimizer's moments."""
        tensors = [t for module in self.modules for t in (*module.parameters(), *module.buffers())]
        if self.optimizer:
            tensors += [t for state in self.optimizer.state.values() for t in state.values()]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Of one call, when so many are made in a row."""
    wait(device)
    start = perf_counter()
    for _ in range(calls):
        work()
    wait(device)
    return (perf_counter() - start) / calls


def difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest absolute one, over the largest absolute value."""
    largest = max(b.abs().max() for b in expected)
    pairs = zip(actual, expected, strict=True)
    return (max((a.float() - b.float()).abs().max() for a, b in pairs) / largest).item()


def matmul_rate(args: Namespace) -> float:
    """Operations per second of a matrix product, the most that this machine reaches."""
    size = 8192 if args.device.type == "cuda" else 1024
    dtype = DTYPES.get(args.precision, torch.float32)
    a = torch.randn(size, size, device=args.device).to(dtype)
    times = [seconds(lambda: a @ a, args.device, calls=10) for _ in range(5)]
    return 2 * size**3 / min(times)


def compare(title: str, sides: list[Side], args: Namespace, repeats: int | None = None) -> None:
    """Print one line a side. The first is what the others are compared with."""
    print(f"\n{title}\n{'':28}{'ms':>10}{'times ours':>12}{'difference':>12}{'GFLOP':>12}"
          f"{'TFLOP/s':>9}{'share':>7}{'peak GiB':>10}{'compile s':>11}", flush=True)
    expected = None
    for side in sides:
        start = perf_counter()
        results = side.check() if side.check else [side.work()]
        wait(args.device)
        side.first = perf_counter() - start
        side.difference = difference(results, expected) if expected else 0.0
        expected = expected or results
    del results, expected
    for side in sides:
        side.flops = side.same.flops if side.same else 2 * count_macs(side.work)
        if side.same:
            side.work()  # another warm-up, in place of the run that is counted
        side.peak = peak_bytes_of(side, args.device)
    times = [[] for _ in sides]
    for _ in range(repeats or args.repeats):
        for side, measured in zip(sides, times, strict=True):
            measured.append(seconds(side.work, args.device, side.calls))
    for side, measured in zip(sides, times, strict=True):
        duration = median(measured)
        rate = side.flops / duration
        print(f"{side.name:28}{1e3 * duration:>10.1f}{duration / median(times[0]):>12.2f}"
              f"{side.difference:>12.1e}{side.flops / 1e9:>12,.0f}{rate / 1e12:>9.3g}"
              f"{rate / args.matmul_rate:>7.0%}"
              f"{f'{side.peak / 2**30:.2f}' if side.peak else '-':>10}"
              f"{f'{side.first:.0f}' if side.same else '-':>11}", flush=True)


def peak_bytes_of(side: Side, device: torch.device) -> int | None:
    """What the side stores, and the most that a call needs beside it. On CUDA only."""
    if device.type != "cuda":
        return None
    wait(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    side.work()
    wait(device)
    return side.stored_bytes() + torch.cuda.max_memory_allocated() - before


# --- Networks and inputs ---


@torch.no_grad()
def random_weights(make: Callable[[], nn.Module], device: torch.device, seed: int = 0) -> nn.Module:
    """A network none of whose weights is zero and that keeps the size of a signal, frozen."""
    with torch.device("meta"):
        network = make()
    network.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            bound = (3 / parameter[0].numel()) ** 0.5
            parameter.uniform_(-bound, bound, generator=generator)
        else:
            middle = 1.0 if name.endswith("weight") else 0.0
            parameter.uniform_(middle - 0.1, middle + 0.1, generator=generator)
    return network.requires_grad_(False).eval()


def random_base(args: Namespace) -> StableDiffusion:
    config, vae_config, _ = BASES[args.base]
    text = TINY_TEXT if args.base == "tiny" else CLIP_VIT_L
    return StableDiffusion(
        *(random_weights(make, args.device, seed) for seed, make in enumerate((
            lambda: UNet(config), lambda: VAE(vae_config), lambda: CLIPText(text)))))


def random_control(name: str, args: Namespace, seed: int = 3) -> ControlNetwork:
    build = ControlNet if name == "controlnet" else BUILDERS[name]
    return random_weights(lambda: build(BASES[args.base][0]), args.device, seed)


def random_inputs(args: Namespace, batch: int) -> dict[str, Tensor]:
    """Of everything that any side takes, in float32."""
    generator, size = torch.Generator().manual_seed(0), args.resolution
    config = BASES[args.base][0]
    latents = (batch, config.latent_channels, size // DOWNSCALE, size // DOWNSCALE)
    states = (batch, TOKENS, config.context_dim)
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in {
        "noise": latents, "sampling_noise": latents, "context": states, "negative": states}.items()}
    for name in ("condition", "pixels"):
        inputs[name] = torch.rand(batch, 3, size, size, generator=generator)
    inputs["timesteps"] = torch.randint(TIMESTEPS, (batch,), generator=generator)
    inputs["tokens"] = torch.randint(49_000, (batch, TOKENS), generator=generator)
    return {name: tensor.to(args.device) for name, tensor in inputs.items()}


def twin(network: nn.Module) -> nn.Module:
    """The same network with the same parameters, to be compiled."""
    return deepcopy(network, {id(p): p for p in (*network.parameters(), *network.buffers())})


def dtype_of(args: Namespace) -> torch.dtype:
    return DTYPES.get(args.precision, torch.float32)


# --- Sampling ---


@torch.no_grad()
def sampling(args: Namespace) -> None:
    """Guided steps and pictures: in one go, so that nothing is compiled twice."""
    dtype = dtype_of(args)
    sd, net = random_base(args), random_control("controlnet", args)
    ours = [network.to(dtype) for network in (sd.unet, sd.vae, net)]
    theirs = [speed_diffusers.converted(network, dtype) for network in ours]
    for batch in args.batch_sizes:
        compiled = compiled_twins(ours, theirs) if args.compile else None
        for name in ("guided", "picture"):
            if name in args.sections:
                pictures = name == "picture"
                sides = [ours_sampling(*ours, args, batch, pictures),
                         diffusers_sampling(*theirs, args, batch, pictures)]
                if compiled:
                    sides += [ours_sampling(*compiled[0], args, batch, pictures),
                              diffusers_sampling(*compiled[1], args, batch, pictures)]
                    name_compiled(sides[2:], sides[:2])
                what = f"picture, {STEPS} steps" if pictures else "guided step"
                compare(f"{what}, batch {batch}", sides, args,
                        -(-args.repeats // 3) if pictures else args.repeats)


def compiled_twins(ours: list[nn.Module], theirs: list[nn.Module]) -> list[list[nn.Module]]:
    """As sample.py --compile does, and as diffusers' documentation: all of UNet and ControlNet."""
    torch._dynamo.reset()
    ours, theirs = ([twin(network) for network in networks] for networks in (ours, theirs))
    for network in ours:
        compile_blocks(network, (ResBlock, SpatialTransformer, ResnetBlock))
    for network in (theirs[0], theirs[2]):
        network.compile()
    return [ours, theirs]


def name_compiled(compiled: list[Side], eager: list[Side]) -> None:
    for side, same in zip(compiled, eager, strict=True):
        side.name, side.same = f"{side.name}, compiled", same


def ours_sampling(unet: UNet, vae: VAE, net: ControlNetwork, args: Namespace, batch: int,
                  pictures: bool) -> Side:
    x = random_inputs(args, batch)
    dtype = dtype_of(args)
    context, negative = x["context"].to(dtype), x["negative"].to(dtype)
    control = Control(net, x["condition"])
    step = controlled(unet, [control.encoded(x["noise"].to(dtype))])
    latents = x["noise"].to(dtype).repeat(2, 1, 1, 1)
    timesteps, both = torch.full((2 * batch,), 500, device=args.device), torch.cat(
        [negative, context])

    def picture() -> Tensor:
        return generate(unet, vae, [control], x["noise"], context, negative, steps=STEPS,
                        guidance=GUIDANCE)

    if pictures:
        return Side("ours", picture, modules=[unet, vae, net])
    return Side("ours", lambda: step(latents, timesteps, both), modules=[unet, net],
                calls=calls(args))


def diffusers_sampling(unet: nn.Module, vae: nn.Module, net: nn.Module, args: Namespace,
                       batch: int, pictures: bool) -> Side:
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
        return Side("diffusers", picture, modules=[unet, vae, net])
    return Side("diffusers", lambda: speed_diffusers.guided_step(unet, net, *inputs),
                modules=[unet, net], calls=calls(args))


def calls(args: Namespace) -> int:
    return 5 if args.device.type == "cuda" else 1


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
                ours_sampling(unet, vae, net, args, batch, pictures=False).work,
                ours_sampling(unet, vae, net, args, batch, pictures=True).work]
            times = []
            for work, in_a_row in zip(works, (calls(args), calls(args), 1), strict=True):
                work()
                repeats = args.repeats if in_a_row > 1 else -(-args.repeats // 3)
                times.append(1e3 * median(
                    seconds(work, args.device, in_a_row) for _ in range(repeats)))
            size = sum(p.numel() for p in net.parameters()) / 1e6
            print(f"{name:28}{size:>10.1f}{times[0]:>12.1f}{times[1]:>10.1f}{times[2]:>12.1f}",
                  flush=True)


# --- Training ---


def training(args: Namespace) -> None:
    for batch in args.batch_sizes:
        training_task(f"training step, a ControlNet, batch {batch}", None, False, args, batch)


def distillation(args: Namespace) -> None:
    for batch in args.batch_sizes:
        for losses, layer_only in (("all losses", False), ("L_layer alone", True)):
            training_task(f"training step, {args.student}, {losses}, batch {batch}", args.student,
                          layer_only, args, batch)


def training_task(title: str, student: str | None, layer_only: bool, args: Namespace,
                  batch: int) -> None:
    """Ours is what train.py's loop does between two log lines, with prepared data."""
    precision = "float32" if args.precision == "tf32" else args.precision
    options = ["--device", args.device.type, *(
        ["--student", student, "--teacher", "tiny"] if student else [])]
    settings = replace(train_settings.parse(options), precision=precision, accumulate=1,
                       loss_layer=1.0)
    sd, net = random_base(args), random_control(student or "controlnet", args)
    teacher = random_control("controlnet", args, seed=4) if student else None
    data = random_inputs(args, batch)
    with torch.no_grad():
        moments = torch.stack(sd.vae.encode(data["pixels"]), dim=1)
        data |= {"moments": moments, "mean": moments[:, 0], "std": (moments[:, 1] / 2).exp()}
        data["context"] = sd.text(data["tokens"])
    train.freeze(sd.unet, sd.vae, sd.text, teacher)
    train.set_up(settings, sd, net, teacher)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=True)
    frozen = [sd.unet, sd.vae, sd.text]
    sides = [our_step(settings, sd, net, teacher, data, optimizer, layer_only)]
    dtype = DTYPES[precision]
    theirs = [speed_diffusers.converted(network, dtype) for network in frozen]
    theirs += [speed_diffusers.converted(net, torch.float32),
               teacher and speed_diffusers.converted(teacher, dtype)]
    step = diffusers_step("diffusers", theirs, data, optimizer, args, layer_only, cached=False)
    cached = diffusers_step("diffusers, cached", theirs, data, optimizer, args, layer_only,
                            cached=True)
    sides += [step, cached]
    if args.compile:
        torch._dynamo.reset()
        twins = [network and twin(network) for network in (sd.unet, net, teacher)]
        sides.append(our_step(replace(settings, compile=True), replace(sd, unet=twins[0]),
                              *twins[1:], data, optimizer, layer_only))
        twins = [network and twin(network) for network in theirs]
        for network in (twins[0], *twins[3:]):
            if network:
                network.compile()
        sides.append(diffusers_step("diffusers, cached", twins, data, optimizer, args, layer_only,
                                    cached=True))
        name_compiled(sides[-2:], [sides[0], sides[2]])
    compare(title, sides, args)
    if args.device.type == "cuda":
        report_memory(settings, args, student, layer_only, batch)


def our_step(settings, sd: StableDiffusion, net: ControlNetwork, teacher: ControlNetwork | None,
             data: dict[str, Tensor], optimizer: torch.optim.Optimizer, layer_only: bool) -> Side:
    student, teacher_unet, trained = train.set_up(settings, sd, net, teacher)
    scaler = train.gradient_scaler(settings)
    empty_prompt, dropped = data["context"][0], torch.zeros_like(data["timesteps"]).bool()

    def backward() -> None:
        latents = sample_latents(*data["moments"].unbind(dim=1), data["sampling_noise"])
        noisy_latents = q_sample(latents, data["timesteps"], data["noise"])
        context = train.drop_prompts(data["context"], empty_prompt, dropped)
        inputs = noisy_latents, data["condition"], data["timesteps"], context
        train.forward_backward(settings, sd.unet, student, teacher_unet, inputs, data["noise"],
                               scaler, layer_only)

    def step() -> None:
        backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    modules = [module for module in (sd.unet, sd.vae, sd.text, net, teacher) if module]
    return Side("ours", step, lambda: gradients(backward, optimizer), modules, optimizer)


def diffusers_step(name: str, networks: list[nn.Module], data: dict[str, Tensor],
                   optimizer: torch.optim.Optimizer, args: Namespace, layer_only: bool,
                   cached: bool) -> Side:
    composed = speed_diffusers.Training(networks, dtype_of(args), args.device, cached, layer_only)
    trained = optimizer.param_groups[0]["params"]

    def step() -> None:
        composed.backward(data)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    unet, vae, text, net, teacher = networks
    modules = [unet, net, *([] if cached else [vae, text]), *([teacher] if teacher else [])]
    return Side(name, step, lambda: gradients(lambda: composed.backward(data), optimizer), modules,
                optimizer)


def gradients(backward: Callable[[], None], optimizer: torch.optim.Optimizer) -> list[Tensor]:
    backward()
    found = [p.grad for p in optimizer.param_groups[0]["params"] if p.grad is not None]
    optimizer.zero_grad()
    return found


def report_memory(settings: train_settings.Settings, args: Namespace, student: str | None,
                  layer_only: bool, batch: int) -> None:
    """What `benchmarks.memory` counts for the step that was measured."""
    config, vae_config, _ = BASES[args.base]
    with torch.device("meta"):
        net, teacher = (BUILDERS[student] if student else ControlNet)(config), ControlNet(config)
        text = CLIPText(TINY_TEXT if args.base == "tiny" else CLIP_VIT_L)
        networks = UNet(config), VAE(vae_config), text, net, teacher if student else None
    counted, _ = peak_bytes(train.forward_backward, settings, *networks, args.resolution, batch,
                            layer_only)
    print(f"{'ours, counted':28}{'':73}{counted / 2**30:>9.2f}", flush=True)


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
