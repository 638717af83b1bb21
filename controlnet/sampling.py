"""From prompt and conditions to pictures: the guided, controlled DDIM run that `sample.py`, `train.py` and the tests share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from controlnet.model import ControlNet
from diffusion import ddim_sample, guided
from unet import UNet
from unet.model import Features
from vae import VAE


@dataclass
class Control:
    """One control network at work: what it looks at, how strongly it counts, and in which part of the run."""

    net: ControlNet
    condition: Tensor    # (B, 3, H, W) in [0, 1]
    scale: float = 1.0   # its 13 outputs are multiplied by this
    start: float = 0.0   # share of the steps before it sets in ...
    end: float = 1.0     # ... and after which it stops


def initial_latents(num: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """The noise a run starts from, (num, 4, height/8, width/8), drawn on the CPU in float32: the same seed, the same picture as in diffusers."""
    return torch.randn((num, 4, height // 8, width // 8), generator=generator)


def controlled(unet: UNet, controls: Sequence[Control], guess: bool = False) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The denoiser under control, as a function of latents (kB, 4, H, W), timesteps (kB,) and text states (kB, N, D).

    Guidance doubles the batch (k = 2), and both halves get the same condition. The outputs of several control networks are summed.
    With `guess` ("guess mode", diffusers' rule) the unconditional half gets no control, so that guidance amplifies the control itself
    and not only the prompt, and the 13 outputs count from 0.1 (the finest) to 1 (the middle), evenly spaced in the logarithm.
    """

    def predict(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        features = unet.encode(x, t, context)
        if not controls:
            return unet.decode(features)
        weights = torch.logspace(-1, 0, len(features.skips) + 1).tolist() if guess else [1.0] * (len(features.skips) + 1)
        copies = len(x) // len(controls[0].condition)
        seen, only_second = features, guess and copies == 2
        if only_second:
            x, t = x.chunk(2)[1], t.chunk(2)[1]
            seen = Features([skip.chunk(2)[1] for skip in features.skips], *(part.chunk(2)[1] for part in features[1:]))
        total = [0.0] * len(weights)
        for c in controls:
            condition = c.condition.to(x.dtype).repeat(1 if only_second else copies, 1, 1, 1)
            outputs = c.net.control(unet, seen, x, condition, t)
            total = [
                sum_ if output is None else sum_ + c.scale * weight * output for sum_, weight, output in zip(total, weights, outputs, strict=True)
            ]
        if only_second:
            total = [torch.cat([torch.zeros_like(output), output]) for output in total]
        return unet.decode(features, total)

    return predict


@torch.no_grad()
def generate(
    unet: UNet,
    vae: VAE,
    controls: Sequence[Control],
    noise: Tensor,
    context: Tensor,
    negative: Tensor,
    *,
    steps: int = 20,
    guidance: float = 9.0,
    guess: bool = False,
    eta: float = 0.0,
    spacing: str = "leading",
    prediction: str = "noise",
    generator: torch.Generator | None = None,
    step_done: Callable[[], object] | None = None,
) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] from noise (B, 4, H/8, W/8) and text states (B, N, D), under `controls` (none: the base model alone).

    `negative`: the text states that guidance moves away from. The UNet and the control run in the UNet's dtype, the sampler in the noise's.
    """
    dtype = next(unet.parameters()).dtype
    numbers = count()  # of the steps; the sampler asks once a step

    def predict(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        i = next(numbers)
        active = [c for c in controls if i / steps >= c.start and (i + 1) / steps <= c.end]
        return controlled(unet, active, guess)(x.to(dtype), t, context).to(x.dtype)

    predict_guided = guided(predict, context, negative, guidance)

    def counted(x: Tensor, t: Tensor) -> Tensor:
        out = predict_guided(x, t)
        if step_done:
            step_done()
        return out

    x = ddim_sample(counted, noise, steps, spacing=spacing, eta=eta, prediction=prediction, generator=generator)
    return vae.to_images(x.to(next(vae.parameters()).dtype)).float()
