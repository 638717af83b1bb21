"""How much memory does a training step need? python -m benchmarks.memory

Peak memory of one optimizer step at Stable Diffusion 1.5's size, 512 x 512 pixels, by setting:
weights (UNet, teacher, autoencoder, text encoder, control network), gradients, AdamW's two moments,
activations and temporaries; latents and text states come from the cache.

On a GPU it is measured (torch.cuda.max_memory_allocated). Elsewhere it is counted: the step runs on
tensors that have a shape and no content (FakeTensorMode), and the bytes of those that are alive are
added up. What libraries take beside tensors (CUDA's context, workspaces of convolutions,
fragmentation) is not counted; the table leaves RESERVE for it.
"""

import sys
import weakref
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

from common.cli import Parser, answer, positive, run


def parse(argv: list[str] | None) -> Namespace:
    p = Parser(__doc__)
    p.add_argument("--base", choices=["sd15", "sd21", "tiny"], default="sd15",
                   help="the base model's shape (default: sd15)")
    p.add_argument("--batch-sizes", type=positive, nargs="+", default=[1, 4],
                   help="pictures per step (default: 1 4)")
    return p.parse_args(argv)


if __name__ == "__main__":  # before PyTorch is imported
    answer(parse)

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.costs import BASES
from benchmarks.step import forward_backward
from controlnet import ControlledUNet, ControlNet
from evaluation.costs import dummy_inputs
from kd import build_student
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
        self.now = self.peak = 0
        self.known = weakref.WeakSet()

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
    """Autocast on the CPU leaves norms in half precision; that of CUDA, whose memory is to be
    counted, computes them and keeps their outputs in float32."""

    def in_float32(norm):
        return lambda x, shape, weight, bias, eps: norm(
            x.float(), shape, weight.float(), bias.float(), eps)

    norms = {name: getattr(F, name) for name in ("group_norm", "layer_norm")}
    for name, norm in norms.items():
        setattr(F, name, in_float32(norm))
    try:
        yield
    finally:
        for name, norm in norms.items():
            setattr(F, name, norm)


def build(base: str, setting: Setting, bf16: bool, checkpointing: bool) -> nn.ModuleDict:
    """All networks of a run on the meta device, with their dtypes, frozen."""
    config, vae_config, _ = BASES[base]
    with torch.device("meta"):
        networks = nn.ModuleDict({
            "unet": UNet(config),
            "vae": VAE(vae_config),
            "text": nn.Linear(TEXT_PARAMETERS[base], 1, bias=False),
            "teacher": ControlNet(config) if setting.student else nn.Identity(),
        })
        unet = networks["unet"]
        net = build_student(setting.student, unet) if setting.student else ControlNet(config)
    networks["net"] = net
    if bf16:
        halved = ("text", "teacher") if setting.mode == "large" else ("text", "teacher", "unet")
        for name in halved:
            networks[name].to(torch.bfloat16)
    unet.set_checkpointing(checkpointing)
    net.set_checkpointing(checkpointing)
    return networks.requires_grad_(False)


def one_step(networks: nn.ModuleDict, setting: Setting, size: int, batch: int, bf16: bool) -> None:
    """What an optimizer step holds and does. The optimizer's own update needs nothing beside its
    two moments a weight: it is fused."""
    unet, net = networks["unet"], networks["net"]
    student = ControlledUNet(unet, net)
    taught = ControlledUNet(unet, networks["teacher"]) if setting.student else None
    net.requires_grad_(True)
    if setting.mode == "small":  # what connect_only_middle does, without a look at the values
        net.only_middle = True
        net.zero_convs.requires_grad_(False)
    if setting.mode == "large":
        student.decoder.requires_grad_(True)
    trained = [p for p in student.parameters() if p.requires_grad]
    moments = [torch.zeros_like(p) for p in trained for _ in range(2)]
    latents, condition, timesteps, context = (x.float() for x in dummy_inputs(unet, size, batch))
    inputs = latents, condition, timesteps.long(), context
    with norms_in_float32() if bf16 and latents.device.type == "cpu" else nullcontext():
        forward_backward(unet, student, taught, inputs, target=torch.zeros_like(latents),
                         layer_only=setting.layer_only, bf16=bf16)
    assert len(moments) == 2 * sum(p.grad is not None for p in trained)


def peak_bytes(base: str, setting: Setting, bf16: bool, checkpointing: bool, batch: int) -> int:
    """The most that is alive at any moment of a step, in bytes: measured if there is a GPU, else
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


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    how = "counted from tensor sizes, not measured"
    if torch.cuda.is_available():
        how = f"measured on {torch.cuda.get_device_name()}"
    print(f"{args.base}, peak of an optimizer step in GiB (and the smallest card for it), {how}")
    variants = {"float32": (False, False), "checkpointing": (False, True), "bf16": (True, False),
                "both": (True, True)}
    width = 12 * len(args.batch_sizes)
    print(f"{'':30}" + "".join(f"{name:>{width}}" for name in variants))
    print(f"{'':30}" + 4 * "".join(f"{f'batch {batch}':>12}" for batch in args.batch_sizes))
    for setting in SETTINGS:
        cells = []
        for bf16, checkpointing in variants.values():
            for batch in args.batch_sizes:
                peak = peak_bytes(args.base, setting, bf16, checkpointing, batch)
                cells.append(f"{peak / 2**30:.1f} ({card(peak)})")
        print(f"{setting.name:30}" + "".join(f"{cell:>12}" for cell in cells), flush=True)


if __name__ == "__main__":
    sys.exit(run(main))
