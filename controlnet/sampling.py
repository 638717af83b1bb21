"""From prompt and condition to pictures: the guided, controlled DDIM run that `sample.py`, `train.py` and the tests share."""

from collections.abc import Callable

import torch
from torch import Tensor

from controlnet.model import ControlNet
from diffusion import ddim_sample, ddim_timesteps, guided
from unet import UNet
from vae import VAE


def initial_latents(num: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """The noise a run starts from, (num, 4, height/8, width/8), drawn on the CPU in float32: the same seed, the same picture as in diffusers."""
    return torch.randn((num, 4, height // 8, width // 8), generator=generator)


def controlled(unet: UNet, net: ControlNet | None, condition: Tensor | None, scale: float = 1.0) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The denoiser under control, as a function of latents (kB, 4, H, W), timesteps (kB,) and context (kB, N, D); condition is (B, 3, 8H, 8W).

    Guidance doubles the batch (k = 2), and both halves get the same condition.
    """

    def predict(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        if net is None:
            return unet(x, t, context)
        repeated = condition.repeat(len(x) // len(condition), 1, 1, 1)
        features = unet.encode(x, t, context)
        return unet.decode(features, [scale * c for c in net.control(unet, features, x, repeated, t)])

    return predict


@torch.no_grad()
def generate(
    unet: UNet,
    vae: VAE,
    net: ControlNet | None,
    latents: Tensor,
    condition: Tensor | None,
    context: Tensor,
    negative: Tensor,
    *,
    steps: int = 20,
    guidance: float = 9.0,
    scale: float = 1.0,
    eta: float = 0.0,
    spacing: str = "leading",
    prediction: str = "noise",
    generator: torch.Generator | None = None,
    step_done: Callable[[], object] | None = None,
) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] from noise `latents` (B, 4, H/8, W/8), `condition` (B, 3, H, W) in [0, 1] and text states (B, N, D).

    `negative`: the text states that guidance moves away from. `net` None: the base model without control.
    """
    predict = guided(controlled(unet, net, condition, scale), context, negative, guidance)

    def counted(x: Tensor, t: Tensor) -> Tensor:
        out = predict(x, t)
        if step_done:
            step_done()
        return out

    x = ddim_sample(counted, latents, ddim_timesteps(steps, spacing), eta=eta, prediction=prediction, generator=generator)
    return vae.to_images(x)
