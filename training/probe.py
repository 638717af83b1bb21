"""Signals that tell whether a training works, where the total loss is nearly flat: most of it is noise that nobody can predict."""

from collections.abc import Sequence

import torch
from torch import Tensor

from controlnet import ControlNet
from controlnet.sampling import initial_latents
from diffusion import TIMESTEPS, q_sample, training_target
from kd.losses import diffusion_loss
from vae.model import sample_latents

BUCKETS = 4  # quarters of the timesteps: the first polishes details, the last decides on the picture's layout
PROBES = 32  # fixed samples of the convergence probe


def by_timestep(losses: Sequence[Tensor], t: Tensor) -> Tensor:
    """(4,): the samples' losses, summed over the samples whose timestep (B,) lies in each quarter of [0, 1000)."""
    losses = torch.stack(list(losses)).detach()
    return losses.new_zeros(BUCKETS).index_add(0, t * BUCKETS // TIMESTEPS, losses)


def in_bucket(t: Tensor) -> Tensor:
    """(4,): how many timesteps lie in each quarter of [0, 1000)."""
    return by_timestep(torch.ones(len(t), device=t.device), t)


def averages(sums: dict[str, Tensor], passes: int) -> dict[str, float | list[float | None]]:
    """What the log shows of a step: sums over `passes` forward passes become means, layers' errors shares.

    The mean of a bucket without samples is None.
    """
    counts = sums.pop("samples by timestep")
    found = {name: (value / passes).tolist() for name, value in sums.items()}
    for name in found:
        if name.endswith("by timestep"):
            found[name] = [None if count == 0 else value / count for value, count in zip(sums[name].tolist(), counts.tolist(), strict=True)]
    if "L_layer shares" in found:
        found["L_layer shares"] = [error / sum(found["L_layer shares"]) for error in found["L_layer shares"]]
    return found


class Probe:
    """The convergence probe: the diffusion loss with the right condition less that with another picture's, on fixed samples, noises and timesteps.

    Near zero as long as the control network ignores the condition, or knows no more of it than that there is one; negative when it has
    learned what the condition says, the "sudden convergence" of the ControlNet paper (section 3.4, figure 4). All noise that is the
    same in both losses cancels, which is why this shows what the loss cannot.
    """

    @torch.no_grad()
    def __init__(self, sd, samples: list[dict]):
        """`sd`: a base model (.unet, .vae, .text, .prediction). `samples` of a data set, of the same size; with a single one the probe is 0."""
        count, size, device = len(samples), samples[0]["target"].shape[-1], next(sd.unet.parameters()).device
        generator = torch.Generator().manual_seed(0)
        moments = [torch.cat(sd.vae.encode(s["target"][None].to(sd.vae.quant_conv.weight))).float().cpu() for s in samples]
        mean, logvar = torch.stack(moments, dim=1)
        x0, noise = (sample_latents(mean, logvar, initial_latents(count, size, size, generator)), initial_latents(count, size, size, generator))
        t = ((torch.arange(count) + 0.5) * TIMESTEPS / count).long()  # evenly spread
        self.unet, self.t, self.context = sd.unet, t.to(device), sd.text.encode([s["prompt"] for s in samples])
        self.x_t, self.target = q_sample(x0, t, noise).to(device), training_target(x0, t, noise, sd.prediction).to(device)
        self.condition = torch.stack([s["condition"] for s in samples]).to(device)

    @torch.no_grad()
    def __call__(self, net: ControlNet) -> float:
        """Below zero: control is learned."""
        features = self.unet.encode(self.x_t, self.t, self.context)

        def loss(condition: Tensor) -> float:
            predicted = self.unet.decode(features, net.control(self.unet, features, self.x_t, condition, self.t))
            return diffusion_loss(predicted.float(), self.target).item()

        return loss(self.condition) - loss(self.condition.roll(1, dims=0))
