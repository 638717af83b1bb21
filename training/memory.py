"""How much memory does a training step need? Counted before it runs, for any setting.

The step runs on tensors that have a shape and no content (FakeTensorMode), and the bytes of those
that are alive are added up: weights, gradients, AdamW's two moments, activations and temporaries.
What libraries take beside tensors (CUDA's context, workspaces of convolutions, fragmentation) is
not counted: RESERVE is left for it.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.devices import DTYPES
from controlnet import ControlledUNet, ControlNetwork
from controlnet.sampling import Control, batch_size_for, controlled
from text import TOKENS
from training.settings import Settings
from unet import UNet
from vae import DOWNSCALE, VAE

RESERVE = 2**30  # bytes of a card that are not for tensors


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

    def reset_peak(self) -> None:
        self.peak = self.now


class AllocatedBytes(nullcontext):
    """The same on a real GPU, measured."""

    def __init__(self):
        super().__init__(self)
        torch.cuda.empty_cache()
        self.before = torch.cuda.memory_allocated()
        self.reset_peak()

    @property
    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() - self.before

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()


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


def empty_copy(network: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The frozen network with weights of no particular content."""
    memo = {id(t): torch.empty(t.shape, device=device, dtype=dtype)
            for t in [*network.parameters(), *network.buffers()]}
    memo |= {id(p): nn.Parameter(memo[id(p)], requires_grad=False) for p in network.parameters()}
    return deepcopy(network, memo)


class Networks:
    """What is in memory during a run, on its device and with its dtypes, ready for a step: copies
    without content."""

    def __init__(self, settings: Settings, unet: UNet, vae: VAE, text: nn.Module,
                 net: ControlNetwork, teacher: ControlNetwork | None):
        is_large, dtype = settings.mode == "large", DTYPES[settings.precision]
        self.unet, self.vae, self.text, self.net, self.teacher = (
            network and empty_copy(network, settings.device, own_dtype) for network, own_dtype in (
                (unet, torch.float32 if is_large else dtype), (vae, torch.float32), (text, dtype),
                (net, torch.float32), (teacher, dtype)))
        # The large mode's teacher keeps the UNet that it was trained with.
        self.teacher_unet = self.teacher and ControlledUNet(
            empty_copy(self.unet, settings.device, torch.float32) if is_large else self.unet,
            self.teacher)
        self.ema = settings.ema is not None and empty_copy(net, settings.device, torch.float32)
        self.net.requires_grad_(True)
        if settings.mode == "small":  # what connect_only_middle does, without a look at the values
            self.net.only_middle = True
            self.net.zero_convs.requires_grad_(False)
        self.student = ControlledUNet(self.unet, self.net, whole=settings.unlock == "all")
        if is_large:
            self.student.unlockable.requires_grad_(True)
        for network in (self.unet, self.net):
            network.set_checkpointing(settings.checkpointing)
        self.trained = [p for p in self.student.parameters() if p.requires_grad]


def peak_bytes(forward_backward: Callable, settings: Settings, unet: UNet, vae: VAE,
               text: nn.Module, net: ControlNetwork, teacher: ControlNetwork | None, size: int,
               batch_size: int, layer_only: bool = False) -> tuple[int, int]:
    """The most that is alive at any moment, in bytes: of an optimizer step on pictures of `size`
    pixels, and while pictures are made and measured between two steps.

    `forward_backward`: train.py's. The fused optimizer needs nothing beside its two moments."""
    settings = replace(settings, device=torch.device("cpu"))
    is_float32 = settings.precision == "float32"
    norms = nullcontext() if is_float32 else norms_in_float32()
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as counter, norms:
        return rehearse(counter, forward_backward, settings, unet, vae, text, net, teacher, size,
                        batch_size, layer_only)


def rehearse(counter: LiveBytes | AllocatedBytes, forward_backward: Callable, settings: Settings,
             unet: UNet, vae: VAE, text: nn.Module, net: ControlNetwork,
             teacher: ControlNetwork | None, size: int, batch_size: int,
             layer_only: bool = False) -> tuple[int, int]:
    """Do what `peak_bytes` counts, on --device."""
    settings = replace(settings, accumulate=settings.accumulate or 1)  # it makes no difference
    n = Networks(settings, unet, vae, text, net, teacher)
    moments = [torch.zeros_like(p) for p in n.trained for _ in range(2)]

    def inputs(batch: int) -> tuple[torch.Tensor, ...]:
        """Noisy latents, condition, timesteps, text states."""
        side, config = size // DOWNSCALE, unet.config
        return (torch.zeros(batch, config.latent_channels, side, side),
                torch.zeros(batch, 3, size, size), torch.zeros(batch, dtype=torch.long),
                torch.zeros(batch, TOKENS, config.context_dim))

    with torch.device(settings.device):
        batch = inputs(batch_size)
        scaler = torch.amp.GradScaler(settings.device.type, enabled=False)
        forward_backward(settings, n.unet, n.student, n.teacher_unet, batch,
                         torch.zeros_like(batch[0]), scaler, layer_only)
        assert len(moments) == 2 * sum(p.grad is not None for p in n.trained)
        step = counter.peak
        del batch
        for p in n.trained:
            p.grad = None

        counter.reset_peak()
        dtype = DTYPES[settings.precision]
        with torch.no_grad(), torch.autocast(settings.device.type, dtype,
                                             enabled=dtype != torch.float32):
            pictures = batch_size_for(size, size)
            latents, _, timesteps, context = inputs(2 * pictures)   # both halves of guidance
            control = Control(n.net.for_inference(), torch.zeros(pictures, 3, size, size))
            controlled(n.unet, [control])(latents, timesteps, context)
            n.vae.decode(n.vae.encode(control.condition)[0])
        return step, counter.peak
