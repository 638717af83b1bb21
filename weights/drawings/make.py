"""Make the drawings model: python -m weights.drawings.make

Four stages, each from the tiny model's network of the same shape: the autoencoder, the text
encoder, the denoiser (together sd.safetensors), and with `train.py` the ControlNet. Every file is
written as soon as it is done. --work keeps what is done, for an interrupted run to go on. The last
digits depend on processor and PyTorch's version.
"""

import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

from common.cli import Parser, answer, run
from weights import drawings


def parse(argv: list[str] | None) -> Namespace:
    p = Parser(__doc__)
    p.add_argument("--out", type=Path, default=drawings.SD.parent, help="folder (default: this)")
    p.add_argument("--work", type=Path, default=Path("runs/drawings"),
                   help="(default: runs/drawings)")
    return p.parse_args(argv)


if __name__ == "__main__":  # before PyTorch is imported
    answer(parse)

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.drawings import GROUNDS, Drawings, prompt
from data.openmoji import KINDS, MAIN_COLORS
from data.palette import PALETTE, PALETTE_RGB
from diffusion import Sampling
from text.clip import END, CLIPText
from unet import UNet
from unet.blocks import initialize
from vae import VAE
from weights import StableDiffusion, load_stable_diffusion, save_stable_diffusion, tiny
from weights.stages import make_teacher, normalize_latents, stage, train, train_unet, vae_loss

SIZE = 128  # pixels; 16 x 16 latents
BATCH = 32
TEACHER = "--steps 3000 --batch-size 32 --lr 1e-3 --decay 1000 --save-every 100"


def make_vae(vae: VAE, generator: torch.Generator, steps: int, state: Path) -> VAE:
    vae = vae.requires_grad_(True).train().to(memory_format=torch.channels_last)
    data = Drawings(drawings.DATA, SIZE, variants=1000)

    def pictures(batch: int) -> Tensor:
        indices = torch.randint(len(data), (batch,), generator=generator).tolist()
        return torch.stack([data[i]["target"] for i in indices])

    def loss_of_step() -> Tensor:
        images = pictures(BATCH // 4).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):  # 1.6 times as fast where there is AVX-512
            return vae_loss(vae, images, generator)

    vae = train(vae, loss_of_step, steps, lr=1e-3, ema=0.995, generator=generator, state=state)
    normalize_latents(vae, pictures(256))
    return vae


def make_text(text: CLIPText, generator: torch.Generator, steps: int, state: Path) -> CLIPText:
    """It learns to say, from the end token on, what a prompt names: the colours in their order and
    the ground in RGB, how many colours there are, and the kind."""
    kinds = [*dict.fromkeys(KINDS.values()), "symbol"]
    names, grounds = list(PALETTE), list(GROUNDS)
    rgb = torch.from_numpy(PALETTE_RGB).float() / 127.5 - 1
    ground_rgb = torch.tensor(list(GROUNDS.values())) / 127.5 - 1
    sizes = 3 * MAIN_COLORS, 3, MAIN_COLORS + 1, len(kinds)
    text = text.requires_grad_(True).train()
    head = initialize(nn.Linear(text.config.width, sum(sizes)), generator)

    def loss_of_step() -> Tensor:
        batch = 32
        colors = torch.rand(batch, len(names), generator=generator).topk(MAIN_COLORS).indices
        count = torch.randint(MAIN_COLORS + 1, (batch,), generator=generator)
        ground = torch.randint(len(grounds), (batch,), generator=generator)
        kind = torch.randint(len(kinds), (batch,), generator=generator)
        tokens = text.tokenize([
            prompt(kinds[k], [names[j] for j in c[:n]], grounds[g])
            for k, c, n, g in zip(kind, colors, count, ground, strict=True)])
        end = tokens == END
        # A loss at every end token: they are what fills a prompt up, and what the denoiser reads.
        row = end.nonzero()[:, 0]
        said = head(text(tokens)[end]).split(sizes, dim=1)
        there = (torch.arange(MAIN_COLORS) < count[:, None]).repeat_interleave(3, dim=1)
        error = (said[0] - rgb[colors].flatten(1)[row])[there[row]].square().mean()
        error = error + (said[1] - ground_rgb[ground][row]).square().mean()
        return error + 0.1 * (F.cross_entropy(said[2], count[row])
                              + F.cross_entropy(said[3], kind[row]))

    both = nn.ModuleList([text, head])
    return train(both, loss_of_step, steps, lr=1e-3, ema=0.99, generator=generator, state=state)[0]


def make_unet(unet: UNet, vae: VAE, text: CLIPText, generator: torch.Generator, steps: int,
              state: Path) -> UNet:
    unet = unet.requires_grad_(True).train()
    data = Drawings(drawings.DATA, SIZE)
    return train_unet(unet, vae, text, data, BATCH, generator, steps, state)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_flush_denormal(True)  # as in tune
    start = load_stable_diffusion(tiny.SD)
    vae = stage(start.vae, args.work / "vae", 1500, partial(make_vae, start.vae))
    text = stage(start.text, args.work / "text", 6000, partial(make_text, start.text))
    unet = stage(start.unet, args.work / "unet", 2500, partial(make_unet, start.unet, vae, text))
    base = args.out / drawings.SD.name
    sd = StableDiffusion(unet, vae, text, Sampling(guidance=2.0), lr=1e-3, resolution=SIZE)
    save_stable_diffusion(base, sd)
    make_teacher(base, unet, args.work, args.out / drawings.CONTROLNET.name,
                 ["--data", str(drawings.DATA), *TEACHER.split()])


if __name__ == "__main__":
    sys.exit(run(main))
