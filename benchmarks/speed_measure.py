"""How `benchmarks.speed` measures: sides that take turns, random networks and inputs."""

from argparse import Namespace
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn

from benchmarks.costs import BASES
from common.devices import DTYPES
from controlnet import ControlNet, ControlNetwork
from diffusion import TIMESTEPS
from evaluation.costs import count_macs
from kd.students import BUILDERS
from text import CLIP_VIT_L, TOKENS, CLIPText
from text.clip import TINY_TEXT
from unet import UNet
from vae import DOWNSCALE, VAE
from weights import StableDiffusion

CHANNELS_LAST = "ours, channels-last"


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


def channels_last(network: nn.Module) -> nn.Module:
    """A copy with the layout in which a pixel's channels are neighbours in memory."""
    return deepcopy(network).to(memory_format=torch.channels_last)


def dtype_of(args: Namespace) -> torch.dtype:
    return DTYPES.get(args.precision, torch.float32)


def calls(args: Namespace) -> int:
    return 5 if args.device.type == "cuda" else 1


def name_compiled(compiled: list[Side], eager: list[Side]) -> None:
    for side, same in zip(compiled, eager, strict=False):
        side.name, side.same = f"{same.name}, compiled", same
