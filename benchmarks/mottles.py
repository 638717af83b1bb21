"""Why are a model's plain colours mottled? python -m benchmarks.mottles

Two suspects, each alone on held-out circles. The autoencoder: true latents are decoded with white
noise in one channel after the other, and beside each stands how much noise it puts there itself,
which the denoiser then learns to make. The denoiser: it predicts the clean latents from noisy ones
in one step, under its control network and without guidance. A minute on one core.
"""

import sys
from argparse import Namespace
from pathlib import Path

from common.cli import Parser, answer, positive, run
from weights import tiny

NOISE = 0.1  # standard deviation; that of latents is 1
TIMESTEPS = (951, 801, 601, 401, 201, 101, 51)  # that sampling in 20 steps comes by


def parse(argv: list[str] | None) -> Namespace:
    p = Parser(__doc__)
    p.add_argument("--checkpoint", type=Path, default=tiny.SD, help="(default: the shipped)")
    p.add_argument("--controlnet", type=Path, default=tiny.CONTROLNET,
                   help="(default: the shipped)")
    p.add_argument("--images", type=positive, default=64, help="circles (default: 64)")
    return p.parse_args(argv)


if __name__ == "__main__":  # before PyTorch is imported
    answer(parse)

import torch
from torch import Tensor
from torch.utils.data import default_collate

from common.devices import tune
from controlnet.sampling import Control, controlled
from data.circles import HELD_OUT, Circles
from diffusion import ALPHA_BAR, q_sample
from vae import LATENT_SCALE
from weights import load_controlnet, load_stable_diffusion


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    sd = load_stable_diffusion(args.checkpoint)
    tune(sd.resolution)
    net = load_controlnet(args.controlnet, sd.unet).for_inference()
    circles, everyone = Circles(sd.resolution, args.images, first=HELD_OUT), range(args.images)
    samples = default_collate([circles[i] for i in everyone])
    mean, logvar = sd.vae.encode(samples["target"])
    latents = mean * LATENT_SCALE
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))

    def show(what: str, latents: Tensor, remark: str = "") -> None:
        result = circles.fidelity(sd.vae.to_images(latents).float(), everyone, everyone)
        print(f"  {what:22}{result['overlap']:8.3f}{result['color_error']:8.1f}{remark}")

    own = (0.5 * logvar).exp().mean((0, 2, 3)) * LATENT_SCALE
    print(f"{'true latents, decoded':24}{'overlap':>8}{'colour':>8}   the autoencoder's own noise")
    show("as they are", latents)
    for channel in range(latents.shape[1]):
        noisy = latents.clone()
        noisy[:, channel] += NOISE * noise[:, channel]
        show(f"{NOISE} in channel {channel}", noisy, f"{own[channel]:9.4f}")

    context = sd.text.encode(samples["prompt"])
    control = Control(net, samples["condition"]).encoded(latents)
    predict = controlled(sd.unet, [control], guess=False)
    print("latents that the denoiser predicts in one step")
    for t in TIMESTEPS:
        timesteps, a = torch.full((args.images,), t), ALPHA_BAR[t].item()
        noisy = q_sample(latents, timesteps, noise)
        noise_pred = predict(noisy, timesteps, context)
        show(f"at timestep {t}", (noisy - (1 - a) ** 0.5 * noise_pred) / a**0.5)


if __name__ == "__main__":
    sys.exit(run(main))
