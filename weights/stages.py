"""What the scripts that make the shipped models share: a stage trains one network, survives a kill,
and leaves a file; the next one starts from that."""

import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from common.files import atomic_write
from controlnet import ControlNet
from data.dataset import Dataset
from diffusion import TIMESTEPS, q_sample
from text import CLIPText
from unet import UNet
from vae import LATENT_SCALE, VAE, sample_latents
from weights.controlnet import load_controlnet, save_controlnet
from weights.files import fill, read_tensors, write_tensors

SAVE_EVERY = 100  # steps: a minute's work or two
Make = Callable[[torch.Generator, int, Path], nn.Module]  # generator, steps, file for the state


def stage(network: nn.Module, path: Path, steps: int, make: Make) -> nn.Module:
    """The network that `make` trains for `steps`, read from PATH_STEPS_steps.safetensors if that
    is there."""
    path = path.with_name(f"{path.name}_{steps}_steps.safetensors")
    if not path.exists():
        state = path.with_suffix(".pt")
        made = make(torch.Generator().manual_seed(0), steps, state)
        write_tensors(path, made.state_dict(), {"format": "pt"})
        state.unlink()
    return fill(network, read_tensors(path)[0])


def train(network: nn.Module, loss_of_step: Callable[[], Tensor], steps: int, lr: float, ema: float,
          generator: torch.Generator, state: Path) -> nn.Module:
    """AdamW: warm-up, constant for half the time, then a cosine to zero. Returns the EMA.

    Goes on exactly where the file `state` ends, if it is there; all that `loss_of_step` draws has
    to come from `generator`."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0,
                                  fused=True)
    average = deepcopy(network).requires_grad_(False)
    first = 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        first = saved["step"]
        network.load_state_dict(saved["network"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        generator.set_state(saved["generator"])
    progress = tqdm(range(first, steps), initial=first, total=steps, desc=state.stem, mininterval=5)
    for step in progress:
        cosine = torch.cos(torch.tensor(torch.pi * max(0.0, 2 * step / steps - 1))).item()
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 100) * (0.5 + 0.5 * cosine)
        loss = loss_of_step()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        weight = 1 - min(ema, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), weight)
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            with atomic_write(state) as temporary:
                torch.save({"step": step + 1, "network": network.state_dict(),
                            "average": average.state_dict(), "optimizer": optimizer.state_dict(),
                            "generator": generator.get_state()}, temporary)
    return average


def vae_loss(vae: VAE, images: Tensor, generator: torch.Generator) -> Tensor:
    """Error of the restored pictures (B, 3, H, W), and a touch of KL divergence."""
    mean, logvar = vae.encode(images)
    noise = torch.randn(mean.shape, generator=generator)
    error = vae.decode(sample_latents(mean, logvar, noise) / LATENT_SCALE) - images
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
    return error.abs().mean() + error.square().mean() + 1e-6 * kl


@torch.no_grad()
def normalize_latents(vae: VAE, images: Tensor) -> None:
    """Change the 1x1 convolutions so that the denoiser's latents have mean 0 and variance 1."""
    mean, logvar = vae.encode(images)
    shift = mean.mean((0, 2, 3))
    variance = mean.var((0, 2, 3)) + logvar.exp().mean((0, 2, 3))
    factor = 1 / (variance.sqrt() * LATENT_SCALE)
    n = len(factor)
    vae.quant_conv.weight[:n] *= factor[:, None, None, None]
    vae.quant_conv.bias[:n] = (vae.quant_conv.bias[:n] - shift) * factor
    vae.quant_conv.bias[n:] += 2 * factor.log()
    vae.post_quant_conv.bias += (vae.post_quant_conv.weight[:, :, 0, 0] * shift).sum(1)
    vae.post_quant_conv.weight /= factor[None, :, None, None]


def train_unet(unet: UNet, vae: VAE, text: CLIPText, data: Dataset, batch_size: int,
               generator: torch.Generator, steps: int, state: Path) -> nn.Module:
    """The denoiser, on all pictures of `data`, which are encoded first."""
    batches = DataLoader(data, batch_size=50)
    with torch.no_grad():
        encoded = [(*vae.encode(batch["target"]), text.encode(batch["prompt"]))
                   for batch in tqdm(batches, desc="latents and text states", mininterval=5)]
    mean, logvar, states = map(torch.cat, zip(*encoded, strict=True))
    empty = text.encode([""])

    def loss_of_step() -> Tensor:
        i = torch.randint(len(data), (batch_size,), generator=generator)
        context = states[i]
        noise = torch.randn(mean[i].shape, generator=generator)
        latents = sample_latents(mean[i], logvar[i], noise)
        dropped = torch.rand(batch_size, generator=generator) < 0.1  # as guidance needs it
        context[dropped] = empty
        timesteps = torch.randint(TIMESTEPS, (batch_size,), generator=generator)
        # More of the noisy half: it decides layout and colours.
        noisy_half = torch.rand(batch_size, generator=generator) < 0.3
        timesteps = torch.where(noisy_half, TIMESTEPS // 2 + timesteps // 2, timesteps)
        noise = torch.randn(latents.shape, generator=generator)
        return F.mse_loss(unet(q_sample(latents, timesteps, noise), timesteps, context), noise)

    return train(unet, loss_of_step, steps, lr=1e-3, ema=0.998, generator=generator, state=state)


def make_teacher(base: Path, unet: UNet, work: Path, path: Path, options: list[str]) -> None:
    """Train a ControlNet for `base`, and write it to `path`. Its E(c) is the paper's, twice as fast
    at this size."""
    start = work / "start.safetensors"
    generator = torch.Generator().manual_seed(0)
    save_controlnet(start, ControlNet.from_unet(unet, paper_encoder=True, generator=generator))
    train_network(base, unet, work / "teacher", path, ["--init", str(start), *options])


def train_network(base: Path, unet: UNet, out: Path, path: Path, options: list[str]) -> None:
    """Train a control network for `base` with `train.py` in the folder `out`, and write it to
    `path` in half precision."""
    command = [sys.executable, Path(__file__).parents[1] / "train.py", "--checkpoint", base,
               "--out", out, *options]
    if (out / "state" / "state.pt").exists():
        command.append("--resume")
    subprocess.run([str(word) for word in command], check=True)
    net = load_controlnet(out / "controlnet.safetensors", unet)
    save_controlnet(path, net, base=base.name, dtype=torch.float16)
