"""The convergence probe: has the control network understood its condition?"""

import torch
from torch import Tensor

from controlnet import ControlNetwork
from controlnet.sampling import batch_size_for, initial_latents
from data.dataset import Sample
from diffusion import TIMESTEPS, q_sample, training_target
from kd.losses import diffusion_loss
from unet import Features
from vae import sample_latents
from weights import StableDiffusion

PROBE_SAMPLES = 32
ALL = torch.arange(TIMESTEPS)


class Probe:
    """The diffusion loss with the right condition minus the loss with another picture's, on fixed
    samples, noises and timesteps.

    Near zero as long as the control network ignores the condition; negative when it has learned to
    read it, the "sudden convergence" of the ControlNet paper (section 3.4, figure 4). The noise is
    the same in both losses and cancels, which is why this shows what the loss cannot.
    """

    @torch.no_grad()
    def __init__(self, sd: StableDiffusion, samples: list[Sample], timesteps: Tensor = ALL):
        """`samples` of the same size; with a single one the probe is 0. `timesteps`: those that are
        trained on, of which it takes some, evenly spread."""
        num, (height, width) = len(samples), samples[0]["target"].shape[-2:]
        weight = next(sd.vae.parameters())
        device = next(sd.unet.parameters()).device
        generator = torch.Generator().manual_seed(0)
        moments = [torch.cat(sd.vae.encode(s["target"][None].to(weight))) for s in samples]
        mean, logvar = torch.stack(moments, dim=1).float().cpu()
        latents = sample_latents(mean, logvar, initial_latents(num, height, width, generator))
        noise = initial_latents(num, height, width, generator)
        timesteps = timesteps[((torch.arange(num) + 0.5) * len(timesteps) / num).long()]
        target = training_target(latents, timesteps, noise, sd.sampling.prediction)
        self.unet = sd.unet
        self.context = sd.text.encode([s["prompt"] for s in samples])
        self.noisy_latents = q_sample(latents, timesteps, noise).to(device)
        self.timesteps, self.target = timesteps.to(device), target.to(device)
        self.condition = torch.stack([s["condition"] for s in samples]).to(device)

    @torch.no_grad()
    def __call__(self, net: ControlNetwork) -> float:
        total, shifted = 0.0, self.condition.roll(1, dims=0)
        batch_size = batch_size_for(*self.condition.shape[-2:])
        for i in range(0, len(self.target), batch_size):
            part = slice(i, i + batch_size)
            features = self.unet.encode(self.noisy_latents[part], self.timesteps[part],
                                        self.context[part])
            right, wrong = (self._loss(net, condition[part], part, features)
                            for condition in (self.condition, shifted))
            total += (right - wrong) * len(self.target[part])
        return total / len(self.target)

    def _loss(self, net: ControlNetwork, condition: Tensor, part: slice,
              features: Features) -> float:
        control = net.control(self.noisy_latents[part], condition, self.timesteps[part],
                              self.context[part], self.unet, features)
        noise_pred = self.unet.decode(features, control)
        return diffusion_loss(noise_pred.float(), self.target[part]).item()
