"""How good the parts of the drawings model are, before anything is distilled:
python -m benchmarks.drawings

The autoencoder by the PSNR of held-out drawings that it restores; the base, without control, by how
near its pictures come to the colours that their prompts name. Both look at held-out prompts."""

import json
import sys
from argparse import Namespace
from pathlib import Path
from statistics import mean

from common.cli import Parser, answer, non_negative, positive, run
from weights import drawings


def parse(argv: list[str] | None) -> Namespace:
    p = Parser(__doc__)
    p.add_argument("--checkpoint", type=Path, default=drawings.SD, help="(default: the shipped)")
    p.add_argument("--images", type=positive, default=64, help="pictures (default: 64)")
    p.add_argument("--seed", type=non_negative, default=0, help="of the noise (default: 0)")
    p.add_argument("--out", type=Path, default=Path("runs/drawings/base.png"), help="a grid of the "
                   "first twelve: prompt, truth, restored, base (default: runs/drawings/base.png)")
    return p.parse_args(argv)


if __name__ == "__main__":  # before PyTorch is imported
    answer(parse)

import torch
from torch import Tensor

from common.devices import tune
from controlnet.sampling import restored, sample_pictures
from data.drawings import named_color_errors
from data.folder import Folder
from data.grids import grid
from data.pictures import write_png
from weights import load_stable_diffusion

STEPS = 20          # of DDIM


def psnr(pictures: Tensor, truth: Tensor) -> Tensor:
    """(N, 3, H, W) twice -> (N,) in dB."""
    return -10 * torch.log10((pictures - truth).square().mean((1, 2, 3)))


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    sd = load_stable_diffusion(args.checkpoint)
    tune(sd.resolution)
    data = Folder(drawings.DATA / "held_out", sd.resolution)
    truth = torch.stack([data[i]["target"] / 2 + 0.5 for i in range(len(data))])
    after = restored(sd.vae, 2 * truth - 1)
    values = psnr(after, truth)
    print(f"autoencoder: {values.mean():.2f} dB on {len(values)} held-out drawings, "
          f"{values.quantile(0.1):.2f} dB the tenth percentile")

    index = drawings.DATA / "held_out" / "metadata.jsonl"
    lines = index.read_text("utf-8").splitlines()[:args.images]
    entries = [json.loads(line) for line in lines]
    prompts, n = [entry["text"] for entry in entries], len(entries)
    made = sample_pictures(sd.sampled(STEPS), None, truth[:n], prompts, seed=args.seed, name="base")
    rows = {"true picture": truth[:n], "restored": after[:n], "base": made,
            "base, another prompt": made.roll(1, dims=0)}
    print(f"{'mean RGB distance from':24}{'ground':>8}{'colours':>9}    "
          f"{n} prompts, seed {args.seed}")
    for name, pictures in rows.items():
        errors = [named_color_errors(picture, entry)
                  for picture, entry in zip(pictures, entries, strict=True)]
        ground = mean(first for first, *_ in errors)
        colors = mean(mean(others) for _, *others in errors)
        print(f"  {name:22}{ground:8.1f}{colors:9.1f}")
    cells = [[p, *pictures] for p, *pictures in zip(prompts, truth, after, made, strict=False)][:12]
    write_png(args.out, grid(["Prompt", "Truth", "Restored", "Base"], cells, cell=sd.resolution))
    print(args.out)


if __name__ == "__main__":
    sys.exit(run(main))
