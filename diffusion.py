"""The diffusion process of Stable Diffusion: noise schedule, its forward process, DDIM sampling, classifier-free guidance.

Letters: x0 latents without noise, eps noise, x_t = sqrt(a_t) x0 + sqrt(1 - a_t) eps noisy latents, a_t the cumulative alpha ("alpha bar").
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

TIMESTEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012  # Stable Diffusion's; sqrt(beta) is linear in t ("scaled linear")
ALPHA_BAR = torch.cumprod(1 - torch.linspace(BETA_START**0.5, BETA_END**0.5, TIMESTEPS, dtype=torch.float64) ** 2, dim=0)


def _coefficients(t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(a_t) and sqrt(1 - a_t) for timesteps (B,), as (B, 1, 1, 1) of the dtype and device of `like`."""
    a = ALPHA_BAR.to(t.device)[t].view(-1, 1, 1, 1)
    return a.sqrt().to(like), (1 - a).sqrt().to(like)


def q_sample(x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Forward process (DDPM eq. 4): noisy latents at timesteps t (B,) from clean latents and noise, both (B, 4, H, W)."""
    signal, noise = _coefficients(t, x0)
    return signal * x0 + noise * eps


def velocity(x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """v = sqrt(a_t) eps - sqrt(1 - a_t) x0, what SD 2.1 at 768 predicts (Salimans and Ho 2022)."""
    signal, noise = _coefficients(t, x0)
    return signal * eps - noise * x0


def training_target(x0: Tensor, t: Tensor, eps: Tensor, prediction: str) -> Tensor:
    """What the denoiser has to predict: the noise, or v."""
    return velocity(x0, t, eps) if prediction == "v" else eps


def ddim_timesteps(steps: int, spacing: str = "leading") -> list[int]:
    """The timesteps of a sampling run, noisiest first.

    leading: 0, k, 2k, ... plus 1 with k = 1000 // steps (Stable Diffusion's own). trailing: from 999 down in equal steps (SD-Turbo).
    """
    if not 1 <= steps <= TIMESTEPS:
        raise ValueError(f"expected 1 to {TIMESTEPS} sampling steps, got {steps}")
    if spacing == "leading":
        # With 1000 steps the offset of 1 would ask for timestep 1000, which does not exist.
        return [min(i * (TIMESTEPS // steps) + 1, TIMESTEPS - 1) for i in reversed(range(steps))]
    if spacing == "trailing":
        return [int(t) - 1 for t in np.arange(TIMESTEPS, 0, -TIMESTEPS / steps).round()[:steps]]  # arange decides halves as diffusers does
    raise ValueError(f"expected spacing leading or trailing, got {spacing!r}")


def guided(predict: Callable[[Tensor, Tensor, Tensor], Tensor], context: Tensor, negative: Tensor, guidance: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Classifier-free guidance (Ho and Salimans 2022) in one batch: eps_n + guidance * (eps_c - eps_n), on all latent channels.

    `predict(latents, timesteps, context)` is called with twice the batch: the negative prompts' half first. A guidance of 1 or less
    means none: one pass with the prompt only, as in diffusers.
    """
    if guidance <= 1:
        return lambda x, t: predict(x, t, context)
    both = torch.cat([negative, context])

    def predict_guided(x: Tensor, t: Tensor) -> Tensor:
        without, with_prompt = predict(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return without + guidance * (with_prompt - without)

    return predict_guided


@torch.no_grad()
def ddim_sample(
    predict: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    steps: int,
    *,
    spacing: str = "leading",
    eta: float = 0.0,
    prediction: str = "noise",
    generator: torch.Generator | None = None,
) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12): from unit noise (B, 4, H, W) to latents, in so many steps.

    `predict(x, t)` returns the noise (or v). `eta` 0 is deterministic, 1 adds DDPM's noise, drawn from `generator`.
    The two spacings also begin and end differently. leading, what SD was published with: the noise is taken as it is, and after the
    last timestep comes a_0, the schedule's least noisy value (diffusers: set_alpha_to_one=False). trailing, equal to SD-Turbo's Euler
    scheduler: the noise gets the size it has at the first timestep (0.99767 at 999), and after the last comes a = 1, no noise at all.
    """
    timesteps = ddim_timesteps(steps, spacing)
    alphas = [ALPHA_BAR[t].item() for t in timesteps]
    x, last = (noise, ALPHA_BAR[0].item()) if spacing == "leading" else ((1 - alphas[0]) ** 0.5 * noise, 1.0)
    for t, a, a_next in zip(timesteps, alphas, [*alphas[1:], last], strict=True):
        out = predict(x, torch.full((len(x),), t, device=x.device))
        if prediction == "v":
            x0, eps = a**0.5 * x - (1 - a) ** 0.5 * out, a**0.5 * out + (1 - a) ** 0.5 * x
        else:
            x0, eps = (x - (1 - a) ** 0.5 * out) / a**0.5, out
        sigma = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)) ** 0.5
        x = a_next**0.5 * x0 + (1 - a_next - sigma**2) ** 0.5 * eps
        if eta > 0:
            x = x + sigma * torch.randn(x.shape, generator=generator).to(x)
    return x
