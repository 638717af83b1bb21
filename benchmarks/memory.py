"""How much memory does a training step need? python -m benchmarks.memory

Peak memory of one optimizer step at Stable Diffusion 1.5's size, 512 x 512 pixels, by setting:
weights (UNet, teacher, autoencoder, text encoder, control network), gradients, AdamW's two moments,
activations and temporaries; latents and text states come from the cache. On a GPU it is measured
(torch.cuda.max_memory_allocated); elsewhere it is counted: the step runs on tensors that have a
shape and no content (FakeTensorMode), and the bytes of those that are alive are added up. What
libraries take beside tensors (CUDA's own context, workspaces of convolutions, fragmentation) is not
in it: `RESERVE` is left for it where the table says on which card a step fits. The count was
checked on the tiny model against the allocations that PyTorch's profiler sees on the CPU: the peaks
differ by 0.6 % at most. """

import sys
import weakref
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.cli import Parser, positive, run
from controlnet import ControlNet
from evaluation.costs import BASES, TOKENS
from kd.students import build_student
from training.step import Step
from unet import UNet
from vae import VAE

TEXT_PARAMETERS = {"sd15": 123_060_480, "sd21": 352_984_064, "tiny": 3_267_136}
CARDS = (8, 12, 16, 24, 32, 40, 48, 80)  # GiB
RESERVE = 1.0                            # GiB of a card that are not for tensors


class Setting(NamedTuple):
    """A row of the table."""

    name: str
    student: str | None = "reduced_layer"  # None: a ControlNet, without teacher
    mode: str = "default"
    layer_only: bool = False


SETTINGS = (
    Setting("reduced_layer"),
    Setting("reduced_layer, L_layer alone", layer_only=True),
    Setting("reduced_layer, --mode small", mode="small"),
    Setting("ControlNet", student=None),
    Setting("ControlNet, --mode small", student=None, mode="small"),
    Setting("ControlNet, --mode large", student=None, mode="large"),
)


class LiveBytes(TorchDispatchMode):
    """Adds up the bytes of all tensors that are alive, those that share memory once, and keeps the
    peak."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return outputs

    def add(self, storage: torch.UntypedStorage) -> None:
        if storage not in self.known:
            self.known.add(storage)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, storage.nbytes())

    def _freed(self, size: int) -> None:
        self.now -= size


@contextmanager
def norms_in_float32() -> Iterator[None]:
    """Autocast on the CPU leaves norms in half precision; CUDA's, whose memory is to be counted,
    computes them, and keeps what they say, in float32."""
    norms = {name: getattr(functional, name) for name in ("group_norm", "layer_norm")}
    for name, norm in norms.items():
        setattr(
            functional,
            name,
            lambda x, shape, weight, bias, eps, norm=norm: norm(x.float(), shape, weight.float(),
                                                                bias.float(), eps))
    try:
        yield
    finally:
        for name, norm in norms.items():
            setattr(functional, name, norm)


def build(base: str, setting: Setting, bf16: bool, checkpointing: bool) -> nn.ModuleDict:
    """All networks of a run, on the meta device: shapes and dtypes."""
    config, vae_config, _ = BASES[base]
    with torch.device("meta"):
        unet, net = UNet(config), ControlNet(config)
        net = build_student(setting.student, unet) if setting.student else net
        frozen = nn.ModuleDict({
            "text": nn.Linear(TEXT_PARAMETERS[base], 1, bias=False), "teacher":
            ControlNet(config) if setting.student else nn.Identity()
        })
        networks = nn.ModuleDict({
            "net": net, "vae": VAE(vae_config), "unet": unet, "frozen": frozen
        }).requires_grad_(False)
    if bf16:
        frozen.to(torch.bfloat16)
        unet.to(torch.float32 if setting.mode == "large" else torch.bfloat16)
    unet.checkpointing = net.checkpointing = checkpointing
    return networks


def one_step(networks: nn.ModuleDict, setting: Setting, size: int, batch: int, bf16: bool) -> None:
    """What an optimizer step holds and does. The optimizer's own update needs nothing beside its
    two moments a weight: it is fused."""
    unet, net, teacher, device = networks["unet"], networks["net"], networks["frozen"][
        "teacher"], next(networks.parameters()).device.type
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    step = Step(unet, net, teacher if setting.student else None, bf16=bf16)
    if setting.mode == "small":  # connect_only_middle looks at values, which there are none of
        step.mode, net.only_middle = "small", True
        net.zero_convs.requires_grad_(False)
    if setting.mode == "large":
        step.unlock()
    trained = [p for p in step.parameters() if p.requires_grad]
    moments = [torch.zeros_like(p) for p in trained for _ in range(2)]
    shapes = ((4, size // 8, size // 8), (4, size // 8, size // 8),
              (TOKENS, unet.config.context_dim), (3, size, size))
    x_t, target, context, condition = (
        torch.zeros((batch, *shape), device=device) for shape in shapes)
    with norms_in_float32() if bf16 and device == "cpu" else nullcontext():
        losses, _ = step(x_t, target, torch.zeros(batch, dtype=torch.int64, device=device), context,
                         condition, setting.layer_only)
        sum(losses.values()).backward()  # inside, because checkpointing computes forward again
    assert len(moments) == 2 * sum(p.grad is not None for p in trained)


def peak_bytes(base: str, setting: Setting, bf16: bool, checkpointing: bool, batch: int) -> int:
    """The most that is alive at any moment of a step, in bytes: measured where there is a GPU, else
    counted."""
    networks, size = build(base, setting, bf16, checkpointing), BASES[base][-1]
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        one_step(networks.to_empty(device="cuda"), setting, size, batch, bf16)
        return torch.cuda.max_memory_allocated()
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as counter:
        one_step(networks.to_empty(device="cpu"), setting, size, batch, bf16)
        return counter.peak


def card(peak: int) -> str:
    """The smallest card that the step fits on, in GB."""
    return next((str(size) for size in CARDS if peak / 2**30 + RESERVE <= size), "more")


def parse(argv: list[str] | None) -> Namespace:
    p = Parser(__doc__)
    p.add_argument(
        "--base", choices=list(BASES), default="sd15", help="whose shape (default: sd15)")
    p.add_argument(
        "--batch-sizes",
        type=positive,
        nargs="+",
        default=[1, 4],
        help="pictures a step (default: 1 4)")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    how = f"measured on {torch.cuda.get_device_name()}" if torch.cuda.is_available(
    ) else "counted from tensor sizes, not measured"
    print(f"{args.base}, peak of an optimizer step in GiB (and the smallest card for it), {how}")
    width = 12 * len(args.batch_sizes)
    print(f"{'':30}" + "".join(f"{word:>{width}}"
                               for word in ("float32", "checkpointing", "bf16", "both")))
    print(f"{'':30}" + 4 * "".join(f"{f'batch {batch}':>12}" for batch in args.batch_sizes))
    for setting in SETTINGS:
        cells = []
        for bf16 in (False, True):
            for checkpointing in (False, True):
                for batch in args.batch_sizes:
                    peak = peak_bytes(args.base, setting, bf16, checkpointing, batch)
                    cells.append(f"{peak / 2**30:.1f} ({card(peak)})")
        print(f"{setting.name:30}" + "".join(f"{cell:>12}" for cell in cells), flush=True)


if __name__ == "__main__":
    sys.exit(run(main))
