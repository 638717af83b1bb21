"""What a control network costs: parameters, work and time.

Work is counted in multiply-accumulates (MACs), those of the attention's two products included,
without activations, norms and additions: 401.6 * 10^9 for SD 1.5's UNet at 512 x 512 pixels.
"""

from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from controlnet import ControlNetwork
from controlnet.sampling import Control, controlled
from text import TOKENS
from unet import UNet
from vae import DOWNSCALE

# The CPU's fused attention, which PyTorch's counter knows in some versions only.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v),
}


def count_macs(work: Callable[[], object]) -> int:
    """Multiply-accumulates of a piece of work: half of its floating-point operations."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        work()
    return counter.get_total_flops() // 2


def dummy_inputs(unet: UNet, size: int, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, condition, timesteps, context: zeros, of the UNet's dtype and on its device."""
    side = size // DOWNSCALE
    shapes = ((batch, unet.config.latent_channels, side, side), (batch, 3, size, size), (batch,),
              (batch, TOKENS, unet.config.context_dim))
    like = next(unet.parameters())
    return tuple(like.new_zeros(shape) for shape in shapes)


def sizes_and_work(unet: UNet, net: ControlNetwork, size: int) -> dict[str, int]:
    """Parameters of a control network, and the work of one prediction at `size` pixels. Both
    networks are on the meta device, where nothing is allocated or computed."""
    merged = net.for_inference()
    parameters = sum(p.numel() for p in net.parameters())
    inputs = dummy_inputs(unet, size, batch=1)
    latents, _, timesteps, context = inputs
    with torch.no_grad():
        features = unet.encode(latents, timesteps, context)
        hint = merged.hint(inputs[1], latents)
        step = controlled(unet, [Control(merged, hint)])
        guided = count_macs(lambda: step(*(x.repeat(2, *[1] * (x.ndim - 1)) for x in (
            latents, timesteps, context))))
        control = count_macs(lambda: merged.control(*inputs, unet, features))
        unmerged = control if merged is net else count_macs(
            lambda: net.control(*inputs, unet, features))
    return {
        "parameters stored": parameters,
        "parameters merged": sum(p.numel() for p in merged.parameters()),
        "bytes in fp16": 2 * parameters,
        "MACs of the control": control,
        "MACs of E(c), once a picture": count_macs(lambda: merged.hint(inputs[1], latents)),
        "MACs of a guided step": guided,
        "MACs to form the weights, if not merged": unmerged - control,
    }


def median_seconds(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median time of a piece of work, after one run to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(perf_counter() - start)
    return median(times[1:])
