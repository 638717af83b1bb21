"""The diffusion process of Stable Diffusion: noise schedule, forward process, DDIM sampling and
classifier-free guidance.

Letters: x0 latents without noise, eps noise, a_t the cumulative alpha ("alpha bar") at timestep t;
x_t = sqrt(a_t) x0 + sqrt(1 - a_t) eps noisy latents.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TIMESTEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012  # Stable Diffusion's; sqrt(beta) is linear in t
BETAS = torch.linspace(BETA_START**0.5, BETA_END**0.5, TIMESTEPS, dtype=torch.float64) ** 2
ALPHA_BAR = torch.cumprod(1 - BETAS, dim=0)
Denoiser = Callable[[Tensor, Tensor], Tensor]  # latents, timesteps -> noise_pred (or v)


@dataclass(frozen=True)
class Sampling:
    """How a base model makes pictures: it belongs to the weights, and no shape shows it. The
    defaults are Stable Diffusion 1.5's, with the guidance that the ControlNet project samples with.
    """

    steps: int = 20              # of DDIM
    guidance: float = 9.0        # its scale; 1 or less: none
    spacing: str = "leading"     # of the timesteps, see `ddim_timesteps`
    prediction: str = "epsilon"  # what the UNet returns: the noise, or "v" (SD 2.1 at 768 pixels)

    @property
    def timesteps(self) -> list[int]:
        return ddim_timesteps(self.steps, self.spacing)


SD_TURBO = Sampling(steps=1, guidance=0.0, spacing="trailing")  # or up to 4 steps


def _coefficients(timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(a_t) and sqrt(1 - a_t), each (B, 1, 1, 1), of the dtype and device of `like`."""
    alpha_bar = ALPHA_BAR.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
    return alpha_bar.sqrt().to(like), (1 - alpha_bar).sqrt().to(like)


def q_sample(latents: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
    """Forward process (DDPM eq. 4): the noisy latents (B, 4, H, W) at timesteps (B,)."""
    sqrt_alpha_bar, sqrt_one_minus_alpha_bar = _coefficients(timesteps, latents)
    return sqrt_alpha_bar * latents + sqrt_one_minus_alpha_bar * noise


def training_target(latents: Tensor, timesteps: Tensor, noise: Tensor, prediction: str) -> Tensor:
    """What the denoiser has to predict: the noise ("epsilon"), or what SD 2.1 at 768 pixels does,
    "v" = sqrt(a_t) eps - sqrt(1 - a_t) x0 (Salimans and Ho 2022)."""
    if prediction != "v":
        return noise
    sqrt_alpha_bar, sqrt_one_minus_alpha_bar = _coefficients(timesteps, latents)
    return sqrt_alpha_bar * noise - sqrt_one_minus_alpha_bar * latents


def x0_weights(timesteps: Tensor, prediction: str) -> Tensor:
    """(B,) factors, in float64, that turn a squared error of what the denoiser predicts into that
    of the picture it stands for, x0: (1 - a_t) / a_t for the noise, 1 - a_t for v.

    x0 = (x_t - sqrt(1 - a_t) eps) / sqrt(a_t), so at timestep 999 an error of the noise counts 14.6
    times in x0; in 20 steps later ones mend it, in one step nothing does.
    """
    alpha_bar = ALPHA_BAR.to(timesteps.device)[timesteps]
    return 1 - alpha_bar if prediction == "v" else (1 - alpha_bar) / alpha_bar


def ddim_timesteps(steps: int, spacing: str = "leading") -> list[int]:
    """The timesteps of a sampling run, noisiest first.

    leading: 0, k, 2k, ... plus 1 with k = 1000 // steps (Stable Diffusion's own). trailing: from
    999 down in equal steps (SD-Turbo). Raises ValueError for another spacing or number of steps.
    """
    if not 1 <= steps <= TIMESTEPS:
        raise ValueError(f"expected 1 to {TIMESTEPS} sampling steps, got {steps}")
    if spacing == "leading":
        # min: with 1000 steps the offset of 1 would lead to timestep 1000, which does not exist
        return [min(i * (TIMESTEPS // steps) + 1, TIMESTEPS - 1) for i in reversed(range(steps))]
    if spacing == "trailing":
        # NumPy's arange, because it rounds halves as diffusers does
        return [int(t) - 1 for t in np.arange(TIMESTEPS, 0, -TIMESTEPS / steps).round()[:steps]]
    raise ValueError(f"expected spacing leading or trailing, got {spacing!r}")


def classifier_free_guidance(predict: Callable[[Tensor, Tensor, Tensor], Tensor], context: Tensor,
                             negative_context: Tensor, guidance: float) -> Denoiser:
    """The guided denoiser, a function of latents and timesteps (Ho and Salimans 2022).

    `predict(latents, timesteps, context)` gets twice the batch, the half with the negative prompts
    first. A guidance scale of 1 or less means none: one pass with the prompt, as in diffusers."""
    if guidance <= 1:
        return lambda latents, timesteps: predict(latents, timesteps, context)
    both = torch.cat([negative_context, context])                                   # (2B, N, D)

    def predict_guided(latents: Tensor, timesteps: Tensor) -> Tensor:
        noise_pred = predict(torch.cat([latents] * 2), torch.cat([timesteps] * 2), both)
        noise_pred_uncond, noise_pred_text = noise_pred.chunk(2)            # (B, 4, H, W) each
        return noise_pred_uncond + guidance * (noise_pred_text - noise_pred_uncond)

    return predict_guided


@torch.no_grad()
def ddim_sample(predict: Denoiser, noise: Tensor, steps: int, *, spacing: str = "leading",
                eta: float = 0.0, prediction: str = "epsilon",
                generator: torch.Generator | None = None,
                predicted: Callable[[Tensor], object] | None = None) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12): from unit noise (B, 4, H, W) to clean latents.

    `prediction`: what `predict` returns, "epsilon" (the noise) or "v". `eta` 0 is deterministic, 1
    adds as much new noise as DDPM, from `generator`. The spacings differ at both ends: leading, as
    SD was published, goes from the noise as it is to a_0, the schedule's least noisy value
    (diffusers: set_alpha_to_one=False); trailing, equal to SD-Turbo's Euler scheduler, from noise
    of the first timestep's size (0.99767 at 999) to a = 1, no noise at all. `predicted` is called
    with the clean latents (B, 4, H, W) as each step predicts them.
    """
    timesteps = ddim_timesteps(steps, spacing)
    alpha_bar = ALPHA_BAR.tolist()
    alphas = [alpha_bar[t] for t in timesteps]
    latents, last = noise, alpha_bar[0]
    if spacing == "trailing":
        latents, last = (1 - alphas[0]) ** 0.5 * noise, 1.0
    for t, a, a_next in zip(timesteps, alphas, [*alphas[1:], last], strict=True):
        output = predict(latents, torch.full((len(latents),), t, device=latents.device))
        if prediction == "v":
            x0 = a**0.5 * latents - (1 - a) ** 0.5 * output
            eps = a**0.5 * output + (1 - a) ** 0.5 * latents
        else:
            x0 = (latents - (1 - a) ** 0.5 * output) / a**0.5
            eps = output
        if predicted:
            predicted(x0)
        sigma = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)) ** 0.5
        latents = a_next**0.5 * x0 + (1 - a_next - sigma**2) ** 0.5 * eps
        if eta > 0:
            latents = latents + sigma * torch.randn(latents.shape, generator=generator).to(latents)
    return latents
