"""Make the tiny model from nothing: python -m weights.tiny.make

Four stages: the autoencoder, the text encoder, the denoiser (together sd.safetensors), and with
`train.py` the ControlNet. About two hours on two cores: 16 + 5 + 60 + 40 minutes. --work keeps what
is done, for an interrupted run to go on. The last digits depend on processor and PyTorch's version.
With --turbo, from the shipped base its version for few steps, a ControlNet and two students of it:
about an hour on one core.
"""

import math
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

from common.cli import Parser, answer, run
from weights import tiny


def parse(argv: list[str] | None) -> Namespace:
    p = Parser(__doc__)
    p.add_argument("--out", type=Path, default=tiny.SD.parent, help="folder (default: this one)")
    p.add_argument("--turbo", action="store_true", help="make the tiny Turbo (few_steps.py)")
    p.add_argument("--work", type=Path, default=Path("runs/tiny"), help="(default: runs/tiny)")
    return p.parse_args(argv)


if __name__ == "__main__":  # before PyTorch is imported
    answer(parse)

import torch
from torch import Tensor, nn

from common.devices import tune
from data.circles import COLORS, Circles
from diffusion import Sampling
from text.clip import END, TINY_TEXT, CLIPText
from unet import TINY, UNet
from unet.blocks import initialize, zero_module
from vae import TINY_VAE, VAE
from vae.model import AttnBlock, ResnetBlock
from weights import StableDiffusion, save_stable_diffusion
from weights.stages import make_teacher, normalize_latents, stage, train, train_unet, vae_loss
from weights.tiny.few_steps import make_few_steps

SIZE = 64   # pixels; 8 x 8 latents
BATCH = 32
TEACHER = "--steps 3600 --batch-size 32 --lr 1.5e-3 --decay 1500"


def pictures(generator: torch.Generator, batch: int) -> Tensor:
    """A random batch (B, 3, 64, 64) of 20,000 generated pictures."""
    circles = Circles(SIZE, 20_000)
    indices = torch.randint(len(circles), (batch,), generator=generator).tolist()
    return torch.stack([circles[i]["target"] for i in indices])


@torch.no_grad()
def start_as_block_means(vae: VAE) -> VAE:
    """Start as the autoencoder of 8 x 8 block means.

    The residual branches are zero (see `make_vae`). Colour k travels as the channels (x, -x, 0, 0)
    of group k of every GroupNorm. Two things stand between it and the output: the last GroupNorm,
    so the last residual block adds constants (0, 0, c, -c) with c >> x, which make the group's
    deviation the same for every picture, c / sqrt(2); and a SiLU, but silu(x) - silu(-x) = x.
    """
    c, groups = 4.0, vae.config.groups

    def signs(width: int) -> Tensor:  # of a colour in the channels of a group
        return torch.tensor((1.0, -1.0, 0.0, 0.0)).repeat(width // groups // 4)

    def carry(conv: nn.Conv2d, source: Tensor | None = None) -> None:  # pass the colours on
        target = signs(conv.out_channels)
        source = signs(conv.in_channels) if source is None else source
        outputs, inputs = 3 * len(target), 3 * len(source)
        conv.weight[:outputs], conv.bias[:outputs] = 0, 0
        center = conv.weight[:, :, conv.kernel_size[0] // 2, conv.kernel_size[1] // 2]
        of_a_color = torch.outer(target, source) / source.abs().sum()
        center[:outputs, :inputs] = torch.block_diag(of_a_color, of_a_color, of_a_color)

    def read_out(last_block: nn.Module, norm: nn.GroupNorm, conv: nn.Conv2d) -> None:
        source = signs(norm.num_channels)
        inputs = 3 * len(source)
        last_block.conv2.bias[:inputs] = c * source.roll(2).repeat(3)
        norm.weight[:inputs] = source.abs().repeat(3) * c / 2**0.5
        conv.weight[:3], conv.bias[:3] = 0, 0
        of_a_color = source * 2 / source.abs().sum()
        conv.weight[:3, :inputs, 1, 1] = torch.block_diag(of_a_color, of_a_color, of_a_color)

    encoder, decoder = vae.encoder, vae.decoder
    for part, last_block in ((encoder, encoder.mid.block_2), (decoder, decoder.up[0].block[-1])):
        carry(part.conv_in, torch.ones(1))
        for name, conv in part.named_modules():
            if isinstance(conv, nn.Conv2d) and name.endswith(("nin_shortcut", "sample.conv")):
                carry(conv)
            if name.endswith("downsample.conv"):
                weight = conv.weight[:3 * conv.out_channels // groups]
                weight[:, :, :2, :2] = weight[:, :, 1:2, 1:2] / 4  # the mean of 2 x 2 pixels
        read_out(last_block, part.norm_out, part.conv_out)
    for conv in (vae.quant_conv, vae.post_quant_conv):
        conv.weight.copy_(torch.eye(len(conv.weight))[:, :, None, None])
        conv.bias.zero_()
    n = vae.config.latent_channels
    encoder.conv_out.weight[n:], encoder.conv_out.bias[n:] = 0, 2 * torch.log(torch.tensor(0.05))
    return vae


def make_vae(generator: torch.Generator, steps: int, state: Path) -> VAE:
    vae = VAE(TINY_VAE)
    for layer in vae.modules():
        if isinstance(layer, (ResnetBlock, AttnBlock)):
            zero_module(layer.conv2 if isinstance(layer, ResnetBlock) else layer.proj_out)
    vae = start_as_block_means(initialize(vae, generator))
    vae = vae.to(memory_format=torch.channels_last)  # a sixth faster on the CPU

    def loss_of_step() -> Tensor:
        images = pictures(generator, BATCH // 4).to(memory_format=torch.channels_last)
        return vae_loss(vae, images, generator)

    vae = train(vae, loss_of_step, steps, lr=3e-4, ema=0.995, generator=generator, state=state)
    normalize_latents(vae, pictures(generator, 512))
    # One of the four channels does not show in pictures, so the decoder bears it when noise is 0.4
    # of it (benchmarks/mottles.py). The denoiser would have to learn to make that noise.
    vae.quant_conv.bias[vae.config.latent_channels:] -= 2 * math.log(100)
    return vae


def make_text(generator: torch.Generator, steps: int, state: Path) -> CLIPText:
    """CLIP knows colours. This one learns to give both in RGB, from the end token on."""
    text, head = CLIPText(TINY_TEXT), nn.Linear(TINY_TEXT.width, 6)
    for name, parameter in text.named_parameters():
        if parameter.ndim > 1:
            std = 0.02 if "embedding" in name else parameter.shape[-1] ** -0.5
            nn.init.normal_(parameter, std=std, generator=generator)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    initialize(head, generator)
    names, rgb = list(COLORS), torch.tensor(list(COLORS.values())) / 127.5 - 1

    def loss_of_step() -> Tensor:
        pair = torch.randint(len(names), (64, 2), generator=generator)
        tokens = text.tokenize([f"{names[a]} circle with {names[b]} background" for a, b in pair])
        error = head(text(tokens)) - rgb[pair].flatten(1)[:, None]
        return error.square()[tokens == END].mean()

    both = nn.ModuleList([text, head])
    return train(both, loss_of_step, steps, lr=2e-3, ema=0.99, generator=generator, state=state)[0]


def make_unet(vae: VAE, text: CLIPText, generator: torch.Generator, steps: int,
              state: Path) -> UNet:
    unet = initialize(UNet(TINY), generator).train()
    data = Circles(SIZE, 20_000)
    return train_unet(unet, vae, text, data, BATCH, generator, steps, state)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_flush_denormal(True)  # as in tune, but the autoencoder is better with all cores

    if args.turbo:
        tune(SIZE)
        make_few_steps(args.out / tiny.TURBO.parent.name, args.work / "turbo")
        return
    vae = stage(VAE(TINY_VAE), args.work / "vae", 2200, make_vae)
    tune(SIZE)
    text = stage(CLIPText(TINY_TEXT), args.work / "text", 1000, make_text)
    unet = stage(UNet(TINY), args.work / "unet", 7400, partial(make_unet, vae, text))
    sd = StableDiffusion(unet, vae, text, Sampling(guidance=2.0), lr=1e-3, resolution=SIZE)
    base = args.out / tiny.SD.name
    save_stable_diffusion(base, sd)
    make_teacher(base, unet, args.work, args.out / tiny.CONTROLNET.name, TEACHER.split())


if __name__ == "__main__":
    sys.exit(run(main))
