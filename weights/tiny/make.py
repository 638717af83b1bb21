"""Make the tiny model from nothing: python -m weights.tiny.make

Four stages, each kept in --work when it is done, so that an interrupted run goes on with the next:
the autoencoder, the text encoder, the denoiser (together weights/tiny/sd.safetensors), and with `train.py` the teacher ControlNet.
About 75 minutes on two cores: 16 + 5 + 28 + 26. The last digits depend on the processor and on PyTorch's version.
"""

import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from common.cli import Parser, non_negative, positive, run
from common.devices import tune_cpu
from controlnet import ControlNet
from data.circles import COLORS, HELD_OUT, Circles
from diffusion import TIMESTEPS, q_sample
from text.clip import END, TINY_TEXT, CLIPText
from unet import TINY, UNet
from unet.blocks import initialize, zero_module
from vae import LATENT_SCALE, TINY_VAE, VAE, sample_latents
from vae.model import AttnBlock, Downsample, ResnetBlock, Upsample
from weights.controlnet import load_controlnet, save_controlnet
from weights.files import fill, read_tensors, write_tensors
from weights.stable_diffusion import StableDiffusion, save_stable_diffusion

SIZE = 64      # pixels; 8 x 8 latents
BATCH = 32
HERE = Path(__file__).parent
TEACHER = "--steps 1600 --batch-size 32 --lr 1.5e-3 --decay 500 --save-every 200 --sample-every 200".split()


def pictures(generator: torch.Generator, batch: int, count: int) -> Iterator[dict]:
    """Endless batches of generated samples, drawn from the first `count` of them."""
    circles = Circles(SIZE, count)
    while True:
        samples = [circles[i] for i in torch.randint(count, (batch,), generator=generator).tolist()]
        yield {"target": torch.stack([s["target"] for s in samples]), "prompt": [s["prompt"] for s in samples]}


def train(network: nn.Module, loss_of_step, steps: int, lr: float, ema: float, name: str) -> nn.Module:
    """AdamW with 100 steps of warm-up, constant for half the time, then a cosine to zero; returns the averaged weights."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0, fused=True)
    average = deepcopy(network).requires_grad_(False)
    progress, mean = tqdm(range(steps), desc=name, mininterval=5), None
    for step in progress:
        decay = max(0.0, 2 * step / steps - 1)
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 100) * (0.5 + 0.5 * torch.cos(torch.tensor(torch.pi * decay)).item())
        loss = loss_of_step(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        momentum = min(ema, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - momentum)
        mean = loss.item() if mean is None else 0.99 * mean + 0.01 * loss.item()
        progress.set_postfix(loss=f"{mean:.4f}", refresh=False)
    return average


# --- 1. the autoencoder ---------------------------------------------------------------------------------------------------------

@torch.no_grad()
def start_as_block_means(vae: VAE) -> VAE:
    """Start as the autoencoder of 8 x 8 block means: 21.7 dB at step 0.

    The residual branches are zero (see `make_vae`). A colour k travels as the channels (x, -x, 0, 0) of group k of every GroupNorm. Two things stand
    between it and the output: the last GroupNorm, so the last residual block adds constants (0, 0, c, -c) with c >> x, which make the
    group's deviation the same for every picture, c / sqrt(2); and a SiLU, but silu(x) - silu(-x) = x.
    """
    c, groups = 4.0, vae.config.groups

    def pattern(width: int, values: tuple[float, ...]) -> Tensor:
        """The four values, repeated over the channels of one group of a feature map of this width."""
        return torch.tensor(values).repeat(width // groups // 4)

    def carry(conv: nn.Conv2d, first: bool) -> None:
        """Let a convolution pass the colours on, pixel by pixel; `first`: its input is the three colours themselves."""
        signs = pattern(conv.out_channels, (1.0, -1.0, 0.0, 0.0))
        for k in range(3):
            rows = slice(k * len(signs), (k + 1) * len(signs))
            conv.weight[rows], conv.bias[rows] = 0, 0
            center = conv.weight[:, :, conv.kernel_size[0] // 2, conv.kernel_size[1] // 2]
            if first:
                center[rows, k] = signs
            else:
                source = pattern(conv.in_channels, (1.0, -1.0, 0.0, 0.0))
                center[rows, k * len(source):(k + 1) * len(source)] = torch.outer(signs, source) / source.abs().sum()

    def read_out(last_block: nn.Module, norm: nn.GroupNorm, conv: nn.Conv2d) -> None:
        signs = pattern(norm.num_channels, (1.0, -1.0, 0.0, 0.0))
        for k in range(3):
            rows = slice(k * len(signs), (k + 1) * len(signs))
            last_block.conv2.bias[rows] = pattern(norm.num_channels, (0.0, 0.0, c, -c))
            norm.weight[rows] = signs.abs() * c / 2**0.5
            conv.weight[k], conv.bias[k] = 0, 0
            conv.weight[k, rows, 1, 1] = signs * 2 / signs.abs().sum()

    for part, last_block in ((vae.encoder, vae.encoder.mid.block_2), (vae.decoder, vae.decoder.up[0].block[-1])):
        carry(part.conv_in, first=True)
        for layer in part.modules():
            if isinstance(layer, ResnetBlock) and isinstance(layer.nin_shortcut, nn.Conv2d):
                carry(layer.nin_shortcut, first=False)
            if isinstance(layer, Upsample):
                carry(layer.conv, first=False)
            if isinstance(layer, Downsample):
                conv = layer.conv
                carry(conv, first=False)
                rows = slice(0, 3 * conv.out_channels // groups)
                conv.weight[rows, :, :2, :2] = conv.weight[rows, :, 1:2, 1:2] / 4  # the mean of 2 x 2 pixels
        read_out(last_block, part.norm_out, part.conv_out)
    for conv in (vae.quant_conv, vae.post_quant_conv):
        conv.weight.copy_(torch.eye(len(conv.weight))[:, :, None, None])
        conv.bias.zero_()
    latents = vae.config.latent_channels
    vae.encoder.conv_out.weight[latents:], vae.encoder.conv_out.bias[latents:] = 0, 2 * torch.log(torch.tensor(0.05))
    return vae


@torch.no_grad()
def normalize_latents(vae: VAE, images: Tensor) -> None:
    """Fold shift and scale into quant_conv and post_quant_conv, so that the latents times LATENT_SCALE have mean 0 and variance 1 by channel."""
    mean, logvar = vae.encode(images)
    shift, variance = mean.mean((0, 2, 3)), mean.var((0, 2, 3)) + logvar.exp().mean((0, 2, 3))
    factor = 1 / (variance.sqrt() * LATENT_SCALE)
    n = len(factor)
    vae.quant_conv.weight[:n] *= factor[:, None, None, None]
    vae.quant_conv.bias[:n] = (vae.quant_conv.bias[:n] - shift) * factor
    vae.quant_conv.bias[n:] += 2 * factor.log()
    vae.post_quant_conv.bias += (vae.post_quant_conv.weight[:, :, 0, 0] * shift).sum(1)
    vae.post_quant_conv.weight /= factor[None, :, None, None]


def psnr(vae: VAE) -> float:
    """Mean PSNR in dB of 256 held-out reconstructions, rounded to 8 bits as a PNG is."""
    held_out, total = Circles(SIZE, 256, first=HELD_OUT), 0.0
    with torch.no_grad():
        for i in range(0, 256, 32):
            images = torch.stack([held_out[j]["target"] for j in range(i, i + 32)])
            mse = ((vae.decode(vae.encode(images)[0]) / 2 + 0.5).clamp(0, 1).mul(255).round() / 255 - images / 2 - 0.5).square().mean((1, 2, 3))
            total += (-10 * torch.log10(mse)).sum().item()
    return total / 256


def make_vae(generator: torch.Generator, steps: int) -> VAE:
    vae = VAE(TINY_VAE)
    for layer in vae.modules():
        if isinstance(layer, (ResnetBlock, AttnBlock)):
            zero_module(layer.conv2 if isinstance(layer, ResnetBlock) else layer.proj_out)
    vae = start_as_block_means(initialize(vae, generator))
    print(f"autoencoder before training: {psnr(vae):.1f} dB", flush=True)
    batches = pictures(generator, BATCH // 4, 20_000)
    vae = vae.to(memory_format=torch.channels_last)  # a sixth faster here

    def loss_of_step(step: int) -> Tensor:
        images = next(batches)["target"].to(memory_format=torch.channels_last)
        mean, logvar = vae.encode(images)
        latents = sample_latents(mean, logvar, torch.randn(mean.shape, generator=generator)) / LATENT_SCALE
        error = vae.decode(latents) - images
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
        return error.abs().mean() + error.square().mean() + 1e-6 * kl

    vae = train(vae, loss_of_step, steps, lr=3e-4, ema=0.995, name="autoencoder")
    normalize_latents(vae, next(pictures(generator, 512, 20_000))["target"])
    print(f"autoencoder: {psnr(vae):.1f} dB on held-out pictures", flush=True)
    return vae


# --- 2. the text encoder --------------------------------------------------------------------------------------------------------

def make_text(generator: torch.Generator, steps: int) -> CLIPText:
    """CLIP knows colours from its own training. This one learns them here: from every token from the end token on, both colours in RGB."""
    text, head = CLIPText(TINY_TEXT), nn.Linear(TINY_TEXT.width, 6)
    for name, parameter in text.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02 if "embedding" in name else parameter.shape[-1] ** -0.5, generator=generator)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    initialize(head, generator)
    names, rgb = list(COLORS), torch.tensor(list(COLORS.values())) / 127.5 - 1

    def loss_of_step(step: int) -> Tensor:
        pair = torch.randint(len(names), (64, 2), generator=generator)
        tokens = text.tokenize([f"{names[a]} circle with {names[b]} background" for a, b in pair])
        error = head(text(tokens)) - rgb[pair].flatten(1)[:, None]
        return error.square()[tokens == END].mean()

    both = train(nn.ModuleList([text, head]), loss_of_step, steps, lr=2e-3, ema=0.99, name="text encoder")
    return both[0]


# --- 3. the denoiser ------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def encode_all(vae: VAE, text: CLIPText, count: int) -> list[Tensor]:
    """Means, log variances and text states of the first `count` samples: vae and text are frozen, so once is enough."""
    circles, encoded = Circles(SIZE, count), []
    for i in tqdm(range(0, count, 50), desc="latents and text states", mininterval=5):
        samples = [circles[j] for j in range(i, i + 50)]
        encoded.append((*vae.encode(torch.stack([s["target"] for s in samples])), text.encode([s["prompt"] for s in samples])))
    return [torch.cat(parts) for parts in zip(*encoded, strict=True)]


def make_unet(vae: VAE, text: CLIPText, generator: torch.Generator, steps: int) -> UNet:
    count = 10_000
    mean, logvar, states = encode_all(vae, text, count)
    with torch.no_grad():
        empty = text.encode([""])
    unet = initialize(UNet(TINY), generator).train()

    def loss_of_step(step: int) -> Tensor:
        i = torch.randint(count, (BATCH,), generator=generator)
        context = states[i]
        x0 = sample_latents(mean[i], logvar[i], torch.randn(mean[i].shape, generator=generator))
        context[torch.rand(BATCH, generator=generator) < 0.1] = empty  # for guidance, a tenth of the prompts is empty
        t = torch.randint(TIMESTEPS, (BATCH,), generator=generator)
        noisy_half = torch.rand(BATCH, generator=generator) < 0.3  # the layout and the colours are decided there
        t = torch.where(noisy_half, TIMESTEPS // 2 + t // 2, t)
        eps = torch.randn(x0.shape, generator=generator)
        return F.mse_loss(unet(q_sample(x0, t, eps), t, context), eps)

    return train(unet, loss_of_step, steps, lr=1e-3, ema=0.998, name="denoiser")


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=HERE, help="folder of sd.safetensors and controlnet.safetensors (default: this one)")
    parser.add_argument("--work", type=Path, default=Path("runs/tiny"), help="folder for finished stages (default: runs/tiny)")
    parser.add_argument("--seed", type=non_negative, default=0)
    parser.add_argument("--vae-steps", type=positive, default=2200)
    parser.add_argument("--text-steps", type=positive, default=1000)
    parser.add_argument("--unet-steps", type=positive, default=2000)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_flush_denormal(True)  # as in tune_cpu; the autoencoder works on whole pictures and uses all cores

    def stage(name: str, steps: int, make: Callable[[torch.Generator, int], nn.Module]) -> dict[str, Tensor]:
        path, told = args.work / f"{name}.safetensors", {"seed": str(args.seed), "steps": str(steps)}
        if not path.exists():
            started = time.time()
            write_tensors(path, make(torch.Generator().manual_seed(args.seed), steps).state_dict(), told)
            print(f"{name}: {time.time() - started:.0f} s", flush=True)
        tensors, metadata = read_tensors(path)
        if metadata != told:
            raise ValueError(f"expected {path} of {told}, it is of {metadata}: delete it or choose another --work")
        return tensors

    vae = fill(VAE(TINY_VAE), stage("vae", args.vae_steps, make_vae))
    tune_cpu(SIZE)
    text = fill(CLIPText(TINY_TEXT), stage("text", args.text_steps, make_text))
    unet = fill(UNet(TINY), stage("unet", args.unet_steps, lambda generator, steps: make_unet(vae, text, generator, steps)))
    base, start, teacher = args.out / "sd.safetensors", args.work / "start.safetensors", args.work / "teacher"
    save_stable_diffusion(base, StableDiffusion(unet, vae, text, guidance=2.0, lr=1e-3, resolution=SIZE))

    # The teacher is trained by train.py, as anybody would; its E(c) is the paper's, which is twice as fast at this size.
    save_controlnet(start, ControlNet.from_unet(unet, paper_encoder=True, generator=torch.Generator().manual_seed(args.seed)))
    command = [HERE.parents[1] / "train.py", "--checkpoint", base, "--init", start, "--out", teacher, "--seed", args.seed, *TEACHER]
    subprocess.run([sys.executable, *map(str, command), *(["--resume"] if (teacher / "state" / "state.pt").exists() else [])], check=True)
    save_controlnet(args.out / "controlnet.safetensors", load_controlnet(teacher / "controlnet.safetensors", unet), base=base.name, dtype=torch.float16)


if __name__ == "__main__":
    sys.exit(run(main))
